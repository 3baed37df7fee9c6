"""Arguments as models write them: passed on as they come while they are JSON, and never as anything else."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import from_json

from server.text.tools.arguments import INVALID, ObjectText, as_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=4), VALUES, max_size=4)
TEXTS = st.builds(json.dumps, OBJECTS, ensure_ascii=st.booleans(), indent=st.sampled_from([None, 1]))
PIECES = st.lists(st.integers(1, 4), min_size=200, max_size=200)


def passed(text: str, sizes: list[int], *, cut: bool = False) -> tuple[str, ObjectText]:
    """All that is passed on of a text that comes in pieces of these sizes."""
    reading, given = ObjectText(), ""
    for size in (*sizes, len(text)):
        given += reading.feed(text[:size])
        if text[:size]:
            from_json(given or "{", allow_partial=True)  # as clients read it while it comes
        text = text[size:]
    return given + reading.end(cut=cut), reading


@given(TEXTS, PIECES)
def test_json_of_an_object_is_passed_on_as_it_is(text: str, sizes: list[int]) -> None:
    given, reading = passed(text, sizes)
    assert given == text
    assert reading.object() == json.loads(text)


@given(TEXTS, PIECES, st.data())
def test_what_is_cut_short_is_closed_where_it_ends(text: str, sizes: list[int], data: st.DataObject) -> None:
    text = text[: data.draw(st.integers(0, len(text) - 1))]
    given, reading = passed(text, sizes, cut=True)
    assert text.startswith(given)
    closed = from_json(text or "{", allow_partial=True)
    assert reading.object() in (closed, from_json(given or "{", allow_partial=True))
    assert as_object(text) == closed


@given(TEXTS, PIECES, st.data())
def test_a_text_that_ends_early_or_has_a_fault_is_still_an_object(
    text: str, sizes: list[int], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(text) - 1))
    text = text[:at] + data.draw(st.sampled_from(["", "'", "x", "\n", "\\", "]", "}", ",", "\\ud800", '"', ":"])) + "!"
    given, reading = passed(text, sizes)
    made = json.loads(given)
    assert made == reading.object()
    assert made.get(INVALID) == text or given == text.removesuffix("!")  # the fault was what had been missing


FAULTY = [
    '{"a": b}',
    "{'a': 1}",
    '{"a": 1,}',
    '{"a": tru}',
    '{"a": 01}',
    '{"a": NaN}',
    '{"a": 1e999}',
    '{"a": [1, {"b": True}]}',
    '{"a": "tab\there"}',
    r'{"a": "\x41"}',
    r'{"a": "\ud83d\u0041"}',
    r'{"a": "\udc00"}',
    '{"a" 1}',
    "{a: 1}",
    '{"a": ' + "1" * 5000 + "}",
    '{"a": ' * 300 + "1" + "}" * 300,
    "[1]",
    '"a"',
    "5",
]


@pytest.mark.parametrize("text", FAULTY, ids=[text[:30] for text in FAULTY])
def test_what_is_no_json_of_an_object_stands_as_it_is(text: str) -> None:
    assert as_object(text) == {INVALID: text}
    given, reading = passed(text, [3] * 100)
    made = json.loads(given)
    assert made == reading.object()
    assert made.get(INVALID) == text or text.startswith(given)  # what follows an object is passed over


@pytest.mark.parametrize("text", ["", "  ", "null"])
def test_no_arguments_are_an_empty_object(text: str) -> None:
    assert as_object(text) == {}


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ('{"a": "x\ty"}', '{"a": "x", "INVALID_JSON": '),
        ('{"a": {"b": [1, x]}}', '{"a": {"b": [1]}, "INVALID_JSON": '),
        ('{"a": x}', '{"INVALID_JSON": '),
        ('{"a": 1, "b": x}', '{"a": 1, "INVALID_JSON": '),
        ("x", '{"INVALID_JSON": '),
    ],
)
def test_what_was_passed_on_before_a_fault_is_closed(text: str, given: str) -> None:
    whole: dict[str, Any] = json.loads(passed(text, [1] * 50)[0])
    assert passed(text, [1] * 50)[0] == f"{given}{json.dumps(text)}}}"
    assert whole[INVALID] == text
