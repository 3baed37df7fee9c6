"""JSON Schemas tightened where llguidance allows more than they do, so that a finished answer validates.

Regular expressions have their meaning in both ECMAScript and Python. Names are not escaped, since a name with two
spellings could occur twice in an object.
"""

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from server.messages.grammar_branches import Branches, begins_document
from server.messages.grammar_pattern import portable

# llguidance's options for JSON that a schema's own `x-guidance` cannot override. Without `u` among the escapes, an
# object's names have one spelling only.
EXACT: dict[str, Any] = {"lenient": False, "coerce_one_of": False, "json_allowed_escapes": 'nrbtf\\"'}

DATA = ("const", "enum", "default", "examples", "x-guidance")  # members that are not schemas
DEFINITIONS = ("$defs", "definitions")
NAMED = ("properties", "patternProperties", *DEFINITIONS)  # mappings from names to schemas
_DATE = (
    r"(?:[0-9]{4}-(?:(?:0[13-9]|1[0-2])-[0-9]{2}|02-(?:[01][0-9]|2[0-8]))"
    r"|(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
_LABEL = r"([^.]|[^.]{2}([^.-][^.]*|-[^.-][^.]*)?)"  # without the reserved form: `xn--` has rules of its own
_FORMATS = {
    "date": [f"^{_DATE}$"],
    "date-time": [f"^{_DATE}.{{7}}[0-5]"],  # no leap seconds: few minutes have one
    "time": ["^.{6}[0-5]"],
    "email": ["^[^@]{1,64}@[^@]{1,63}$"],
    "hostname": ["^.{1,253}$", rf"^{_LABEL}(\.{_LABEL})*$"],
}

# Formats defined by JSON Schema; all others are annotations.
_DEFINED = _FORMATS.keys() | {
    *("duration", "ipv4", "ipv6", "uuid", "uri", "uri-reference", "uri-template", "iri", "iri-reference"),
    *("idn-email", "idn-hostname", "json-pointer", "relative-json-pointer", "regex"),
}
_NOTHING: dict[str, Any] = {"enum": []}  # the schema that no value matches
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_ANNOTATIONS = {"title", "description", "$comment", "examples", "deprecated"}
_LEAST, _MOST = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_LARGEST = 2**63 - 1024  # largest bound accepted by llguidance that is exact as a double
_SMALLEST = 1e-50
_ENDS = {"exclusiveMinimum": math.inf, "exclusiveMaximum": -math.inf}  # -> the direction of allowed values

_REFERENCE = re.compile(r"(?:[]A-Za-z0-9._~:/?#[@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*")  # characters of a URI reference
_CONTROL = re.compile(r"(?<!\\)(?:\\\\)*\\u00(?:[01]|7f)")


def exact(schema: Any) -> Any:
    """Return a schema as strict as this one or stricter. Raises ValueError for a keyword that cannot be enforced."""
    if isinstance(schema, Mapping) and not _REFERENCE.fullmatch(str(schema.get("$id", ""))):
        schema = {key: value for key, value in schema.items() if key != "$id"}  # a title: no reference can use it
    return _exact(schema, Branches(schema))


def _exact(schema: Any, branches: Branches) -> Any:
    if isinstance(schema, list):
        return [_inner(part, branches) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    if "not" in schema and _allows_all(schema["not"]):
        return _NOTHING  # generators' way to forbid a member
    made = {
        key: _member(key, value, branches) for key, value in schema.items() if not _has_no_effect(key, value, schema)
    }
    if isinstance(patterns := schema.get("patternProperties"), Mapping):
        others = schema.get("additionalProperties", True)
        made["patternProperties"] = {_of_names(name, others): _inner(part, branches) for name, part in patterns.items()}
    if isinstance(schema.get("oneOf"), list) and branches.exclude_each_other(schema["oneOf"]):
        of_any(made)
    least, required = schema.get("minProperties"), schema.get("required", [])
    if not isinstance(required, list):  # draft 3's boolean on a member: llguidance would ignore it
        raise ValueError("required: must be a list of names, of the object that has them")
    names = len({str(name) for name in required})
    if isinstance(least, int | float) and least > names + 1:
        raise ValueError("minProperties: more than one name beyond those in `required` cannot be enforced")
    patterns = _FORMATS.get(str(schema.get("format")))
    if patterns is not None and isinstance(made.get("allOf", []), list):
        made["allOf"] = [*made.get("allOf", []), *({"pattern": pattern} for pattern in patterns)]
    made |= {key: _clamped_bound(key, made[key]) for key in (*_LEAST, *_MOST) if key in made}
    if schema.get("type") != "integer":
        made |= {key: _nudged_bound(made[key], away) for key, away in _ENDS.items() if key in made}
    return made


def subschemas(schema: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield all schemas in a schema, itself included, with their paths; definitions last."""
    if isinstance(schema, list):
        for index, part in enumerate(schema):
            yield from subschemas(part, (*path, str(index)))
    elif isinstance(schema, dict):
        yield path, schema
        for key, part in sorted(schema.items(), key=lambda item: item[0] in DEFINITIONS):
            if key in NAMED and isinstance(part, dict):
                for name, each in part.items():
                    yield from subschemas(each, (*path, key, name))
            elif key not in DATA:
                yield from subschemas(part, (*path, key))


def of_any(schema: dict[str, Any]) -> None:
    """Turn `oneOf` into `anyOf`."""
    alternatives = schema.pop("oneOf")
    if "anyOf" in schema:
        schema["allOf"] = [*schema.get("allOf", []), {"anyOf": schema["anyOf"]}]
    schema["anyOf"] = alternatives


def _has_no_effect(key: str, value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a member, written by a schema generator for completeness, has no effect."""
    match key:
        case "format":
            return isinstance(value, str) and value not in _DEFINED
        case "uniqueItems":
            return value is False
        case "propertyNames" | "unevaluatedProperties" | "unevaluatedItems":
            typed = key == "propertyNames" and isinstance(value, Mapping) and value.get("type") == "string"
            return _allows_all(value, {"type"} if typed else ())
        case "not":
            return value is False
        case "dependentRequired" | "dependentSchemas" | "dependencies":
            return value == {}
        case "if":
            return not schema.keys() & {"then", "else"}
        case "then" | "else":
            return "if" not in schema
        case "minContains" | "maxContains":
            return "contains" not in schema
    return False


def _allows_all(schema: Any, ignored: Collection[str] = ()) -> bool:
    """Whether a schema without the members in `ignored` allows every value."""
    return not schema.keys() - _ANNOTATIONS - set(ignored) if isinstance(schema, Mapping) else schema is True


def _nudged_bound(bound: Any, away: float) -> Any:
    """Return an exclusive bound moved off a whole number, which llguidance lets pass when the other bound is near.

    The values lost lie between two adjacent doubles, or beside zero.
    """
    if isinstance(bound, bool) or not isinstance(bound, int | float) or bound % 1 or abs(bound) > 1e15:
        return bound
    return math.nextafter(bound, away) if bound else math.copysign(1e-15, away)


def _clamped_bound(key: str, bound: Any) -> Any:
    """Return a bound clamped to the magnitudes that llguidance supports; schemas give the limits of numeric types."""
    if isinstance(bound, bool) or not isinstance(bound, int | float):
        return bound
    if key in _LEAST:
        return max(bound, _SMALLEST if 0 < bound < _SMALLEST else -_LARGEST)
    return min(bound, -_SMALLEST if -_SMALLEST < bound < 0 else _LARGEST)


def _member(key: str, value: Any, branches: Branches) -> Any:
    if key in DATA:
        if key in ("const", "enum") and _CONTROL.search(json.dumps(value)):
            raise ValueError(f"{key}: control characters other than white space cannot be written")
        return value
    if key == "pattern" and isinstance(value, str):
        return portable(value, quoted=True)
    if key in _COUNTS and isinstance(value, float) and value.is_integer():
        return int(value)
    if key == "patternProperties":
        return value
    if key in NAMED and isinstance(value, Mapping):
        return {name: _inner(part, branches) for name, part in value.items()}
    return _inner(value, branches)


def _inner(schema: Any, branches: Branches) -> Any:
    return _exact(schema, Branches(None) if begins_document(schema) else branches)


def _of_names(pattern: str, others: Any) -> str:
    """Return a pattern of `patternProperties`; names that do not match it fall under `others`."""
    if others is False:
        return portable(pattern, quoted=True)
    wide = portable(pattern, quoted=True, wide=True)
    if not _allows_all(others):  # each name must match clearly or not at all
        end = re.sub(r"(?<!\\)\.\*$", "", pattern)
        if portable(end) != portable(end, wide=True):
            raise ValueError(
                f"patternProperties: names that match {pattern} in some engines only are neither these nor others; "
                "beside additionalProperties write [0-9] for \\d, and the like"
            )
    return wide
