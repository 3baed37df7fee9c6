"""The tokenizer, without torch, and chat templates, without trust in what they are applied to."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.peft_format.text import AdapterText, NewToken
from server.errors import ContextLengthExceeded, InvalidRequest
from server.text import chat_template
from server.text.chat_template import ChatTemplate, TemplateRefusal
from server.text.processor import TextProcessor, TokenizerError
from tests.support.tiny import CHAT_TEMPLATE, _tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    _tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(directory: Path) -> TextProcessor:
    return TextProcessor.load(directory)


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi  \n"}]


async def _render(
    text: TextProcessor,
    messages: list[dict[str, str]] = MESSAGES,
    *,
    generation: bool = True,
    final: bool = False,
    **arguments: Any,
) -> str:
    return await text.render_chat(
        messages,
        add_generation_prompt=generation,
        continue_final_message=final,
        arguments=arguments,
        max_tokens=4096,
    )


# --- tokens -------------------------------------------------------------------------------------------


async def test_short_and_long_texts_tokenise_alike(text: TextProcessor) -> None:
    sample = "Wörter mit Ümläuten, 漢字, emoji 🦜 and <|im_start|> specials.\n"
    encode = partial(text.encode, add_special_tokens=False, max_tokens=4096, param="prompt")
    once, again = await encode([sample, sample])
    assert once == again == _tokenizer().encode(sample, add_special_tokens=False)
    assert await encode([sample * 200]) == [_tokenizer().encode(sample * 200)]
    assert text.decode(once, skip_special_tokens=False) == sample


async def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(
    text: TextProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = "a" * (10 * text.longest_token)
    await text.encode([fits], add_special_tokens=False, max_tokens=10, param="prompt")
    monkeypatch.setattr(text, "_encode", None)
    for too_long in (fits + "a", "漢" * (len(fits) // 3 + 1)):
        with pytest.raises(ContextLengthExceeded) as refusal:
            await text.encode(["short", too_long], add_special_tokens=False, max_tokens=10, param="messages")
        assert refusal.value.param == "messages"


def test_no_token_stands_for_more_bytes_than_the_longest(text: TextProcessor) -> None:
    sizes = [len(text.token_bytes(id_)) for id_ in range(text.tokenizer.get_vocab_size())]
    assert max(sizes) == text.longest_token


async def test_encoding_ends_with_those_who_asked(text: TextProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    gone = threading.Event()

    def encode(texts: list[str], special: bool) -> list[list[int]]:
        begun.append(len(texts))
        assert gone.wait(60)
        return [[1]] * len(texts)

    monkeypatch.setattr(text, "_encode", encode)
    many = ["a" * 40_000] * 20
    encoding = [
        asyncio.create_task(text.encode(many, add_special_tokens=False, max_tokens=10_000, param="prompt"))
        for _ in range(8)
    ]
    async with asyncio.timeout(60):
        while not begun:  # noqa: ASYNC110 - a thread's doing
            await asyncio.sleep(0.001)
    for task in encoding:
        task.cancel()
    await asyncio.sleep(0)
    gone.set()
    await text.encode(["b" * 5000], add_special_tokens=False, max_tokens=10_000, param="prompt")
    assert begun == [2, 1]  # what ran when they went, and the one that came then


async def test_offsets_point_into_the_text(text: TextProcessor) -> None:
    sample = "The quick 漢字 fox"
    offsets = text.offsets(sample, add_special_tokens=False)
    (ids,) = await text.encode([sample], add_special_tokens=False, max_tokens=99, param="prompt")
    assert len(offsets) == len(ids)
    assert offsets == sorted(offsets)
    assert sample[offsets[1] :].startswith(text.token(ids[1]).text)


@given(st.text())
def test_bytes_of_tokens_joined_are_the_text(text: TextProcessor, sample: str) -> None:
    ids = text.tokenizer.encode(sample, add_special_tokens=False).ids
    assert b"".join(text.token_bytes(id_) for id_ in ids) == sample.encode()


def test_a_token_that_is_no_text_by_itself_shows_its_bytes(text: TextProcessor) -> None:
    first = text.tokenizer.encode("漢", add_special_tokens=False).ids[0]
    assert text.token(first).text.startswith("bytes:\\xe6")
    assert text.token(first).bytes[0] == 0xE6
    assert text.token(10**6).bytes == b""


def test_serving_does_not_bring_torch_in() -> None:
    code = "import sys, server.http.serving; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        TextProcessor.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        TextProcessor.load(tmp_path)


async def test_many_tokens_of_an_adapter_are_added_at_once(text: TextProcessor) -> None:
    """Of both kinds in turns; one by one these took half a minute."""
    first = text.tokenizer.get_vocab_size()
    tokens = tuple(NewToken(first + i, f"<new_{i}>", special=i % 2 == 0, lstrip=i % 3 == 0) for i in range(12_000))
    began = time.process_time()
    adapted = await text.with_adapter_text("many", lambda: AdapterText(tokens))
    assert time.process_time() - began < 5
    assert {adapted.tokenizer.token_to_id(token.content) for token in tokens} == {token.id for token in tokens}
    known = adapted.tokenizer.get_added_tokens_decoder()
    assert all((known[t.id].special, known[t.id].lstrip) == (t.special, t.lstrip) for t in tokens)
    prompt = f"Hi <new_7>{tokens[11_998].content}"
    [ids] = await adapted.encode([prompt], add_special_tokens=False, max_tokens=99, param="prompt")
    assert ids[-2:] == [first + 7, first + 11_998]


# --- chat templates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", [True, False])
async def test_chat_renders_as_transformers_does(text: TextProcessor, generation: bool) -> None:
    expected = _tokenizer().apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=generation)
    assert await _render(text, generation=generation) == expected


@pytest.mark.parametrize("final", ["to be", "to be  ", "\n to be"])
@pytest.mark.parametrize("trims", [True, False])
def test_continuing_a_message_renders_as_transformers_does(final: str, trims: bool) -> None:
    source = CHAT_TEMPLATE.replace("m['content']", "m['content'] | trim") if trims else CHAT_TEMPLATE
    messages = [*MESSAGES, {"role": "assistant", "content": final}]
    expected = _tokenizer().apply_chat_template(
        messages, chat_template=source, tokenize=False, continue_final_message=True
    )
    template = ChatTemplate(source, {})
    assert template.render(messages, add_generation_prompt=False, continue_final_message=True) == expected


def test_a_message_that_the_template_rewrites_cannot_be_continued() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", {})
    with pytest.raises(TemplateRefusal) as refusal:
        template.render(MESSAGES, add_generation_prompt=False, continue_final_message=True)
    assert refusal.value.param == "continue_final_message"


def test_developer_is_the_system_unless_the_template_knows_better() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert "system" in ChatTemplate(CHAT_TEMPLATE, {}).render(messages)
    assert "system" in ChatTemplate("{# of the developer #}" + CHAT_TEMPLATE, {}).render(messages)
    assert "developer" in ChatTemplate("{% set known = ['developer'] %}" + CHAT_TEMPLATE, {}).render(messages)


STRICT_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}[{{ m['role'] }}]{{ m['content'] }}"
    "{% endfor %}"
)
FIRST_ONLY = (
    "{% if messages[0]['role'] == 'system' %}[system]{{ messages[0]['content'] }}{% endif %}"
    "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['role'] }}]{{ m['content'] }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("source", [STRICT_SYSTEM, FIRST_ONLY])
def test_instructions_are_one_message_where_the_template_takes_no_more(source: str) -> None:
    messages = [{"role": role, "content": role[0]} for role in ("system", "developer", "user")]
    template = ChatTemplate(source, {})
    assert template.render(messages) == "[system]s\n\nd[user]u"
    continued = [*messages, {"role": "assistant", "content": "a"}]
    text = template.render(continued, add_generation_prompt=False, continue_final_message=True)
    assert text == "[system]s\n\nd[user]u[assistant]a"


def test_instructions_stay_apart_where_the_template_writes_them_all() -> None:
    messages = [{"role": role, "content": role[0]} for role in ("system", "system", "user")]
    assert ChatTemplate(CHAT_TEMPLATE, {}).render(messages).count("system") == 2
    with pytest.raises(TemplateRefusal, match="at the beginning"):
        ChatTemplate(STRICT_SYSTEM, {}).render([messages[2], messages[0]])


def test_templates_see_special_tokens_arguments_and_what_transformers_offers() -> None:
    source = (
        "{{ bos_token }}{% generation %}{{ messages | tojson }}{% endgeneration %}"
        "{{ thinking }}{{ strftime_now('%Y') | length }}{% for i in range(9) %}{% break %}{% endfor %}"
    )
    rendered = ChatTemplate(source, {"bos_token": "<s>"}).render(
        [{"role": "user", "content": "<ä>"}], arguments={"thinking": False}
    )
    assert rendered == '<s>[{"role": "user", "content": "<ä>"}]False4'


async def test_special_tokens_and_template_come_from_wherever_repositories_keep_them(tmp_path: Path) -> None:
    _tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"bos_token": {"content": "<s>"}}
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}!"}]
    path.write_text(json.dumps(config | {"chat_template": named}))
    assert await _render(TextProcessor.load(tmp_path)) == "<s>!"
    path.write_text(json.dumps(config))
    with pytest.raises(InvalidRequest, match="no chat template"):
        await _render(TextProcessor.load(tmp_path))


def test_templates_of_image_models_that_take_parts_only_get_the_text_as_one() -> None:
    source = (
        "{% for m in messages %}{{ m.role }}:{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}"
        "{% endif %}{% endfor %};{% endfor %}"
    )
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    template = ChatTemplate(source, {})
    assert template.render(chat) == "user:Hello;assistant:Hi;"
    assert template.render(chat, continue_final_message=True) == "user:Hello;assistant:Hi"


@pytest.mark.parametrize(
    ("of_tools", "written"),
    [
        ("{{ m.content[0].text.strip() }}", "sunny"),
        ("{{ m.content[0].text }}", "sunny"),
        (
            "{% for part in m.content %}{{ loop.index0 }}: {{ part | tojson }},{% endfor %}",
            '0: {"type": "text", "text": "sunny"},',
        ),
    ],
)
def test_templates_that_take_parts_of_some_messages_lose_nothing(of_tools: str, written: str) -> None:
    """Cohere's, of results: with a string they fail, or pass over it, or write one letter after the other."""
    source = (
        "{% for m in messages %}{% if m.role == 'tool' %}" + of_tools + "{% else %}"
        "{{ m.content if m.content is string else m.content[0].text }}{% endif %};{% endfor %}"
    )
    chat = [{"role": "user", "content": "Hello"}, {"role": "tool", "content": "sunny"}]
    assert ChatTemplate(source, {}).render(chat) == f"Hello;{written};"
    whole = ChatTemplate("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", {})
    quoted = [{"role": "user", "content": 'Say "hi"'}, {"role": "user", "content": "Now"}]
    assert whole.render(quoted) == '"Say \\"hi\\"""Now"'


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
async def test_a_processors_directory_has_the_template(name: str, tmp_path: Path) -> None:
    _tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / name).write_text(json.dumps({"chat_template": "{{ messages[0].content }}!"}))
    assert (await _render(TextProcessor.load(tmp_path))).endswith("!")


HOSTILE = {
    "refused by the template": "{{ raise_exception('Conversation roles must alternate') }}",
    "endless by output": "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "endless by work": "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = messages[0].role %}"
    "{% endfor %}{% endfor %}",
    "huge by repetition": "{{ 'x' * 10**6 * 10**6 }}",
    "huge by repetition of an argument": "{{ 'x' * n * n }}",
    "huge range": "{% for i in range(n) %}{% endfor %}",
    "wrong types": "{{ messages[0].content + 1 }}",
    "missing": "{{ nothing.at.all }}",
    "sandbox": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "changes its input": "{{ messages.append(1) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_misbehaves_is_a_refusal_in_bounded_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.2)
    template = ChatTemplate(HOSTILE[name], {})
    started = time.monotonic()
    with pytest.raises(TemplateRefusal) as refusal:
        template.render(MESSAGES, arguments={"n": 10**9})
    assert time.monotonic() - started < 20
    assert refusal.value.param == "messages"
