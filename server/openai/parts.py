"""Lists of objects that say in `type` what they are, and requests that are written as other requests."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any

from pydantic import BeforeValidator

from server.errors import InvalidRequest, LorakeetError, shown
from server.openai.body import Body

Kinds = Mapping[str, type[Body]]


def read_part(kinds: Kinds, value: Any, place: str, type_of: Callable[[Mapping[str, Any]], Any]) -> Any:
    """The object at this place of a body. Raises `InvalidRequest`, which names the field."""
    if not isinstance(value, dict):
        raise InvalidRequest(f"`{place}` must be an object.", param=place)
    kind = kinds.get(name) if isinstance(name := type_of(value), str) else None
    if kind is None:
        asked = f"`{shown(name)}` is not served" if isinstance(name, str) else "must be a string"
        message = f"`{place}.type`: {asked}; it may be {', '.join(kinds)}."
        raise InvalidRequest(message, param=f"{place}.type", code="unsupported_parameter")
    try:
        return kind.validate_object(value)
    except LorakeetError as error:
        raise moved(error, f"{place}.{error.param}" if error.param else place) from None


def parts(
    field: str,
    kinds: Kinds,
    of_text: Callable[[str], Body] | None = None,
    type_of: Callable[[Mapping[str, Any]], Any] = lambda part: part.get("type"),
) -> BeforeValidator:
    """Validates a field that is a list of such objects.

    Args:
        field: its name.
        of_text: the one object that a text in place of the list is; None: there must be a list.
        type_of: an object's type, where it may be missing.
    """

    def validate(value: Any) -> Any:
        if of_text is not None and isinstance(value, str):
            return [of_text(value)]
        if not isinstance(value, list):
            raise ValueError("must be a string or a list of objects" if of_text else "must be a list of objects")
        return [read_part(kinds, part, f"{field}.{i}", type_of) for i, part in enumerate(value)]

    kind: Any = list[reduce(or_, kinds.values())]  # type: ignore[misc]  # only the schema is made of it
    return BeforeValidator(validate, json_schema_input_type=str | kind if of_text else kind)


def moved(error: LorakeetError, param: str) -> LorakeetError:
    """The same refusal of another field."""
    error.message = error.message.replace(f"`{error.param}`", f"`{param}`")
    error.param = param
    return error


def renamed(error: LorakeetError, names: Sequence[tuple[str, str]]) -> LorakeetError:
    """A refusal of a field of the chat request that a body was written as, by its name in that body.

    Args:
        names: beginnings of fields, and their names there; the first that fits counts.
    """
    param = error.param or ""
    for ours, theirs in names:
        if param == ours or param.startswith(f"{ours}."):
            error.message = error.message.replace(f"`{ours}", f"`{theirs}")
            error.param = theirs + param[len(ours) :]
            break
    return error
