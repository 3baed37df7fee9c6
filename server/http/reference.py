"""The OpenAPI document as one page of HTML without scripts or external resources."""

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment
from markupsafe import Markup, escape

Schema = dict[str, Any]


@dataclass(frozen=True)
class Field:
    """A parameter, a field of a body, or a part of a form."""

    name: str
    place: str  # path, query, header, body or form
    kind: Markup
    default: str  # JSON; empty: no default
    required: bool
    text: str


@dataclass(frozen=True)
class Entry:
    """An operation."""

    method: str
    path: str
    summary: str
    text: str
    fields: list[Field]
    answers: list[tuple[str, Markup, str]]  # status, type, description
    curl: str


def html(document: Schema) -> str:
    """Render the page."""
    return _HTML.render(_contents(document), style=Markup(_STYLE))


def _contents(document: Schema) -> dict[str, Any]:
    entries: dict[str, list[Entry]] = {tag["name"]: [] for tag in document["tags"]}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            entries[operation["tags"][0]].append(_entry(document, path, method.upper(), operation))
    components = document["components"]["schemas"]
    objects = {name: (schema.get("description", ""), _fields(schema, "body")) for name, schema in components.items()}
    return {"info": document["info"], "tags": document["tags"], "entries": entries, "objects": objects}


def _entry(document: Schema, path: str, method: str, operation: Schema) -> Entry:
    fields = [
        Field(p["name"], p["in"], _kind(p["schema"]), *_default(p["schema"], p), p.get("description", ""))
        for p in operation["parameters"]
    ]
    content = operation.get("requestBody", {}).get("content", {})
    for media_type, body in content.items():
        for schema in _alternatives(document, body["schema"]):
            fields += _fields(schema, "form" if media_type.startswith("multipart") else "body")
    answers = [
        (status, _answer(response["content"]), response["description"])
        for status, response in operation["responses"].items()
    ]
    curl = _curl(document, path, method, operation, content)
    return Entry(method, path, operation["summary"], operation.get("description", ""), fields, answers, curl)


def _fields(schema: Schema, place: str) -> list[Field]:
    required = schema.get("required", ())
    return [
        Field(name, place, _kind(kind), *_default(kind, {"required": name in required}), kind.get("description", ""))
        for name, kind in schema.get("properties", {}).items()
        if not kind.get("deprecated")
    ]


def _default(schema: Schema, owner: Schema) -> tuple[str, bool]:
    default = json.dumps(schema["default"]) if schema.get("default") is not None else ""
    return default, owner.get("required", False)


def _answer(content: Schema) -> Markup:
    kinds = [
        Markup("{}: {}").format(media_type, _kind(body["schema"]["properties"]["data"]["contentSchema"]))
        if media_type == "text/event-stream"
        else _kind(body["schema"])
        if "schema" in body
        else escape(media_type)
        for media_type, body in content.items()
    ]
    return Markup(" or ").join(kinds)


