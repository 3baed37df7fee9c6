"""A JSON object with known fields: the base of every request body."""

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

from server.errors import InvalidRequest


class Body(BaseModel):
    """A JSON object with known fields. Null means not given. No coercion.

    A field we do not have is refused by name, unless its value changes nothing (`no_ops`): clients send those.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if v is not None and not _same_as_one_of(v, cls.no_ops.get(k, ()))}

    @classmethod
    def validate_object(cls, data: Any) -> Self:
        """Plain data as this body."""
        if not isinstance(data, dict):
            raise InvalidRequest("The body must be a JSON object.")
        return cls.model_validate(data)


def _same_as_one_of(value: Any, candidates: tuple[Any, ...]) -> bool:
    """Equality of JSON values: 0 is not false and 1 is not 1.0."""
    return any(type(value) is type(candidate) and value == candidate for candidate in candidates)
