"""A request's output never depends on other requests, chunking, preemption, or the cache."""

import random
from pathlib import Path

import pytest
import torch

from server.engine.engine import Engine
from server.messages.protocol import AdapterRef, Generate
from tests.support import interpreter
from tests.support.offline import Answer, load_engine, make_resident, publish, request, run, solo, tight_engine
from tests.support.tiny import tiny_adapter

pytestmark = pytest.mark.usefixtures("two_threads")

RANKS = (3, 4, 8, 8, 16, 17, 32, 64)


@pytest.fixture(scope="module")
def adapters(shallow_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    kinds = (torch.float32, torch.bfloat16)
    return [
        tiny_adapter(root / str(i), shallow_dir, seed=i, r=rank, dtype=kinds[i % 2]) for i, rank in enumerate(RANKS)
    ]


def workload(references: list[AdapterRef], max_tokens: int = 12, longest: int = 120) -> list[Generate]:
    """16 requests over 8 adapters, of mixed lengths, half greedy and half sampled; fewer for the interpreter."""
    draw = random.Random(0)
    count = 16
    if interpreter.whole_suite():
        count, max_tokens, longest = 8, max_tokens // 4, longest // 2
    return [
        request(
            f"r{i}",
            [draw.randrange(3, 500) for _ in range(draw.randrange(5, longest))],
            references[i % len(references)],
            max_tokens=max_tokens + i,
            temperature=0.0 if i % 2 else 0.9,
            seed=i,
            logprobs=3,
        )
        for i in range(count)
    ]


def settle(engine: Engine) -> None:
    """Check that an idle engine accounts for all blocks and rows."""
    report = engine.inspect("x")
    assert report.free_blocks + report.cached_blocks == report.num_blocks
    for kind, capacity in engine.pool.capacity.items():
        assert report.free_rows[kind] + report.resident_rows[kind] == capacity
    assert report.base_digest == engine.base_digest


def test_batched_equals_solo_bit_for_bit(shallow_dir: Path, cache_dir: Path, adapters: list[Path]) -> None:
    alone = load_engine(shallow_dir, cache_dir)
    references = [publish(alone, directory) for directory in adapters]
    expected = solo(alone, workload(references))
    together = load_engine(shallow_dir, cache_dir)
    joined = run(together, workload(references), every=2)
    assert joined == expected
    assert {answer.finish_reason for answer in joined.values()} == {"length"}
    settle(together)


def test_preemption_and_small_chunks_change_nothing(shallow_dir: Path, cache_dir: Path, adapters: list[Path]) -> None:
    alone = load_engine(shallow_dir, cache_dir)
    references = [publish(alone, directory) for directory in adapters]
    expected = solo(alone, workload(references, max_tokens=40, longest=40))
    blocks, longest = (3, 48) if interpreter.whole_suite() else (24, 256)
    tight = tight_engine(alone, shallow_dir, cache_dir, blocks, longest)
    make_resident(tight, references)
    preemptions = 0
    queue = workload(references, max_tokens=40, longest=40)
    answers = {single.id: Answer() for single in queue}
    for single in queue:
        tight.add(single)
    while not tight.idle:
        outputs, stats = tight.step()
        preemptions += stats.preemptions
        for output in outputs:
            answers[output.id].take(output)
    assert preemptions > 0
    assert answers == expected
    settle(tight)


def test_cache_hits_change_nothing(shallow_dir: Path, cache_dir: Path, adapters: list[Path]) -> None:
    engine = load_engine(shallow_dir, cache_dir)
    first, second = (publish(engine, directory) for directory in adapters[:2])
    prompt = [random.Random(5).randrange(3, 500) for _ in range(100)]
    cold = run(engine, [request("a", prompt, first, max_tokens=8)])["a"]
    warm = run(engine, [request("a", prompt, first, max_tokens=8)])["a"]
    assert cold.cached_tokens == 0
    assert warm.cached_tokens == 96
    assert (warm.tokens, warm.logprobs) == (cold.tokens, cold.logprobs)
    other = run(engine, [request("a", prompt, second, max_tokens=8)])["a"]
    assert other.cached_tokens == 0, "keys and values of another adapter are not reused"
    base = run(engine, [request("a", prompt, None, max_tokens=8)])["a"]
    assert base.cached_tokens == 0
    assert len({tuple(answer.tokens) for answer in (cold, other, base)}) == 3
    settle(engine)


def test_steps_carry_many_adapters(shallow_dir: Path, cache_dir: Path, adapters: list[Path]) -> None:
    engine = load_engine(shallow_dir, cache_dir, max_batch_tokens=256)
    references = [publish(engine, directory) for directory in adapters]
    run(engine, [request(f"r{i}", [5], reference, max_tokens=1) for i, reference in enumerate(references)])  # load all
    for i, reference in enumerate(references):
        engine.add(request(f"r{i}", range(10, 30), reference, max_tokens=5))
    most = 0
    while not engine.idle:
        most = max(most, engine.step()[1].step_adapters)
    assert most == 8


def test_eviction_and_reload_change_nothing(shallow_dir: Path, cache_dir: Path, adapters: list[Path]) -> None:
    roomy = load_engine(shallow_dir, cache_dir)
    references = [publish(roomy, directory) for directory in adapters]
    expected = solo(roomy, workload(references))
    unit = sum(2 * (linear.in_features + linear.out_features) for linear in roomy.base.linears)
    crowded = load_engine(shallow_dir, cache_dir, adapter_bytes=96 * unit, adapter_host_bytes=1)
    assert run(crowded, workload(references), every=1) == expected
    settle(crowded)
