"""instructor: every mode that it offers for OpenAI's client, including old names; two of them use Responses."""

from collections.abc import Iterable
from typing import Literal

import instructor
import openai
import pytest
from instructor import Mode
from instructor.core.exceptions import IncompleteOutputException, InstructorRetryException
from instructor.utils.providers import Provider
from instructor.v2.core.provider_specs import PROVIDER_SPECS
from pydantic import BaseModel, ConfigDict, Field


class Bird(BaseModel):
    model_config = ConfigDict(extra="forbid")  # otherwise a small model keeps adding members
    name: str = Field(max_length=12)
    colour: Literal["red", "green"]


# Enforced by the request itself; the other modes only describe the shape in the prompt.
ENFORCED = [
    *(Mode.TOOLS, Mode.TOOLS_STRICT, Mode.FUNCTIONS, Mode.JSON_SCHEMA, Mode.JSON_O1),
    *(Mode.RESPONSES_TOOLS, Mode.RESPONSES_TOOLS_WITH_INBUILT_TOOLS),
]
ASKED = [Mode.JSON, Mode.MD_JSON, Mode.PARALLEL_TOOLS]


def client(api: str, mode: Mode) -> instructor.Instructor:
    return instructor.from_openai(openai.OpenAI(base_url=api, api_key="none", max_retries=0), mode=mode)


ASK = [{"role": "user", "content": "Name a bird."}]


def test_no_mode_is_left_out() -> None:
    spec = PROVIDER_SPECS[Provider.OPENAI]
    assert {*ENFORCED, *ASKED} == {*spec.supported_modes, *spec.legacy_modes}


@pytest.mark.parametrize("mode", ENFORCED)
def test_enforced_modes(api: str, model: str, mode: Mode) -> None:
    ask = client(api, mode).chat.completions
    answer = ask.create(model=model, messages=ASK, response_model=Bird, max_tokens=100, max_retries=0)
    assert isinstance(answer, Bird)


@pytest.mark.parametrize("mode", ASKED)
def test_asked_modes(api: str, model: str, mode: Mode) -> None:
    kind = Iterable[Bird] if mode is Mode.PARALLEL_TOOLS else Bird
    try:
        answer = client(api, mode).chat.completions.create(
            model=model, messages=ASK, response_model=kind, max_tokens=60, max_retries=1
        )
        assert isinstance(next(iter(answer)) if mode is Mode.PARALLEL_TOOLS else answer, Bird | tuple)
    except InstructorRetryException as fault:  # the answer did not match the schema; the request was accepted
        assert not isinstance(fault.__cause__, openai.APIStatusError), fault
        assert "Error code" not in str(fault)
    except IncompleteOutputException:  # the answer was cut short
        pass
    except TypeError as fault:  # parallel tools: no tool was called
        assert "NoneType" in str(fault)


def test_partial_streams(api: str, model: str) -> None:
    parts = client(api, Mode.TOOLS).chat.completions.create_partial(
        model=model, messages=ASK, response_model=Bird, max_tokens=100
    )
    *_, last = parts
    assert last.colour in ("red", "green")
