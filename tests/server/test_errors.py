"""Conversion of exceptions to the common error body."""

import pytest
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from adapters.peft_format.fields import AdapterError
from server import errors
from server.errors import EngineUnavailable, LorakeetError, as_error, error_response


def _classes(base: type[LorakeetError]) -> list[type[LorakeetError]]:
    return [base, *(found for child in base.__subclasses__() for found in _classes(child))]


@pytest.mark.parametrize("kind", _classes(LorakeetError), ids=lambda kind: kind.__name__)
def test_every_class_has_a_status_a_type_and_a_body(kind: type[LorakeetError]) -> None:
    error = kind.__new__(kind)
    LorakeetError.__init__(error, "What happened.", param="field")
    response = error_response(error)
    assert 400 <= response.status_code == kind.status < 600
    assert error.body()["error"] == {
        "message": "What happened.",
        "type": kind.type,
        "param": "field",
        "code": kind.default_code,
    }


@pytest.mark.parametrize(
    ("exc", "status", "code", "param"),
    [
        (errors.ModelNotFound("x"), 404, "model_not_found", "model"),
        (errors.InvalidApiKey(), 401, "invalid_api_key", None),
        (EngineUnavailable("It restarts.", retry_after=7), 503, "service_unavailable", None),
        (AdapterError("Rank 0.", "r", "bad_rank"), 400, "bad_rank", "r"),
        (HTTPException(418, "Tea."), 418, None, None),
        (RuntimeError("/secret"), 500, "internal_error", None),
    ],
)
def test_what_an_exception_stands_for(exc: Exception, status: int, code: str | None, param: str | None) -> None:
    error = as_error(exc)
    assert (error.status, error.code, error.param) == (status, code, param)
    assert "secret" not in error.message


def test_waiting_time_is_told() -> None:
    assert as_error(EngineUnavailable("It restarts.", retry_after=7)).headers["Retry-After"] == "7"
    assert errors.TooManyRequests("Full.", retry_after=3).headers["Retry-After"] == "3"


def test_a_validation_error_names_the_field_and_never_repeats_the_value() -> None:
    class Inner(BaseModel):
        number: int

    class Outer(BaseModel):
        items: list[Inner]

    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"items": [{"number": 1}, {"number": "a whole secret prompt"}]})
    error = as_error(caught.value)
    assert error.param == "items.1.number"
    assert "items.1.number" in error.message
    assert "secret" not in error.message


def test_clients_text_in_messages_is_short_and_printable() -> None:
    message = errors.ModelNotFound("a\n\x1b[31m" + "x" * 10_000).message
    assert message.isprintable()
    assert len(message) < 300