def _kind(schema: Schema) -> Markup:
    """Describe a schema in words: `integer, 1 to 128`, `list of string`."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return Markup('<a href="#{0}">{0}</a>').format(name)
    if "anyOf" in schema:
        return Markup(" or ").join(_kind(kind) for kind in schema["anyOf"] if kind != {"type": "null"})
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return escape(" or ".join(json.dumps(value) for value in values if value is not None))
    match schema.get("type"):
        case "array":
            return Markup("list of {}").format(_kind(schema["items"])) if schema.get("items") else Markup("list")
        case "object":
            values = schema.get("additionalProperties") or next(
                iter(schema.get("patternProperties", {}).values()), None
            )
            return Markup("object of {}").format(_kind(values)) if isinstance(values, dict) else Markup("object")
        case kind:
            return escape(", ".join([kind or "anything", *_limits(schema)]))


def _limits(schema: Schema) -> Iterator[str]:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None:
        yield f"{low} to {high}"
    elif low is not None:
        yield f"at least {low}"
    elif high is not None:
        yield f"at most {high}"
    if "exclusiveMinimum" in schema:
        yield f"more than {schema['exclusiveMinimum']}"
    if "exclusiveMaximum" in schema:
        yield f"less than {schema['exclusiveMaximum']}"
    if "maxLength" in schema:
        yield f"at most {schema['maxLength']} {'bytes' if 'contentMediaType' in schema else 'characters'}"


def _alternatives(document: Schema, schema: Schema) -> list[Schema]:
    if "anyOf" in schema:
        return [kind for other in schema["anyOf"] for kind in _alternatives(document, other)]
    if "$ref" in schema:
        return [document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]]
    return [schema]


def _curl(document: Schema, path: str, method: str, operation: Schema, content: Schema) -> str:
    url = "http://127.0.0.1:8000" + path.replace("{", "").replace("}", "").replace("/name", "/NAME").replace(
        "/id", "/ID"
    )
    words = ["curl", *([] if method in ("GET", "POST") else ["-X", method]), url]
    if document.get("security") and operation.get("security") != []:
        words += ["-H", "Authorization: Bearer $LORAKEET_API_KEY"]
    if form := content.get("multipart/form-data"):
        for name in form["schema"]["required"]:
            file = "contentMediaType" in form["schema"]["properties"][name]
            words += ["-F", f"{name}=@{name.upper()}" if file else f"{name}={name.upper()}"]
    elif body := content.get("application/json"):
        (first, *_) = _alternatives(document, body["schema"])
        words += ["-H", "Content-Type: application/json", "-d", json.dumps(_example(document, first))]
    elif method == "POST":
        words[1:1] = ["-X", "POST"]
    return " ".join(f'"{word}"' if "$" in word else shlex.quote(word) for word in words)


def _example(document: Schema, schema: Schema, name: str = "...") -> Any:
    """Return a minimal value that the schema allows."""
    (first, *_) = _alternatives(document, schema)
    if "enum" in first or "const" in first:
        return first.get("const", first.get("enum", [None])[0])
    match first.get("type"):
        case "array":
            return [_example(document, first["items"], name)]
        case "object":
            required = first.get("required", ())
            return {key: _example(document, first["properties"][key], key.upper()) for key in required}
        case "integer" | "number":
            return first.get("minimum", 1)
        case "boolean":
            return True
    return name


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
pre, code, td:first-child { font-family: ui-monospace, monospace; font-size: 0.9em }
pre { background: #8881; padding: 0.7rem; overflow-x: auto; white-space: pre-wrap }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: 0.2rem 0.6rem }
tr { border-top: 1px solid #8884 }
summary { cursor: pointer }
h3 { margin-top: 2.5rem }
:root { color-scheme: light dark }
"""

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; style-src 'sha256-"
    + base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
    + "'"
)


def _prose(text: str) -> Markup:
    """Escape a text and mark its code, quoted in backticks."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


_ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters["prose"] = _prose
_HTML = _ENVIRONMENT.from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ info.title }} API</title>
<meta name="viewport" content="width=device-width"><style>{{ style }}</style></head><body>
<h1>{{ info.title }} {{ info.version }}</h1>
<p>{{ info.description | prose }}</p>
<p>For programs: <a href="openapi.json">openapi.json</a>.</p>
{% macro table(fields, places) %}
<table><tr><th>Name</th>{% if places %}<th>In</th>{% endif %}<th>Type</th><th>Default</th></tr>
{% for field in fields %}
<tr><td>{{ field.name }}</td>{% if places %}<td>{{ field.place }}</td>{% endif %}<td>{{ field.kind }}
{%- if field.text %}<br>{{ field.text | prose }}{% endif %}</td>
<td>{{ "required" if field.required else field.default }}</td></tr>
{% endfor %}
</table>
{% endmacro %}
{% for tag in tags %}
<h2 id="{{ tag.name }}">{{ tag.name }}</h2>
<p>{{ tag.description | prose }}</p>
{% for entry in entries[tag.name] %}
<h3>{{ entry.method }} {{ entry.path }}</h3>
<p>{{ entry.summary | prose }}</p>
{% if entry.text %}<p>{{ entry.text | prose }}</p>{% endif %}
{% if entry.fields %}{{ table(entry.fields, true) }}{% endif %}
<pre>{{ entry.curl }}</pre>
<details><summary>Answers</summary><table>
{% for status, kind, text in entry.answers %}
<tr><td>{{ status }}</td><td>{{ kind }}</td><td>{{ text | prose }}</td></tr>
{% endfor %}
</table></details>
{% endfor %}
{% endfor %}
<h2>Objects</h2>
{% for name, (text, fields) in objects.items() %}
<h3 id="{{ name }}">{{ name }}</h3>
{% if text %}<p>{{ text | prose }}</p>{% endif %}
{% if fields %}{{ table(fields, false) }}{% endif %}
{% endfor %}
</body></html>
""")
