"""The int8 tier in the engine: close to the exact path, batch-invariant, error reported; refused for other bases."""

import asyncio
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.kernels import native
from adapters.peft_format.outline import Outline
from server.client.engine import LocalEngine
from server.engine import activations
from server.engine.engine import Engine
from server.engine.merge_builder import MergeBuilder
from server.messages.protocol import AdapterRef, EngineConfig, Generate, Merge, MergeReport
from server.model.base import UnservableModel
from tests.support import interpreter
from tests.support.offline import load_engine, publish, request, run, solo
from tests.support.tiny import tiny_adapter
from tests.sweep.families import tiny_family

pytestmark = [
    pytest.mark.skipif(interpreter.whole_suite(), reason="the tier is the C++ kernels'"),
    pytest.mark.skipif(native.load() is None, reason="needs the C++ kernels"),
]


@pytest.fixture(scope="module")
def adapter(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter(tmp_path_factory.mktemp("adapter"), model_dir)


def load_int8(model_dir: Path, cache_dir: Path, *, planned: bool = True) -> Engine:
    engine = load_engine(model_dir, cache_dir, planned=planned)
    activations.round_to_int8(engine, model_dir)
    return engine


def workload(adapter: AdapterRef) -> list[Generate]:
    draw = random.Random(0)
    return [
        request(
            f"r{i}",
            [draw.randrange(3, 500) for _ in range(draw.randrange(5, 90))],
            adapter if i % 2 else None,
            max_tokens=8 + i,
            temperature=0.8 * (i % 3 == 0),
            seed=i,
            logprobs=2,
        )
        for i in range(10)
    ]


def scores(engine: Engine, reference: AdapterRef | None = None) -> torch.Tensor:
    """Log-probability of each token of a fixed prompt."""
    engine.blocks.reset_cache()
    prompt = [7 * i % 500 + 3 for i in range(120)]
    answer = run(engine, [request("s", prompt, reference, max_tokens=1, prompt_logprobs=0)])["s"]
    return torch.tensor([entry.logprob for entry in answer.prompt_logprobs if entry])


def test_batched_equals_solo_bit_for_bit(model_dir: Path, cache_dir: Path, adapter: Path) -> None:
    engine = load_int8(model_dir, cache_dir)
    requests = workload(publish(engine, adapter))
    assert run(engine, requests, every=2) == solo(engine, requests)
    report = engine.inspect("x")
    assert report.free_blocks + report.cached_blocks == report.num_blocks, "the measurement freed its blocks"


@pytest.mark.parametrize("planned", [True, False])
def test_near_the_exact_path_and_says_how_far(planned: bool, model_dir: Path, cache_dir: Path, adapter: Path) -> None:
    exact = load_engine(model_dir, cache_dir, planned=planned)
    rounded = load_int8(model_dir, cache_dir, planned=planned)
    for reference in (None, publish(exact, adapter)):
        expected = scores(exact, reference)
        apart = (scores(rounded, reference) - expected).abs().mean()
        assert 1e-4 < apart < 0.1 * expected.std(), "this model is random and amplifies small differences"
    drift = rounded.ready().int8_drift
    assert drift is not None
    assert drift.positions > 200
    assert 1e-3 < drift.mean_kl < 0.3
    assert 0.7 < drift.greedy_agreement < 1
    assert exact.ready().int8_drift is None


@pytest.mark.parametrize(
    ("family", "left"),
    [
        ("mixtral", 0),
        ("qwen3_moe", 2),  # its experts have 32 inputs in their second linear
        ("gpt_oss", 0),  # uses the modules path
    ],
)
def test_experts_are_rounded_as_well(
    family: str, left: int, model_dir: Path, cache_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_family(family, tmp_path / family)
    shutil.copy(model_dir / "tokenizer.json", tmp_path / family)
    adapter = tiny_adapter(tmp_path / "adapter", tmp_path / family, target_modules=["q_proj", "o_proj"])
    exact, rounded = load_engine(tmp_path / family, cache_dir), load_engine(tmp_path / family, cache_dir)
    with caplog.at_level("INFO", "lorakeet.engine"):
        activations.round_to_int8(rounded, tmp_path / family)
    count = len(exact.base.linears) + len(exact.base.experts)
    assert f"int8 in {count - left} of {count} linears" in caplog.text
    assert sum(linear.weights.int8 is None for linear in rounded.runner.base.experts) == left
    assert all(linear.weights.int8 is None for linear in rounded.base.experts)
    requests = workload(publish(rounded, adapter))
    assert run(rounded, requests, every=2) == solo(rounded, requests)
    expected = scores(exact)
    assert 1e-5 < (scores(rounded) - expected).abs().mean() < 0.1 * expected.std()


def test_only_serving_is_rounded(model_dir: Path, cache_dir: Path) -> None:
    engine = load_engine(model_dir, cache_dir)
    before = scores(engine)
    activations.round_to_int8(engine, model_dir)
    assert not torch.equal(scores(engine), before)
    assert all(linear.weight.int8 is None for linear in engine.base.linears), "training uses exact weights"
    assert engine.base.digest() == engine.base_digest
    engine.runner.replace_base(engine.base)
    assert torch.equal(scores(engine), before)


@pytest.mark.usefixtures("forked_engines")
def test_the_process_measures_it_after_its_self_check(model_dir: Path, cache_dir: Path) -> None:
    config = EngineConfig(
        address="",
        model=str(model_dir),
        cache_dir=str(cache_dir),
        kv_cache_bytes=4 << 20,
        adapter_bytes=8 << 20,
        max_batch_tokens=64,
        max_batch_requests=16,
        threads=1,
        activations="int8",
    )

    async def drift() -> object:
        engine = LocalEngine(config, lambda stats: None)
        await engine.start()
        try:
            deadline = time.monotonic() + 60
            while engine.info is None:
                assert time.monotonic() < deadline, engine.unready_reason
                await asyncio.sleep(0.02)
            return engine.info.int8_drift
        finally:
            await engine.stop(grace=5)

    assert asyncio.run(drift()) == load_int8(model_dir, cache_dir).int8_drift


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dtype": "bfloat16"}, "float32 on a CPU"), ({"quantization": "none"}, "nf4 or fp4")],
)
def test_refused_for_another_base(change: dict[str, Any], message: str, model_dir: Path, cache_dir: Path) -> None:
    engine = load_engine(model_dir, cache_dir, **change)
    with pytest.raises(UnservableModel, match=f"--activations int8.*{message}"):
        activations.round_to_int8(engine, model_dir)


def test_refused_without_the_kernels(model_dir: Path, cache_dir: Path) -> None:
    engine = load_engine(model_dir, cache_dir)
    with native.switched_off(), pytest.raises(UnservableModel, match=r"--activations int8.*C\+\+ kernels"):
        activations.round_to_int8(engine, model_dir)


def test_linears_outside_a_merge_stay_int8(model_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    engine = load_int8(model_dir, cache_dir)
    reference = publish(engine, tiny_adapter(tmp_path, model_dir, target_modules=["q_proj"]))
    merging = MergeBuilder(engine, Outline.read(model_dir))
    merging.handle(Merge("m", reference, "bf16", [list(range(3, 40))]))
    while not (replies := merging.take_replies()):
        engine.step()
        if merging.ready:
            merging.run_piece()
    [report] = replies
    assert isinstance(report, MergeReport), report
    [merged] = engine.runner.merged.values()
    assert {linear.size.kind for linear in merged.base.linears if linear.weight.int8 is None} == {"q_proj"}
