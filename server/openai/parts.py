"""Lists of objects with a `type`, and errors of a request that was converted to a chat request."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

from pydantic import BeforeValidator

from server.errors import InvalidRequest, LorakeetError, printable
from server.openai.body import Body

Kinds = Mapping[str, type[Body]]


def read_part(kinds: Kinds, value: Any, place: str, type_of: Callable[[Mapping[str, Any]], Any]) -> Any:
    """Validate the object at this place of a body. Raises `InvalidRequest`, which names the field."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"`{place}` must be an object.", param=place)
    kind = kinds.get(name) if isinstance(name := type_of(value), str) else None
    if kind is None:
        problem = f"`{printable(name)}` is not served" if isinstance(name, str) else "must be a string"
        message = f"`{place}.type`: {problem}; it may be {', '.join(kinds)}."
        raise InvalidRequest(message, param=f"{place}.type", code="unsupported_parameter")
    try:
        return kind.validate_object(value)
    except LorakeetError as error:
        raise with_param(error, f"{place}.{error.param}" if error.param else place) from None


def parts(
    field: str,
    kinds: Kinds,
    of_text: Callable[[str], Body] | None = None,
    type_of: Callable[[Mapping[str, Any]], Any] = lambda part: part.get("type"),
) -> BeforeValidator:
    """Return a validator for a field that is a list of objects with a `type`.

    Args:
        field: its name.
        of_text: converts a text given in place of the list to its only object; None: a list is required.
        type_of: returns an object's type, where `type` may be missing.
    """

    def validate(value: Any) -> Any:
        if of_text is not None and isinstance(value, str):
            return [of_text(value)]
        if not isinstance(value, list):
            raise ValueError("must be a string or a list of objects" if of_text else "must be a list of objects")
        return [read_part(kinds, part, f"{field}.{i}", type_of) for i, part in enumerate(value)]

    kind: Any = list[reduce(or_, kinds.values())]  # type: ignore[misc]  # used for the schema only
    return BeforeValidator(validate, json_schema_input_type=str | kind if of_text else kind)


def with_param(error: LorakeetError, param: str) -> LorakeetError:
    """Return the error with another field name."""
    error.message = error.message.replace(f"`{error.param}`", f"`{param}`")
    error.param = param
    return error


def with_renamed_param(error: LorakeetError, names: Sequence[tuple[str, str]]) -> LorakeetError:
    """Return a chat request's error with the field name of the body that it was converted from.

    Args:
        names: prefixes of the chat request's fields, and their names in the body; the first match counts.
    """
    param = error.param or ""
    for source, target in names:
        if param == source or param.startswith(f"{source}."):
            error.message = error.message.replace(f"`{source}", f"`{target}")
            error.param = target + param[len(source) :]
            break
    return error
