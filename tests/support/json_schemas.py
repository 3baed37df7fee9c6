"""Random JSON Schemas by keyword: for each supported keyword, schemas with it, most of them with other keywords too."""

import json
from decimal import Decimal
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

Schemas = st.SearchStrategy[dict[str, Any]]

NAMES = st.sampled_from(["a", "b", "é", "a b", 'q"', "x1", ""])
NUMBERS = (
    st.integers(-2, 2)
    | st.integers(-50, 50)
    | st.sampled_from([0.5, -2.5, 1e-3, 1e-7, -0.25, 0.1, 99.99, 1e6, -1e15, 2**53, 1e20, 3.0, -0.0])
)
COUNTS = st.integers(0, 4)
PATTERNS = st.sampled_from(
    [
        "^a+$",
        "b",
        "^[a-z]{2}",
        "x|y$",
        r"\d{3}",
        r"^\w+@\w+$",
        r"^\S*$",
        ".",
        "^$",
        "[^a]",
        "^.{2,3}$",
        r"\s",
        r"^[^\s]+$",
        r"[\s,]",
        r"^\/",
        r"\bfoo\b",
        "(?i)ab",
        r"\u0041",
        r"[\d-]",
        r"\p{L}",
        r"^\x01$",
        "(?=a)",
        r"[\D\S]",
        r"^[^\d]\W$",
        "^[[:alpha:]a&&b]$",
    ]
)
FORMATS = st.sampled_from(
    [
        "date-time",
        "time",
        "date",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "uuid",
        "uri",
        "regex",
        "iri",
        "ours",
    ]
)
TYPES = st.sampled_from(["null", "boolean", "number", "integer", "string", "array", "object"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False, width=32)
    | st.text(max_size=6)
)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(NAMES, v, max_size=3), max_leaves=4)
PARTS = st.sampled_from(
    [
        {"type": "integer"},
        {"type": "string", "maxLength": 3},
        {"type": "boolean"},
        {"const": 1},
        {"type": "null"},
        {"type": "number"},
        True,
        {"enum": ["x", 2]},
    ]
)
CLOSED = PARTS | st.just(False)
NAMED = st.dictionaries(NAMES, PARTS, max_size=3)
SOME_NAMES = st.lists(NAMES, max_size=3, unique=True)


def _with(keyword: str, values: st.SearchStrategy[Any], types: str = "", **others: st.SearchStrategy[Any]) -> Schemas:
    if types:
        others["type"] = st.sampled_from(types.split())
    return st.fixed_dictionaries({keyword: values}, optional=others)


def _numbers(keyword: str, values: st.SearchStrategy[Any] = NUMBERS) -> Schemas:
    others = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"} - {keyword}
    return _with(keyword, values, "integer number", **dict.fromkeys(sorted(others), NUMBERS))


def _arrays(keyword: str, values: st.SearchStrategy[Any]) -> Schemas:
    others = {
        "items": CLOSED,
        "prefixItems": st.lists(PARTS, min_size=1, max_size=2),
        "minItems": COUNTS,
        "maxItems": COUNTS,
    }
    del others[keyword]
    return _with(keyword, values, "array", **others)


def _objects(keyword: str, values: st.SearchStrategy[Any]) -> Schemas:
    others = {
        "properties": NAMED,
        "required": SOME_NAMES,
        "additionalProperties": CLOSED,
        "patternProperties": st.dictionaries(PATTERNS, PARTS, max_size=1),
        "minProperties": COUNTS,
        "maxProperties": COUNTS,
    }
    del others[keyword]
    return _with(keyword, values, "object", **others)


_SIMPLE: dict[str, Schemas] = {
    "type": _with("type", TYPES | st.lists(TYPES, min_size=1, max_size=3, unique=True)),
    "enum": _with("enum", st.lists(VALUES, min_size=1, max_size=4), "string integer number object array"),
    "const": _with("const", VALUES, "string integer number"),
    "minimum": _numbers("minimum"),
    "maximum": _numbers("maximum"),
    "exclusiveMinimum": _numbers("exclusiveMinimum"),
    "exclusiveMaximum": _numbers("exclusiveMaximum"),
    "multipleOf": _numbers("multipleOf", st.sampled_from([1, 2, 3, 7, 10, 0.5, 0.1, 0.01, 2.5, 1e-5, 1e3, 12.34, 0.3])),
    "minLength": _with("minLength", COUNTS, "string", maxLength=COUNTS, pattern=PATTERNS),
    "maxLength": _with("maxLength", st.integers(0, 12), "string", minLength=COUNTS, pattern=PATTERNS, format=FORMATS),
    "pattern": _with("pattern", PATTERNS, "string", maxLength=st.integers(2, 8)),
    "format": _with("format", FORMATS, "string", maxLength=st.integers(5, 40), pattern=PATTERNS),
    "items": _arrays("items", CLOSED),
    "prefixItems": _arrays("prefixItems", st.lists(PARTS, min_size=1, max_size=3)),
    "minItems": _arrays("minItems", COUNTS),
    "maxItems": _arrays("maxItems", COUNTS),
    "properties": _objects("properties", NAMED),
    "required": _objects("required", SOME_NAMES),
    "additionalProperties": _objects("additionalProperties", CLOSED),
    "patternProperties": _objects("patternProperties", st.dictionaries(PATTERNS, PARTS, min_size=1, max_size=2)),
    "minProperties": _objects("minProperties", COUNTS),
    "maxProperties": _objects("maxProperties", COUNTS),
}
_ANY = st.one_of(*_SIMPLE.values())
_SEVERAL = st.lists(_ANY, min_size=1, max_size=3)
_REFERS: Schemas = st.just({"$ref": "#/$defs/d"})
BY_KEYWORD: dict[str, Schemas] = _SIMPLE | {
    "anyOf": _with("anyOf", _SEVERAL, "object string number", properties=NAMED),
    "oneOf": _with("oneOf", _SEVERAL, "object string number"),
    "allOf": _with("allOf", _SEVERAL, "object string number", additionalProperties=CLOSED),
    "$ref": st.builds(
        lambda defined, beside, below: {"$defs": {"d": defined}} | beside | below,
        _ANY,
        _ANY | st.just({}),
        _REFERS | _arrays("items", _REFERS),
    ),
}


def drawn(keyword: str, count: int) -> list[dict[str, Any]]:
    """This many schemas with this keyword, the same in every run."""
    found: list[dict[str, Any]] = []

    @settings(max_examples=count, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(BY_KEYWORD[keyword])
    def collect(schema: dict[str, Any]) -> None:
        found.append(schema)

    collect()
    return found[:count]


def read(text: str) -> Any:
    """Parse JSON with exact numbers: a validator could not check numbers rounded to infinity."""
    return json.loads(text, parse_float=_number, parse_constant=_refuse)


def _number(text: str) -> Decimal:
    digits, _, exponent = text.lower().partition("e")
    return Decimal(f"{digits}e{max(-9999, min(9999, int(exponent or 0)))}")  # the validator's limit


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is no JSON")
