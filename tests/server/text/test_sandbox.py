"""Templates that nobody vouches for: rendered as others are, and ended when they loop or explode."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from server.errors import InvalidRequest
from server.text.chat_template import ChatTemplate
from server.text.sandbox import TemplateRenderer
from tests.support.tiny import CHAT_TEMPLATE

MESSAGES = [{"role": "user", "content": "Hi 🦜"}]
SECONDS = 60  # on the clock; processor time ends what is too slow, or a busy machine would be taken for it


@pytest_asyncio.fixture
async def renderer() -> AsyncIterator[TemplateRenderer]:
    made = TemplateRenderer(SECONDS, cpu_seconds=1, memory_bytes=64 << 20)
    yield made
    await made.close()


async def test_it_renders_as_the_bases_template_would(renderer: TemplateRenderer) -> None:
    tokens = {"bos_token": "<s>"}
    source = "{{ bos_token }}" + CHAT_TEMPLATE + "{{ flag }}"
    options: dict[str, Any] = {"add_generation_prompt": True, "continue_final_message": False, "arguments": {"flag": 1}}
    expected = ChatTemplate(source, tokens).render(MESSAGES, **options)
    for _ in range(3):
        assert await renderer.render(source, tokens, MESSAGES, **options) == expected


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
    assert time.monotonic() - began < SECONDS + 30
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


async def test_many_at_once_wait_their_turn(renderer: TemplateRenderer) -> None:
    texts = await asyncio.gather(*(renderer.render(f"{i}", {}, MESSAGES) for i in range(12)))
    assert texts == [f"{i}" for i in range(12)]


@pytest.mark.parametrize("variants", [1, 3])
async def test_twelve_slow_templates_do_not_delay_another_adapters(variants: int, renderer: TemplateRenderer) -> None:
    sources = [HOSTILE["loops"] + "x" * (i % variants) for i in range(12)]
    for source in ("fine", "warm up", *set(sources)):
        await renderer.check(source)
    slow = [
        asyncio.create_task(renderer.render(source, {}, MESSAGES, adapter=f"slow {i}"))
        for i, source in enumerate(sources)
    ]
    await asyncio.sleep(0.05)
    for _ in range(3):
        assert await renderer.render("fine", {}, MESSAGES, adapter="fine") == "fine"
        assert sum(task.done() for task in slow) < 9, "twelve seconds of others' work wait"
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)


async def test_many_chats_of_one_adapter_do_not_delay_anothers_of_the_same_template(renderer: TemplateRenderer) -> None:
    source = "{% for i in range(20000) %}{% if i is odd %}{% endif %}{% endfor %}fine"
    await renderer.check(source)
    many = [asyncio.create_task(renderer.render(source, {}, MESSAGES, adapter="busy")) for _ in range(60)]
    before, _ = await asyncio.wait(many, return_when=asyncio.FIRST_COMPLETED)
    assert await renderer.render(source, {}, MESSAGES, adapter="other") == "fine"
    assert sum(task.done() for task in many) - len(before) < 40
    await asyncio.gather(*many)


@pytest.mark.parametrize(
    "source",
    ["{% for i in range(99) %}{{ 'x' * 20 }}{% endfor %}", "{{ 'x' * 1001 }}", "{{ messages[0].content * 999 }}"],
)
async def test_a_text_that_can_never_fit_does_not_cross(source: str, renderer: TemplateRenderer) -> None:
    with pytest.raises(InvalidRequest, match="The adapter's chat template writes more than 1000 characters") as refusal:
        await renderer.render(source, {}, MESSAGES, max_characters=1000)
    assert refusal.value.code == "chat_template_failed"
    assert await renderer.render("{{ 'x' * 1000 }}", {}, MESSAGES, max_characters=1000) == "x" * 1000


async def test_half_a_surrogate_pair_is_refused(renderer: TemplateRenderer) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        await renderer.render("{{ '\\ud800' }}", {}, MESSAGES)
