"""Strict reading of JSON: one meaning only, and nothing that another JSON reader would refuse or read differently.

Also writing of JSON in one line.
"""

import json
import math
import re
from typing import Any

import msgspec

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # written by some editors, and clients on Windows, before a text
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # only an escape can bring half a surrogate pair into valid UTF-8

_CONTAINERS = (dict, list)  # the parser makes no subclasses; `isinstance` would take longer than parsing
_BEFORE_ITEMS = (b",", b"[", b"{", b":")


class JsonFault(ValueError):
    """Text that is not strict JSON. The message is a predicate: "is not valid UTF-8", "is nested too deep".

    Attributes:
        key: the duplicate key of an object.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


def parse_json(raw: bytes, *, max_depth: int | None = None, finite: bool = False) -> Any:
    """The JSON value in `raw`: UTF-8, no key twice in an object, no NaN or Infinity, bounded nesting.

    Args:
        max_depth: the deepest nesting of containers; None: Python's own limit.
        finite: refuse numbers beyond the range of a double, which become infinite otherwise.

    Raises:
        JsonFault: it is anything else. Client-chosen text in the message is not made safe for display.
    """
    try:
        value = json.loads(
            raw.decode(),
            object_pairs_hook=_refuse_duplicate_keys,
            parse_constant=_refuse_constant,
            parse_float=_parse_finite if finite else None,
        )
    except RecursionError:
        raise JsonFault("is nested too deep") from None
    except UnicodeDecodeError:
        raise JsonFault("is not valid UTF-8") from None
    except json.JSONDecodeError as fault:
        raise JsonFault(f"is not valid JSON: {fault.msg} (line {fault.lineno}, column {fault.colno})") from None
    except JsonFault:
        raise
    except ValueError:  # Python's limit on integers
        raise JsonFault("is not valid JSON: a number has too many digits") from None
    if max_depth is not None and _is_deeper(value, max_depth):
        raise JsonFault(f"is nested more than {max_depth} levels deep")
    return value


def count_items(raw: bytes, limit: int) -> int:
    """Elements of lists, keys and values of objects in JSON text, an empty one counted as one; or more than `limit`.

    Counts the characters that separate and open them, at a fraction of the cost of parsing, which would hold them all.
    """
    if sum(map(raw.count, _BEFORE_ITEMS)) <= limit:  # including those in strings
        return sum(map(raw.count, _BEFORE_ITEMS))
    if b"\\" in raw:
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    if (strings := raw.count(b'"') // 2) > limit:
        return strings  # each is an element, a key or a value
    outside = b"".join(raw.split(b'"')[::2])
    return sum(map(outside.count, _BEFORE_ITEMS))


def check_characters(raw: bytes, value: Any) -> None:
    r"""Refuse half surrogate pairs (`\ud800`), which no later answer could carry. Raises JsonFault.

    Args:
        raw: the text that `value` was parsed from.
    """
    if _SURROGATE.search(raw):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise JsonFault("has half a surrogate pair in a string; send whole characters") from None


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise JsonFault(f"has the key {key[:80]!r} twice", key)
            seen.add(key)
    return found


def _refuse_constant(name: str) -> Any:
    raise JsonFault(f"is not valid JSON: {name} is not a number")


def _parse_finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonFault(f"holds a number that is out of range: {text[:40]}")
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether a value is nested more than `depth` levels deep. Iterative, and looks only into containers."""
    level = [value] if type(value) in _CONTAINERS else []
    for _ in range(depth):
        if not level:
            return False
        level = [
            child
            for item in level
            for child in (item.values() if type(item) is dict else item)
            if type(child) in _CONTAINERS
        ]
    return bool(level)


# Line ends of `str.splitlines`, and so of many clients' readers of event streams and JSON lines.
_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


_encode = msgspec.json.Encoder().encode


def encode_line(value: Any) -> bytes:
    """JSON in one line, for any reader's notion of a line's end."""
    text = _encode(value)
    for end, escaped in _LINE_ENDS:
        if end in text:
            text = text.replace(end, escaped)
    return text
