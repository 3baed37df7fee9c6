"""The strict JSON reader."""

import json
import time

import pytest

from adapters.strict_json import JsonFault, check_characters, encode_line, parse_json


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\xff", "not valid UTF-8"),
        (b"[1", "line 1, column 3"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' twice"),
        (b"[Infinity]", "Infinity is not a number"),
        (b"[" * 100_000, "nested too deep"),
        (b"[[[1]]]", "more than 2 levels"),
        (b"9" * 5000, "too many digits"),
        (b"[1e999]", "out of range"),
    ],
)
def test_violations_are_named(raw: bytes, reason: str) -> None:
    with pytest.raises(JsonFault, match=reason):
        parse_json(raw, max_depth=2, finite=True)


def test_limits_are_the_callers() -> None:
    assert parse_json(b"[[[1e999]]]") == [[[float("inf")]]]
    assert parse_json(b"[[1.5]]", max_depth=2, finite=True) == [[1.5]]
    with pytest.raises(JsonFault, match="surrogate"):
        check_characters(b'"\\ud800"', parse_json(b'"\\ud800"'))
    check_characters(b'"\\ud83d\\ude00"', parse_json(b'"\\ud83d\\ude00"'))


def test_a_key_given_twice_is_found_in_linear_time() -> None:
    """With 400,000 keys a quadratic search takes minutes."""
    keys = ", ".join(f'"{i}": 0' for i in range(400_000))
    raw = f'{{{keys}, "399999": 1}}'.encode()
    began = time.process_time()
    with pytest.raises(JsonFault) as caught:
        parse_json(raw)
    assert caught.value.key == "399999"
    assert time.process_time() - began < 10
    assert len(json.dumps(str(caught.value))) < 200


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\u2029", "\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_written_json_is_one_line_for_every_reader(end: str) -> None:
    value = {"text": f"a{end}{end}b", f"k{end}": "\u00e9\u2027"}
    line = encode_line(value)
    assert len(line.decode().splitlines()) == 1
    assert parse_json(line) == value
