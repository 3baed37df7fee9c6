"""JSON Schemas tightened where llguidance allows more than they do, so that a finished answer validates.

Regular expressions mean what ECMAScript's do. Names are not escaped, or one could stand twice in an object.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

# Of llguidance's options for JSON, whatever a schema's own `x-guidance` says. Without `u` among its escapes, the names
# of an object are written in one way only.
EXACT: dict[str, Any] = {"lenient": False, "coerce_one_of": False, "json_allowed_escapes": 'nrbtf\\"'}

_DATA = ("const", "enum", "default", "examples", "x-guidance")  # members that are no schemas
_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # of which each member is one
_DATE = (
    r"(?:[0-9]{4}-(?:(?:0[13-9]|1[0-2])-[0-9]{2}|02-(?:[01][0-9]|2[0-8]))"
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
_FORMATS = {
    "date": f"^{_DATE}$",
    "date-time": f"^{_DATE}.{{7}}[0-5]",  # no leap seconds: few are in the calendar
    "time": "^.{6}[0-5]",
    "email": "^[^@]{1,64}@[^@]{1,63}$",
    "hostname": "^.{1,253}$",
}

# Some engines take the one for white space that others do not.
_SPACE, _NO_SPACE = r"[ \t\n\r\f\v]", r"[^\s\x1c-\x1f\x{feff}]"
_ANY_SPACE, _OTHER = r"[\s\x1c-\x1f\x{feff}]", r"[^ \t\n\r\f\v]"
_DOT = r"[^\n\r\x{2028}\x{2029}]"
_CONTROL = re.compile(r"(?<!\\)(?:\\\\)*\\u00(?:[01]|7f)")
_PART = re.compile(r"\\.|\[\^?|\]|\.", re.DOTALL)


def exact(schema: Any) -> Any:
    """A schema that allows nothing that this one does not. Raises ValueError for a keyword that cannot be enforced."""
    if isinstance(schema, list):
        return [exact(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = {key: _member(key, value) for key, value in schema.items()}
    least, required = schema.get("minProperties"), schema.get("required")
    names = len({str(name) for name in required}) if isinstance(required, list) else 0
    if isinstance(least, int | float) and least > names + 1:
        raise ValueError("minProperties: more than one name beyond those in `required` cannot be enforced")
    pattern = _FORMATS.get(str(schema.get("format")))
    if pattern is not None and isinstance(made.get("allOf", []), list):
        made["allOf"] = [*made.get("allOf", []), {"pattern": pattern}]
    return made


def _member(key: str, value: Any) -> Any:
    if key in _DATA:
        if key in ("const", "enum") and _CONTROL.search(json.dumps(value)):
            raise ValueError(f"{key}: control characters other than white space cannot be written")
        return value
    if key == "pattern" and isinstance(value, str):
        return portable(value)
    if key in _NAMED and isinstance(value, Mapping):
        rename = portable if key == "patternProperties" else str
        return {rename(name): exact(part) for name, part in value.items()}
    return exact(value)


def portable(pattern: str) -> str:
    """A pattern in Rust's syntax, of texts that match in every engine."""
    classes: list[bool] = []  # those that are open; whether they are negated

    def rewritten(match: re.Match[str]) -> str:
        part = match[0]
        if part.startswith("["):
            classes.append(part != "[")
        elif part == "]" and classes:
            classes.pop()
        elif part == "." and not classes:
            return _DOT
        elif part in (r"\s", r"\S"):
            negated = bool(classes) and classes[-1]
            return ((_SPACE, _ANY_SPACE), (_NO_SPACE, _OTHER))[part == r"\S"][negated]
        return part

    return _PART.sub(rewritten, pattern)
