"""Greedy tokens by means of the head's screening copy: equal to the argmax of all logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from adapters import kernels
from server.engine.engine import Engine
from tests.support.offline import load_engine, make_resident, publish, request, run
from tests.support.tiny import tiny_adapter

if not kernels.runs_natively(torch.device("cpu"), torch.float32):
    pytest.skip("needs the C++ kernels", allow_module_level=True)

PROMPT = list(range(20, 60))


@pytest.fixture
def engine(model_dir: Path, cache_dir: Path) -> Engine:
    return load_engine(model_dir, cache_dir)


@pytest.fixture
def found(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows per step whose argmax was found without all logits."""
    rows: list[int] = []
    argmax = engine.runner.weights.argmax
    assert argmax is not None

    def counted(hidden: Tensor) -> Tensor:
        rows.append(len(hidden))
        return argmax(hidden)

    monkeypatch.setattr(engine.runner.weights, "argmax", counted)
    return rows


def test_tokens_are_those_of_all_logits(
    model_dir: Path, cache_dir: Path, engine: Engine, found: list[int], tmp_path: Path
) -> None:
    plain = load_engine(model_dir, cache_dir, sketch_head=False)
    assert plain.runner.weights.argmax is None
    references = [None, *(publish(engine, tiny_adapter(tmp_path / str(rank), model_dir, r=rank)) for rank in (4, 16))]
    make_resident(engine, filter(None, references))
    wish = {"max_tokens": 24, "logprobs": None}
    requests = [request(f"r{i}", PROMPT[i:], references[i % 3], **wish) for i in range(6)]
    assert run(engine, requests) == run(plain, requests)
    assert max(found) > 2


def test_drafts_have_rows_of_their_own(engine: Engine, found: list[int]) -> None:
    single = request("r", [5, 6] * 20, max_tokens=30, logprobs=None)
    [expected] = run(engine, [single]).values()
    assert set(found) == {1}
    [drafted] = run(engine, [replace(single, sampling=replace(single.sampling, speculative_tokens=4))]).values()
    assert max(found) > 1
    assert drafted.tokens == expected.tokens


@pytest.mark.parametrize(
    "wish",
    [
        {"logprobs": 0},
        {"temperature": 0.5},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"logit_bias": {5: 1.0}},
        {"prompt_logprobs": 0, "max_tokens": 1},
    ],
    ids=str,
)
def test_requests_that_need_logits_bypass_the_sketch(engine: Engine, found: list[int], wish: dict[str, Any]) -> None:
    run(engine, [request("r", PROMPT, **({"max_tokens": 4, "logprobs": None} | wish))])
    assert not found


def test_beside_one_that_wants_logits_greedy_ones_read_them_too(engine: Engine, found: list[int]) -> None:
    greedy = request("greedy", PROMPT, max_tokens=9, logprobs=None)
    alone = run(engine, [greedy])
    assert len(found) == 9
    found.clear()
    drawn = request("drawn", PROMPT, max_tokens=4, logprobs=None, temperature=0.8, seed=1)
    assert run(engine, [greedy, drawn])["greedy"].tokens == alone["greedy"].tokens
    assert len(found) == 5


def test_until_a_stop_is_allowed_its_logits_are_masked(engine: Engine, found: list[int]) -> None:
    [expected] = run(engine, [request("r", PROMPT, max_tokens=8, logprobs=None)]).values()
    found.clear()
    never = expected.tokens[0]
    wish: dict[str, Any] = {"min_tokens": 3, "stop_token_ids": [never], "max_tokens": 8, "logprobs": None}
    answer = run(engine, [request("r", PROMPT, **wish)])["r"]
    assert never not in answer.tokens[:3]
    assert len(found) == len(answer.tokens) - 3
