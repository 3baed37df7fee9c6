"""Bodies of all endpoints: unknown fields are refused at any level, and faults are named by their path in the body."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from server.anthropic.body import MessageBody
from server.errors import InvalidRequest
from server.openai.body import Body
from server.openai.chat import ChatBody
from server.openai.response_body import ResponseBody
from server.openai.training_body import JobBody


def kinds(kind: type[Body] = Body) -> Iterator[type[Body]]:
    """All bodies with fields, and parts of bodies with fields."""
    for each in kind.__subclasses__():
        if each.__module__.startswith("server."):
            yield each
        yield from kinds(each)


@pytest.mark.parametrize("kind", sorted(set(kinds()), key=str), ids=lambda kind: kind.__name__)
def test_an_unknown_field_is_refused_whatever_stands_before_it(kind: type[Body]) -> None:
    names = [field.alias or name for name, field in kind.model_fields.items()]
    with pytest.raises((ValidationError, InvalidRequest)) as caught:
        kind.model_validate({name: _Never() for name in names} | {"unknown": 1})
    assert isinstance(caught.value, ValidationError), caught.value
    assert ("unknown",) in [fault["loc"] for fault in caught.value.errors()]


class _Never:
    """A value that no field accepts."""


CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
RESPONSE: dict[str, Any] = {"model": "m", "input": "Hi"}
JOB: dict[str, Any] = {"model": "m", "training_file": "f"}
MESSAGE = CHAT | {"max_tokens": 5}
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {}}}
FAULTS: list[tuple[type[Body], dict[str, Any], str, str]] = [
    (ChatBody, CHAT | {"guided_json": 5}, "guided_json", "an object or a valid string"),
    (ChatBody, CHAT | {"stop": 5}, "stop", "string"),
    (ChatBody, CHAT | {"response_format": SCHEMA}, "response_format.json_schema.name", "required"),
    (ChatBody, CHAT | {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    (ChatBody, CHAT | {"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema", ""),
    (ChatBody, CHAT | {"response_format": {"type": "grammar"}}, "response_format", "json_schema"),
    (ChatBody, CHAT | {"tool_choice": "any"}, "tool_choice", "required"),
    (ChatBody, CHAT | {"tool_choice": {"type": "mcp"}}, "tool_choice", "allowed_tools"),
    (ChatBody, CHAT | {"tool_choice": {"type": ["function"]}}, "tool_choice", "allowed_tools"),
    (ChatBody, CHAT | {"tool_choice": {"type": "function", "name": "f"}}, "tool_choice.function", "required"),
    (ChatBody, CHAT | {"structured_outputs": {"json": 5}}, "structured_outputs.json", "object or a valid string"),
    (ChatBody, CHAT | {"logit_bias": {"x": 1}}, "logit_bias", "token id"),
    (ResponseBody, RESPONSE | {"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name", "requ"),
    (ResponseBody, RESPONSE | {"tool_choice": {"type": "allowed_tools"}}, "tool_choice.mode", "required"),
    (JobBody, JOB | {"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "greater than"),
    (JobBody, JOB | {"hyperparameters": {"n_epochs": "3"}}, "hyperparameters.n_epochs", "'auto' or a valid integer"),
    (JobBody, JOB | {"lora": {"target_modules": [5]}}, "lora.target_modules.0", "string"),
    (MessageBody, MESSAGE | {"output_config": {"format": {"type": "x"}}}, "output_config.format.type", ""),
]


@pytest.mark.parametrize(("kind", "body", "param", "said"), FAULTS, ids=[str(fault[1])[-60:] for fault in FAULTS])
def test_a_fault_is_named_by_its_place_in_the_body(
    kind: type[Body], body: dict[str, Any], param: str, said: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        kind.validate_object(body)
    assert caught.value.param == param
    assert f"`{param}`" in caught.value.message
    assert said in caught.value.message
