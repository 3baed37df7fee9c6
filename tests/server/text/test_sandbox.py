"""Templates that nobody vouches for: rendered as others are, and ended when they loop or explode."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from server.errors import InvalidRequest
from server.text.chat_template import ChatTemplate
from server.text.sandbox import PROCESSES, Limits, TemplateRenderer
from tests.support.tiny import CHAT_TEMPLATE

MESSAGES = [{"role": "user", "content": "Hi 🦜"}]
LIMITS = Limits(seconds=0.5, cpu_seconds=1, memory_bytes=64 << 20)


@pytest_asyncio.fixture
async def renderer() -> AsyncIterator[TemplateRenderer]:
    made = TemplateRenderer(LIMITS)
    yield made
    processes = list(made._idle)
    made.close()
    for process in processes:
        await process.wait()


async def test_it_renders_as_the_bases_template_would(renderer: TemplateRenderer) -> None:
    tokens = {"bos_token": "<s>"}
    source = "{{ bos_token }}" + CHAT_TEMPLATE + "{{ flag }}"
    options: dict[str, Any] = {"add_generation_prompt": True, "continue_final_message": False, "arguments": {"flag": 1}}
    expected = ChatTemplate(source, tokens).render(MESSAGES, **options)
    for _ in range(3):
        assert await renderer.render(source, tokens, MESSAGES, **options) == expected
    assert len(renderer._idle) == 1, "one process serves one after the other"


HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops where no clock is looked at": "{{ ('a' * 30000000) is in ('b' * 30000000) }}" * 4000,
    "writes without end": "{% for i in range(99999) %}{{ 'x' * 9999999 }}{% endfor %}",
    "explodes": "{% set ns = namespace(x='x' * 1000000) %}"
    "{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "takes memory": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set ns.x = ns.x + ['y' ~ i] * 9999 %}{% endfor %}",
    "escapes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "raises": "{{ raise_exception('no') }}",
    "divides": "{{ 1 // 0 }}",
}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_hostile_templates_end_in_time_and_harm_nobody(kind: str, renderer: TemplateRenderer) -> None:
    await renderer.check("warm up")
    began = time.monotonic()
    with pytest.raises(InvalidRequest):
        await renderer.render(HOSTILE[kind], {}, MESSAGES)
    assert time.monotonic() - began < LIMITS.seconds + 3
    assert await renderer.render("fine", {}, MESSAGES) == "fine"


@pytest.mark.parametrize("source", ["{% if %}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% include 'x' %}"])
async def test_what_is_no_template_is_refused(source: str, renderer: TemplateRenderer) -> None:
    if "include" in source:  # valid, but there is nothing to include
        await renderer.check(source)
        with pytest.raises(InvalidRequest):
            await renderer.render(source, {}, MESSAGES)
        return
    with pytest.raises(InvalidRequest) as caught:
        await renderer.check(source)
    assert caught.value.param in ("chat_template", "messages")


async def test_a_process_that_dies_is_replaced(renderer: TemplateRenderer) -> None:
    await renderer.check("x")
    [process] = renderer._idle
    process.kill()
    await process.wait()
    assert await renderer.render("a", {}, MESSAGES) == "a"


async def test_many_at_once_wait_their_turn(renderer: TemplateRenderer) -> None:
    texts = await asyncio.gather(*(renderer.render(f"{i}", {}, MESSAGES) for i in range(12)))
    assert texts == [f"{i}" for i in range(12)]
    assert len(renderer._idle) <= PROCESSES


async def test_one_whose_caller_left_ends(renderer: TemplateRenderer) -> None:
    await renderer.check("warm up")
    [process] = renderer._idle
    task = asyncio.create_task(renderer.render(HOSTILE["loops"], {}, MESSAGES))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(process.wait(), 5)
    assert not renderer._idle
