"""What is taken from an uploaded tokenizer, and what is refused."""

import json
from typing import Any

import pytest

from adapters.peft_format.fields import AdapterError
from adapters.peft_format.text import AdapterText, NewToken, check_template, read_new_tokens

BASE = {"<a>": 0, "<b>": 1, "word": 7}
SIZE = 10


def read(tokens: Any) -> tuple[NewToken, ...]:
    return read_new_tokens(json.dumps({"added_tokens": tokens, "model": {}}).encode(), BASE.get, SIZE)


def test_only_what_the_base_lacks_is_taken() -> None:
    tokens = [
        {"id": 11, "content": "<y>", "special": False, "normalized": True},
        {"id": 0, "content": "<a>", "special": True},
        {"id": 10, "content": "<x>", "special": True, "lstrip": True},
    ]
    found = read(tokens)
    assert found == (NewToken(10, "<x>", special=True, lstrip=True), NewToken(11, "<y>", normalized=True))
    text = AdapterText(found, "{{ messages }}")
    fields = json.loads(json.dumps({"tokens": [vars(token) for token in found], "chat_template": text.chat_template}))
    assert AdapterText.of(fields) == text
    assert read([]) == ()


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("x", "no list"),
        (["x"], "objects"),
        ([{"id": "10", "content": "<x>"}], "need an id"),
        ([{"id": 10, "content": 5}], "need an id"),
        ([{"id": True, "content": "<x>"}], "need an id"),
        ([{"id": 10, "content": "<x>", "special": 1}], "need an id"),
        ([{"id": 10, "content": ""}], "1 to 256"),
        ([{"id": 10, "content": "x" * 257}], "1 to 256"),
        ([{"id": 10, "content": "\ud800"}], "surrogate"),
        ([{"id": 5, "content": "<a>"}], "as 5"),
        ([{"id": 11, "content": "<x>"}], "from 10 on"),
        ([{"id": 2**31, "content": "<x>"}], "from 10 on"),
        ([{"id": -1, "content": "<x>"}], "from 10 on"),
        ([{"id": 10, "content": "<x>"}, {"id": 10, "content": "<y>"}], "from 10 on"),
        ([{"id": 10, "content": "<x>"}, {"id": 11, "content": "<x>"}], "twice"),
    ],
)
def test_what_is_no_extension_of_the_base_is_refused(tokens: Any, words: str) -> None:
    with pytest.raises(AdapterError, match=words) as caught:
        read(tokens)
    assert caught.value.param == "tokenizer"


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"[" * 100_000, b"\xff", b"{}"])
def test_what_is_no_tokenizer_is_refused(raw: bytes) -> None:
    with pytest.raises(AdapterError) as caught:
        read_new_tokens(raw, BASE.get, SIZE)
    assert caught.value.param == "tokenizer"


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"x" * (256 * 1024 + 1)])
def test_templates_are_short_text(raw: bytes) -> None:
    with pytest.raises(AdapterError) as caught:
        check_template(raw)
    assert caught.value.param == "chat_template"
