"""Fields that constrain an answer's text, and their conversion to one grammar.

They are OpenAI's `response_format`, vLLM's `structured_outputs`, and vLLM's older `guided_*` names for these.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from server.errors import InvalidRequest
from server.messages.protocol import Grammar
from server.openai.body import Body, Items
from server.openai.closed_schema import closed

Schema = dict[str, Any]


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Body):
    """A named schema. It is enforced whether `strict` or not; if so, its objects are closed."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    schema_: Schema = Field({}, alias="schema")
    strict: bool = False


class JsonSchemaFormat(Body):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class TaggedStructure(Body):
    """A schema for the text between two tags."""

    begin: str = Field(min_length=1)
    schema_: Schema = Field({}, alias="schema")
    end: str


class StructuralTags(Body):
    """Free text in which a trigger begins a tag."""

    type: Literal["structural_tag"] = "structural_tag"
    structures: Items[TaggedStructure] = Field(min_length=1)
    triggers: Items[Annotated[str, Field(min_length=1)]] = Field(min_length=1)


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTags, Field(discriminator="type")
]
Choices = Annotated[Items[str], Field(min_length=1)]


class StructuredOutputs(Body):
    """vLLM's constraint; exactly one kind is given."""

    json_: Schema | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None  # Lark or GBNF
    json_object: bool = False
    structural_tag: StructuralTags | str | None = None
    whitespace_pattern: str | None = None  # regex of the white space between parts of JSON
    disable_any_whitespace: bool = False  # no effect: there is none without a pattern
    disable_fallback: bool = False


class ConstrainedBody(Body):
    """The fields of a body that constrain the answer."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    def requested_grammar(self) -> tuple[Grammar, str] | None:
        """Return the grammar and the name of its field. Raises `InvalidRequest` when there are several."""
        outputs = self.structured_outputs or StructuredOutputs.model_construct()
        whitespace = outputs.whitespace_pattern, self.guided_whitespace_pattern
        found = [
            *_from_response_format(self.response_format),
            *_from_kinds(
                "structured_outputs.",
                whitespace[0],
                json=outputs.json_,
                regex=outputs.regex,
                choice=outputs.choice,
                grammar=outputs.grammar,
                json_object=outputs.json_object or None,
                structural_tag=outputs.structural_tag,
            ),
            *_from_kinds(
                "guided_",
                whitespace[1],
                json=self.guided_json,
                regex=self.guided_regex,
                choice=self.guided_choice,
                grammar=self.guided_grammar,
            ),
        ]
        if len(found) > 1:
            names = " and ".join(f"`{param}`" for _, param in found)
            raise InvalidRequest(f"{names} both constrain the answer; give one.", param=found[1][1])
        if self.structured_outputs is not None and not found:
            raise InvalidRequest(
                "`structured_outputs` has no constraint; give one, such as `json`.", param="structured_outputs"
            )
        return found[0] if found else None


def _from_response_format(
    requested: TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTags | None,
) -> list[tuple[Grammar, str]]:
    match requested:
        case JsonObjectFormat():
            return [(Grammar("json_object", ""), "response_format")]
        case JsonSchemaFormat():
            given = requested.json_schema
            schema = closed(given.schema_) if given.strict else given.schema_
            return [(Grammar("json", json.dumps(schema)), "response_format.json_schema.schema")]
        case StructuralTags():
            return [(_tags(requested, "response_format"), "response_format")]
    return []


def _from_kinds(prefix: str, whitespace: str | None, **kinds: Any) -> list[tuple[Grammar, str]]:
    found = []
    for kind, value in kinds.items():
        if value is None:
            continue
        param = prefix + kind
        match kind:
            case "json":
                grammar = _json(value, whitespace, param)
            case "json_object":
                grammar = _json({"type": "object"}, whitespace, param) if whitespace else Grammar("json_object", "")
            case "choice":
                grammar = Grammar("choice", json.dumps(value))
            case "structural_tag":
                grammar = _tags(value, param)
            case _:
                grammar = Grammar("regex" if kind == "regex" else "lark", value)
        found.append((grammar, param))
    return found


def _json(schema: Schema | str, whitespace: str | None, param: str) -> Grammar:
    schema = _object(schema, param)
    if whitespace is not None:
        schema = schema | {"x-guidance": {"whitespace_pattern": whitespace}}
    return Grammar("json", json.dumps(schema))


def _tags(tags: StructuralTags | str, param: str) -> Grammar:
    if isinstance(tags, str):
        tags = StructuralTags.validate_object(_object(tags, param))
    for index, structure in enumerate(tags.structures):
        if not any(structure.begin.startswith(trigger) for trigger in tags.triggers):
            message = f"`structures.{index}.begin` begins with none of the `triggers`."
            raise InvalidRequest(message, param=f"{param}.structures.{index}.begin")
    return Grammar("structural_tag", tags.model_dump_json(by_alias=True))


def _object(value: Schema | str, param: str) -> Schema:
    """Return a JSON object that may be given as text. Raises `InvalidRequest`."""
    try:
        read = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise InvalidRequest(f"`{param}` is not valid JSON.", param=param) from None
    if not isinstance(read, dict):
        raise InvalidRequest(f"`{param}` must be a JSON object.", param=param)
    return read
