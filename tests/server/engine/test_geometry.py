"""Layers of several geometries: windows beside full attention, several head sizes, layers that read others' keys."""

import random
from pathlib import Path

import pytest
import torch

from adapters.kernels.reference import KEY_GROUP
from server.engine import memory_plan
from server.engine.block_pool import BlockPool
from server.engine.blocks import BlockGroups
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.messages.protocol import AdapterRef, EngineConfig, Generate, Sampling
from server.model.attention import block_bytes
from server.model.geometry import LayerKV, key_windows
from tests.support.offline import Answer, load_engine, publish, request, run, solo
from tests.support.scheduler_world import FakeResidency
from tests.support.tiny import tiny_adapter
from tests.sweep.families import tiny_family

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of transformers about families
MIXED = "gemma4_text"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gemma 4 with all features: K = V and one wide KV head in full layers, windows in others, two shared layers."""
    directory = tmp_path_factory.mktemp(MIXED)
    tiny_family(MIXED, directory)
    return directory


@pytest.fixture(scope="module")
def adapter(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_adapter(tmp_path_factory.mktemp("adapter") / "a", mixed)


def workload(reference: AdapterRef) -> list[Generate]:
    draw = random.Random(0)
    lengths = (150, 7, 90, 33, 120, 64)
    return [
        request(
            f"r{i}",
            [draw.randrange(3, 500) for _ in range(length)],
            reference if i % 2 else None,
            max_tokens=25 + 5 * i,
            temperature=0.0 if i % 3 else 0.9,
            seed=i,
            logprobs=3,
        )
        for i, length in enumerate(lengths)
    ]


def settle(engine: Engine) -> None:
    report = engine.inspect("x")
    assert report.free_blocks + report.cached_blocks == report.num_blocks


def test_a_model_tells_its_layers(mixed: Path, cache_dir: Path) -> None:
    engine = load_engine(mixed, cache_dir)
    sliding, full = LayerKV(2, 16, 32, 0), LayerKV(1, 32, 0, 1)
    assert engine.base.layers == [sliding, full, sliding, full]
    assert engine.cache.windows == [0, 32]
    assert engine.cache.k[2] is engine.cache.k[0], "a layer that reads another's keys has no cache of its own"
    assert engine.cache.k[1].shape[1:] == (1, 16, 32)


def test_layers_that_read_one_cache_keep_all_that_any_of_them_sees() -> None:
    layers = [LayerKV(2, 16, 32, 0), LayerKV(2, 16, 64, 0), LayerKV(2, 16, 8, 2), LayerKV(2, 16, 0, 2)]
    assert key_windows(layers) == [64, 64, 0, 0]


def test_neighbours_chunks_and_preemption_change_nothing(mixed: Path, adapter: Path, cache_dir: Path) -> None:
    alone = load_engine(mixed, cache_dir, max_batch_tokens=256)
    reference = publish(alone, adapter)
    expected = solo(alone, workload(reference))
    assert run(load_engine(mixed, cache_dir), workload(reference), every=2) == expected
    tight = load_engine(
        mixed, cache_dir, kv_cache_bytes=15 * 8192, max_batch_tokens=23, max_model_len=200, prefix_caching=False
    )
    preemptions = 0
    answers = {single.id: Answer() for single in workload(reference)}
    for single in workload(reference):
        tight.add(single)
    while not tight.idle:
        outputs, stats = tight.step()
        preemptions += stats.preemptions
        for output in outputs:
            answers[output.id].take(output)
    assert preemptions > 0
    assert answers == expected
    settle(tight)


def test_cache_hits_change_nothing(mixed: Path, adapter: Path, cache_dir: Path) -> None:
    engine = load_engine(mixed, cache_dir)
    reference = publish(engine, adapter)
    draw = random.Random(5)
    prompt = [draw.randrange(3, 500) for _ in range(150)]
    longer = [*prompt, *(draw.randrange(3, 500) for _ in range(40))]
    (cold,) = solo(engine, [request("a", longer, reference, max_tokens=8)]).values()
    engine.blocks.reset_cache()
    run(engine, [request("b", prompt, reference, max_tokens=8)])
    warm = run(engine, [request("a", longer, reference, max_tokens=8)])["a"]
    assert cold.cached_tokens == 0
    assert warm.cached_tokens == 144
    assert (warm.tokens, warm.logprobs) == (cold.tokens, cold.logprobs)
    # The window before the cached position is required: without it the position is unusable, whatever full layers have.
    sliding = engine.blocks.pools[1]
    sliding.reset_cache()
    again = run(engine, [request("a", longer, reference, max_tokens=8)])["a"]
    assert again.cached_tokens == 0
    assert (again.tokens, again.logprobs) == (cold.tokens, cold.logprobs)
    settle(engine)


def played(layers: list[LayerKV], tokens: int, chunk: int) -> int:
    """Peak bytes of KV blocks while one request computes its prompt and some tokens after it."""
    windows = sorted(set(key_windows(layers)))
    pools = [BlockPool(2 * tokens // 16, 16) for _ in windows]
    blocks = BlockGroups(pools, windows, chunk, KEY_GROUP)
    scheduler = Scheduler(
        blocks, FakeResidency(0), max_batch_tokens=chunk, max_batch_requests=4, max_model_len=2 * tokens
    )
    sequence = Sequence(id="a", prompt=[1] * tokens, sampling=Sampling(max_tokens=100))
    scheduler.add(sequence)
    sizes = block_bytes(layers, 16, torch.float32)
    most = 0
    while not scheduler.idle:
        step = scheduler.schedule(0.0)
        assert step is not None
        held = sum(pool.counts.used * size for pool, size in zip(pools, sizes, strict=True))
        most = max(most, held)
        for work in step.works:
            scheduler.advance(work, [5] if work.samples else [])
    assert blocks.counts.used == 0
    return most


def test_sliding_layers_give_memory_back() -> None:
    """Gemma 3 270M: 15 layers see 512 tokens, 3 see all. At 8k a request takes a quarter of the memory."""
    layers = [LayerKV(1, 256, 0 if i % 6 == 5 else 512, i) for i in range(18)]
    kept = played([LayerKV(1, 256, 0, i) for i in range(18)], 8192, 256)
    given_back = played(layers, 8192, 256)
    assert kept == 519 * 18 * 2 * 256 * 4 * 16
    assert given_back / kept < 0.26


def test_memory_is_divided_between_groups(mixed: Path, cache_dir: Path) -> None:
    """The windows of a full batch fit; the rest goes to the full-attention layers."""
    engine = load_engine(mixed, cache_dir, kv_cache_bytes=8 << 20, max_batch_requests=4)
    sizes = block_bytes(engine.base.layers, 16, engine.base.dtype)
    full, sliding = (pool.num_blocks for pool in engine.blocks.pools)
    assert (full * sizes[0] + sliding * sizes[1]) <= 8 << 20
    assert full > 2 * sliding
    assert sliding >= 4 * (32 + KEY_GROUP) // 16
    assert engine.ready().num_blocks == full
    config = EngineConfig(address="", model=str(mixed), cache_dir=str(cache_dir), kv_cache_bytes=16384 * 4)
    assert memory_plan.plan(engine.base, config).max_model_len == 128
