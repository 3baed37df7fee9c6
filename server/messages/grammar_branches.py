"""Check that the branches of a `oneOf` exclude each other; llguidance can do so for few, and not behind references."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

_ALL = frozenset({"null", "boolean", "string", "array", "object", "integer", "fraction"})
_DEEPEST = 8
_STEPS = 10_000  # limit of comparisons, beyond which branches count as overlapping


class Branches:
    """Compares schemas of one document, in which references are resolved.

    Args:
        root: the document; None: references point into another one.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._steps = _STEPS

    def exclude_each_other(self, branches: Sequence[Any]) -> bool:
        """Whether no value matches two branches; False if uncertain."""
        return all(self._apart(a, b, _DEEPEST) for a, b in combinations(branches, 2))

    def _apart(self, a: Any, b: Any, depth: int) -> bool:
        self._steps -= 1
        if depth < 0 or self._steps < 0:
            return False
        a, b = self._resolved(a), self._resolved(b)
        kinds = self._kinds(a, depth) & self._kinds(b, depth)
        if not kinds:
            return True
        if not isinstance(a, Mapping) or not isinstance(b, Mapping):
            return False
        some, others = _values(a), _values(b)
        return (
            (some is not None and others is not None and some.isdisjoint(others))
            or any(self._apart_by_parts(one, other, depth - 1) for one, other in ((a, b), (b, a)))
            or (kinds == {"object"} and self._apart_by_members(a, b, depth - 1))
        )

    def _apart_by_parts(self, a: Mapping[str, Any], b: Any, depth: int) -> bool:
        if any(self._apart(part, b, depth) for part in _parts(a, "allOf")):
            return True
        return any(
            branches and all(self._apart(branch, b, depth) for branch in branches)
            for branches in (_parts(a, "anyOf"), _parts(a, "oneOf"))
        )

    def _apart_by_members(self, a: Mapping[str, Any], b: Mapping[str, Any], depth: int) -> bool:
        names = dict.fromkeys([*_parts(a, "required"), *_parts(b, "required")])
        return any(self._apart(_member(a, name), _member(b, name), depth) for name in names)

    def _kinds(self, schema: Any, depth: int) -> frozenset[str]:
        """Return the possible types of the schema's values."""
        schema = self._resolved(schema)
        if schema is False:
            return frozenset()
        if not isinstance(schema, Mapping) or depth < 0:
            return _ALL
        kinds = _ALL
        if "type" in schema:
            named = schema["type"]
            kinds &= {kind for each in ([named] if isinstance(named, str) else named) for kind in _of_type(each)}
        for values in _constants(schema):
            kinds &= {kind for value in values for kind in _of_value(value)}
        for part in _parts(schema, "allOf"):
            kinds &= self._kinds(part, depth - 1)
        for keyword in ("anyOf", "oneOf"):
            if branches := _parts(schema, keyword):
                kinds &= frozenset().union(*(self._kinds(branch, depth - 1) for branch in branches))
        return kinds

    def _resolved(self, schema: Any) -> Any:
        """Resolve a reference. Keywords beside `$ref` are left out, since some drafts ignore them."""
        for _ in range(_DEEPEST):
            if not isinstance(schema, Mapping) or "$ref" not in schema:
                return schema
            schema = self._at(schema["$ref"])
        return True

    def _at(self, reference: Any) -> Any:
        if not isinstance(reference, str) or not reference.startswith("#/") or "%" in reference:
            return True
        part = self._root
        for step in reference[2:].split("/"):
            if isinstance(part, list) and step.isdecimal() and int(step) < len(part):
                part = part[int(step)]
            elif isinstance(part, Mapping):
                part = part.get(step.replace("~1", "/").replace("~0", "~"), True)
            else:
                return True
            if begins_document(part):
                return True
        return part


def begins_document(schema: Any) -> bool:
    """Whether references in the schema are resolved in it alone."""
    return isinstance(schema, Mapping) and any(isinstance(schema.get(key), str) for key in ("$id", "id"))


def _parts(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    parts = schema.get(keyword)
    return parts if isinstance(parts, list) else []


def _member(schema: Mapping[str, Any], name: str) -> Any:
    """Return the schema of the member with this name."""
    members = schema.get("properties", {})
    if isinstance(members, Mapping) and name in members:
        return members[name]
    return not (schema.get("additionalProperties") is False and not schema.get("patternProperties"))


def _constants(schema: Mapping[str, Any]) -> Iterator[list[Any]]:
    if "const" in schema:
        yield [schema["const"]]
    if isinstance(schema.get("enum"), list):
        yield schema["enum"]


def _values(schema: Mapping[str, Any]) -> frozenset[str] | None:
    """Return the listed values in a canonical form; None if none are listed."""
    listed = [frozenset(_written(value) for value in values) for values in _constants(schema)]
    return frozenset.intersection(*listed) if listed else None


def _written(value: Any) -> str:
    def whole(part: Any) -> Any:
        if isinstance(part, float) and part.is_integer():
            return int(part)
        if isinstance(part, list):
            return [whole(each) for each in part]
        return {key: whole(each) for key, each in part.items()} if isinstance(part, dict) else part

    return json.dumps(whole(value), sort_keys=True)


def _of_type(name: Any) -> tuple[str, ...]:
    return ("integer", "fraction") if name == "number" else (name,)


def _of_value(value: Any) -> tuple[str, ...]:
    match value:
        case None:
            return ("null",)
        case bool():
            return ("boolean",)
        case str():
            return ("string",)
        case list():
            return ("array",)
        case dict():
            return ("object",)
    return ("integer", "fraction")
