"""For any body the response is well-formed, and never a fault of the server."""

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from server.http.routes.completions import CompletionBody
from server.openai.chat import ChatBody
from tests.support.scripted import BASE, serving

_NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.integers(-(2**70), 2**70),
    st.floats(-3, 3),
    st.floats(allow_nan=False, allow_infinity=False),
)
_SCALARS = st.one_of(st.none(), st.booleans(), _NUMBERS, st.text(max_size=20), st.just("text"))
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "x"]), "content": _VALUES}
    ),
    max_size=3,
)
_PROMPTS = st.one_of(st.text(max_size=40), st.lists(st.text(max_size=9), max_size=3), st.lists(st.integers(-1, 513)))
_NAMES = st.one_of(st.just(BASE), st.text(max_size=12), st.just("x@12345678"))


def _bodies(kind: type[ChatBody | CompletionBody], required: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A nearly valid body, with a few fields set to arbitrary values."""
    others = st.dictionaries(st.sampled_from([*kind.model_fields, *kind.no_ops, "extra"]), _VALUES, max_size=4)
    return st.builds(lambda base, more: base | more, st.fixed_dictionaries(required), others)


_REQUESTS = st.one_of(
    st.tuples(st.just("/v1/completions"), _bodies(CompletionBody, {"model": _NAMES, "prompt": _PROMPTS})),
    st.tuples(st.just("/v1/chat/completions"), _bodies(ChatBody, {"model": _NAMES, "messages": _MESSAGES})),
    st.tuples(
        st.just("/tokenize"),
        st.fixed_dictionaries({"prompt": _VALUES}) | st.fixed_dictionaries({"messages": _MESSAGES}),
    ),
    st.tuples(st.just("/detokenize"), st.fixed_dictionaries({"tokens": _VALUES})),
)


def test_no_body_is_a_fault_of_the_server() -> None:
    statuses = set()
    with tempfile.TemporaryDirectory() as directory, asyncio.Runner() as runner:
        application = serving(Path(directory))
        served = runner.run(application.__aenter__())

        @settings(max_examples=200, deadline=None)
        @given(_REQUESTS)
        def any_request(request: tuple[str, Any]) -> None:
            path, body = request
            response = runner.run(served.client.post(path, json=body))
            statuses.add(response.status_code)
            assert response.status_code < 500, response.text
            if response.status_code != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert (served.engine.running, served.services.admission.requests) == (set(), 0)

        any_request()
        runner.run(application.__aexit__(None, None, None))
    assert {200, 400, 404} <= statuses
