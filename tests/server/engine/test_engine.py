"""Limits and faults of the engine not covered by other tests."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from adapters.device.host import host_adapter
from server.engine.engine import Engine
from server.messages.protocol import AdapterRef
from server.model.base import UnservableModel
from tests.support.offline import load_engine, request, run
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def engine(model_dir: Path, cache_dir: Path) -> Engine:
    return load_engine(model_dir, cache_dir)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_batch_tokens": 16, "max_batch_requests": 16}, "--max-batch-tokens"),
        ({"kv_cache_bytes": 1000}, "--kv-cache-bytes"),
        ({"adapter_bytes": 100}, "--adapter-bytes"),
        ({"kv_cache_bytes": 1 << 18, "max_model_len": 500}, "--max-model-len"),
    ],
)
def test_settings_that_cannot_work_are_named(
    settings: dict[str, Any], named: str, model_dir: Path, cache_dir: Path
) -> None:
    with pytest.raises(UnservableModel, match=named):
        load_engine(model_dir, cache_dir, **settings)


def test_a_small_cache_shortens_the_context(model_dir: Path, cache_dir: Path) -> None:
    engine = load_engine(model_dir, cache_dir, kv_cache_bytes=1 << 18)
    assert engine.ready().max_model_len == engine.blocks.num_blocks * 16 < 512


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.5] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 96,
    },
}


@pytest.mark.parametrize(
    ("rope", "longest"), [("linear", 512), ("yarn", 512), ("dynamic", 128), ("longrope", 96), ("longrope", 128)]
)
def test_the_context_is_what_rope_allows(rope: str, longest: int, cache_dir: Path, tmp_path: Path) -> None:
    """Longrope uses its short factors below the original length, and its long ones above."""
    parameters = {"rope_type": rope, "rope_theta": 1e4} | ROPES[rope]
    model = tiny_model(tmp_path / "m", rope_parameters=parameters, max_position_embeddings=128)
    if longest != 96:
        with pytest.raises(UnservableModel, match=rf"--max-model-len {longest + 1} is more than the {longest}.*{rope}"):
            load_engine(model, cache_dir, max_model_len=longest + 1)
    engine = load_engine(model, cache_dir, max_model_len=longest, quantization="none")
    assert engine.ready().max_model_len == longest
    if longest == 96:
        assert load_engine(model, cache_dir, quantization="none").ready().max_model_len == 96
    prompt = [3 + 7 * i % 500 for i in range(longest - 4)]
    answer = run(engine, [request("a", prompt, max_tokens=4, prompt_logprobs=0)])["a"]
    stock = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([[*prompt, *answer.tokens]])
    with torch.no_grad():
        scores = stock(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    given = [entry.logprob for entry in [*answer.prompt_logprobs, *answer.logprobs] if entry is not None]
    assert torch.allclose(torch.tensor(given), scores, atol=1e-3)


def test_a_context_beyond_the_positions_is_an_error_not_a_cut(model_dir: Path, cache_dir: Path) -> None:
    with pytest.raises(UnservableModel, match=r"--max-model-len 513 is more than the 512.*max_position_embeddings 512"):
        load_engine(model_dir, cache_dir, max_model_len=513)


def test_a_request_that_overflows_fails_alone(engine: Engine) -> None:
    huge = {
        linear.name: (torch.full((1, linear.in_features), 1e30), torch.full((linear.out_features, 1), 1e30), 1.0)
        for linear in engine.base.linears
    }
    overflowing = host_adapter("sha256:huge", huge, torch.float32)
    engine.adapter_cache.insert(overflowing)
    reference = AdapterRef(overflowing.digest, "")
    plain = [request(f"plain{i}", range(20 + i, 60), max_tokens=8) for i in range(3)]
    expected = run(engine, plain)
    engine.blocks.reset_cache()
    answers = run(engine, [plain[0], request("bad", range(20, 60), reference), *plain[1:]])
    bad = answers.pop("bad")
    assert bad.code == "non_finite_logits"
    assert bad.tokens == []
    assert answers == expected


def test_blocks_full_of_nan_do_no_harm(engine: Engine) -> None:
    plain = [request(f"plain{i}", range(20 + i, 60), max_tokens=8) for i in range(3)]
    engine.blocks.reset_cache()
    expected = run(engine, plain)
    engine.blocks.reset_cache()
    for cache in (*engine.cache.k, *engine.cache.v):
        cache.fill_(torch.nan)
    assert run(engine, plain) == expected


def test_an_aborted_request_costs_nothing_from_the_next_step_on(engine: Engine) -> None:
    engine.add(request("gone", range(20, 60), max_tokens=100))
    engine.add(request("stays", range(30, 60), max_tokens=5))
    engine.step()
    engine.abort("gone")
    _, stats = engine.step()
    assert stats.step_requests == 1
    while not engine.idle:
        engine.step()
    assert engine.blocks.counts.used == 0


def test_min_tokens_max_tokens_and_eos(engine: Engine) -> None:
    prompt = range(20, 40)
    free = run(engine, [request("a", prompt, max_tokens=30)])["a"].tokens
    stop = free[3]
    first = free.index(stop)
    stopped = run(engine, [request("b", prompt, max_tokens=30, stop_token_ids=[stop])])["b"]
    assert stopped.tokens == free[: first + 1]
    assert stopped.finish_reason == "stop"
    longer = run(engine, [request("c", prompt, max_tokens=30, min_tokens=first + 3, stop_token_ids=[stop])])["c"]
    assert stop not in longer.tokens[: first + 3]
    nothing = run(engine, [request("d", prompt, max_tokens=0, prompt_logprobs=2)])["d"]
    assert (nothing.tokens, nothing.finish_reason) == ([], "length")
    assert len(nothing.prompt_logprobs) == 20
