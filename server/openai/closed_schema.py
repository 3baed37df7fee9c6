"""Closing of JSON Schemas: objects have the members that the schema names, and no others.

By default JSON Schema allows any other member. For a function's arguments that is never meant: the client's function
fails on an unknown argument, and a small model invents more of them until the answer is cut off. OpenAI's strict
schemas must set `additionalProperties: false` everywhere.
"""

from collections.abc import Mapping
from typing import Any

from server.messages.grammar_schema import DATA, DEFINITIONS, NAMED, subschemas

Schema = Mapping[str, Any]

_ANNOTATIONS = {"title", "description", "$comment", "default", "examples", "deprecated", *DEFINITIONS}
# Keywords that make a value match several schemas: one may name members that another does not.
_JOINING = {"allOf", "oneOf", "if", "not", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef"}
_CHOOSING = {"anyOf", "$ref"}


def closed(schema: Schema) -> dict[str, Any]:
    """Return the schema with `additionalProperties: false` in each object that names members and does not set it.

    Every match of the result also matches `schema`. In a schema that combines parts (`allOf` and its like) only the
    outermost object is closed, since a part need not name all members of the whole.
    """
    parts = [part for _, part in subschemas(schema)]
    if any(_joins(part) for part in parts):
        return dict(schema) if any(part.get("$ref") == "#" for part in parts) else _object(schema)
    return _object(_closed(schema))


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = {}
    for key, value in schema.items():
        if key in DATA:
            made[key] = value
        elif key in NAMED and isinstance(value, Mapping):
            made[key] = {name: _closed(part) for name, part in value.items()}
        else:
            made[key] = _closed(value)
    return _object(made) if made.get("properties") else made


def _object(schema: Schema) -> dict[str, Any]:
    """Return the schema, closed if it describes an object that needs no other members."""
    named = schema.get("properties")
    speaks = schema.keys() & (_JOINING | _CHOOSING | {"additionalProperties", "unevaluatedProperties"})
    if not isinstance(named, Mapping) or speaks or "patternProperties" in schema:
        return dict(schema)
    required, least = schema.get("required", []), schema.get("minProperties", 0)
    wanted = {str(name) for name in required} if isinstance(required, list) else set()
    if wanted - named.keys() or not isinstance(least, int | float) or least > len(named):
        return dict(schema)
    return {**schema, "additionalProperties": False}


def _joins(schema: Schema) -> bool:
    """Whether a value must match this schema and another one."""
    others = schema.keys() - _ANNOTATIONS
    if "$ref" in schema and len(others) > 1:
        return True
    if "anyOf" in schema and others & {"properties", "patternProperties", "additionalProperties", "items"}:
        return True
    joining = others & _JOINING
    single = joining == others == {"allOf"} and isinstance(schema["allOf"], list) and len(schema["allOf"]) == 1
    return bool(joining) and not single
