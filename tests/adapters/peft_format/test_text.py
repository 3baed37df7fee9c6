"""Tokens and templates accepted from an uploaded tokenizer, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from adapters.peft_format import text as text_format
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.text import AdapterText, NewToken, check_template, find_new_tokens, read_added_tokens

BASE = {"<a>": 0, "<b>": 1, "word": 7}
SIZE = 10


def read(path: Path, tokens: Any) -> tuple[NewToken, ...]:
    path.write_text(json.dumps({"added_tokens": tokens, "model": {}}))
    return find_new_tokens(read_added_tokens(path), BASE.get, SIZE)


def test_only_what_the_base_lacks_is_taken(tmp_path: Path) -> None:
    tokens = [
        {"id": 11, "content": "<y>", "special": False, "normalized": True},
        {"id": 0, "content": "<a>", "special": True},
        {"id": 10, "content": "<x>", "special": True, "lstrip": True},
    ]
    found = read(tmp_path / "t", tokens)
    assert found == (NewToken(10, "<x>", special=True, lstrip=True), NewToken(11, "<y>", normalized=True))
    text = AdapterText(found, "{{ messages }}")
    fields = json.loads(json.dumps({"tokens": [vars(token) for token in found], "chat_template": text.chat_template}))
    assert AdapterText.from_fields(fields) == text
    assert read(tmp_path / "t", []) == ()


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ("x", "no list"),
        (["x"], "objects"),
        ([{"id": "10", "content": "<x>"}], "objects with an id"),
        ([{"id": 10, "content": 5}], "objects with an id"),
        ([{"id": True, "content": "<x>"}], "objects with an id"),
        ([{"id": 10, "content": "<x>", "special": 1}], "objects with an id"),
        ([{"id": 10, "content": ""}], "1 to 256"),
        ([{"id": 10, "content": "x" * 257}], "1 to 256"),
        ([{"id": 10, "content": "\ud800"}], "JSON"),
        ([{"id": 5, "content": "<a>"}], "as 5"),
        ([{"id": 11, "content": "<x>"}], "from 10 on"),
        ([{"id": 2**31, "content": "<x>"}], "from 10 on"),
        ([{"id": -1, "content": "<x>"}], "from 10 on"),
        ([{"id": 10, "content": "<x>"}, {"id": 10, "content": "<y>"}], "from 10 on"),
        ([{"id": 10, "content": "<x>"}, {"id": 11, "content": "<x>"}], "twice"),
    ],
)
def test_tokens_that_do_not_extend_the_base_are_refused(tokens: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=words) as caught:
        read(tmp_path / "t", tokens)
    assert caught.value.param == "tokenizer"


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"[" * 100_000, b'{"x":' + b"[" * 100_000, b"\xff", b"{}"])
def test_invalid_tokenizer_files_are_refused(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(raw)
    with pytest.raises(AdapterError) as caught:
        read_added_tokens(tmp_path / "t")
    assert caught.value.param == "tokenizer"


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"x" * (256 * 1024 + 1)])
def test_templates_are_short_text(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(raw)
    with pytest.raises(AdapterError) as caught:
        check_template(tmp_path / "t")
    assert caught.value.param == "chat_template"


@pytest.mark.parametrize(
    ("limit", "words"),
    [("MAX_ADDED_TOKENS", "3 added"), ("MAX_ADDED_CHARACTERS", "together"), ("MAX_TOKENIZER_BYTES", "bytes")],
)
def test_tokenizers_have_limits(limit: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = [{"id": 10 + i, "content": f"<{i}>"} for i in range(3)]
    assert len(read(tmp_path / "t", tokens)) == 3
    monkeypatch.setattr(text_format, limit, 2)
    with pytest.raises(AdapterError, match=words):
        read(tmp_path / "t", tokens)
