"""The base class of request bodies: a JSON object with known fields."""

from functools import cache
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import CoreSchema

from server.errors import InvalidRequest, invalid_body

K = TypeVar("K")
T = TypeVar("T")


def _validate_each(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Validate entries one at a time, since pydantic would check all of them and collect every error."""
    if not isinstance(value, dict):
        return validate(value)
    return {name: item for pair in value.items() for name, item in validate(dict([pair])).items()}


class _HashableFailFast(FailFast):
    """Hashable variant: members of a union must be hashable."""

    __hash__ = object.__hash__


# Lists and maps of a body. Validation ends at the first error: a response names one, and there may be a million.
Items = Annotated[list[T], _HashableFailFast()]
Entries = Annotated[dict[K, T], WrapValidator(_validate_each)]


def _metadata(value: dict[str, str]) -> dict[str, str]:
    if len(value) > 16:
        raise ValueError("at most 16 pairs are accepted")
    if any(len(key) > 64 or len(text) > 512 for key, text in value.items()):
        raise ValueError("a key has at most 64 characters and a value at most 512")
    return value


Metadata = Annotated[Entries[str, str], AfterValidator(_metadata)]
Label = Annotated[str, Field(max_length=4096)]  # a client's own label, which a response may repeat


class Body(BaseModel):
    """A JSON object with known fields. Null means not given. No coercion.

    An unknown field is refused by name, except a value that changes nothing (`no_ops`) and fields without effect:
    annotations of clients or other servers that the model never sees (`ignored_fields`).
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {}
    ignored_fields: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_no_ops(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given: dict[str, Any] = {}
        # Locals, since there may be thousands of such objects.
        fields, no_ops, ignored = _names(cls), cls.no_ops, cls.ignored_fields
        for name, value in data.items():
            if value is None or name in ignored or (name in no_ops and _same_as_one_of(value, no_ops[name])):
                continue
            given[name] = value
            if name not in fields:  # one is enough for the error, and there may be a million
                return given | {known: data[known] for known in fields if data.get(known) is not None}
        return given

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the schema of accepted input: fields, null for those with a default, and no-op fields."""
        schema = handler(core_schema)
        described = handler.resolve_ref_schema(schema)
        required = described.get("required", ())
        properties = described.get("properties", {})
        described["properties"] = {
            name: property_ if name in required else _nullable(property_) for name, property_ in properties.items()
        } | {name: {"enum": [*values, None], "deprecated": True} for name, values in cls.no_ops.items()}
        described["properties"] |= {name: {"deprecated": True} for name in sorted(cls.ignored_fields)}
        described["additionalProperties"] = {"type": "null"}
        return schema

    @classmethod
    def validate_object(cls, data: Any) -> Self:
        """Validate plain data as this body. Raises InvalidRequest."""
        if not isinstance(data, dict):
            raise InvalidRequest("The body must be a JSON object.")
        try:
            return cls.model_validate(data)
        except ValidationError as fault:
            raise invalid_body(fault, data) from None


@cache
def _names(kind: type[Body]) -> frozenset[str]:
    """The JSON names of a body's fields."""
    return frozenset(field.alias or name for name, field in kind.__pydantic_fields__.items())


class PromptCacheOptions(Body):
    """Prompt caching options. They change nothing: all prompts are cached while there is room."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {"prewarm": (False,)}

    mode: Label | None = None
    ttl: Label | None = None


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    null = {"type": "null"}
    if null in schema.get("anyOf", ()):
        return schema
    outer = {key: schema[key] for key in ("default", "description") if key in schema}
    inner = {key: value for key, value in schema.items() if key not in outer}
    return {"anyOf": [*inner.get("anyOf", [inner]), null]} | outer


def _same_as_one_of(value: Any, candidates: tuple[Any, ...]) -> bool:
    """Whether a JSON value equals a candidate: 0 is not false and 1 is not 1.0."""
    return any(type(value) is type(candidate) and value == candidate for candidate in candidates)
