"""Decode graphs: static buffers and buckets on any device, recordings on a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.engine.graphs import MAX_BUCKET, Bucket, DecodeGraphs, DecodeStep, Run
from tests.support.offline import load_engine, publish, request, run
from tests.support.tiny import tiny_adapter

LINEARS, BLOCKS = 3, 4


def step(count: int, segments: int = 0, blocks: int = 2) -> DecodeStep:
    """A step in which every number differs from the padding."""
    return DecodeStep(
        ids=torch.arange(count) + 5,
        positions=torch.arange(count) + 9,
        slots=torch.arange(count) + 16,
        seqs=torch.stack([torch.arange(count), torch.arange(count) + 1, torch.arange(count) + 10], 1).int(),
        block_tables=torch.full((count, blocks), 3, dtype=torch.int32),
        table=torch.full((LINEARS, segments, 5), 2, dtype=torch.int32) if segments else None,
        scale=torch.ones(LINEARS, segments) if segments else None,
    )


class Model:
    """Outputs each row's id, and records its inputs."""

    def __init__(self) -> None:
        self.recorded = 0
        self.seen: DecodeStep | None = None
        self.graphs = DecodeGraphs(
            self.forward, linears=LINEARS, max_blocks=BLOCKS, device=torch.device("cpu"), record=self.record
        )

    def forward(self, given: DecodeStep) -> Tensor:
        self.seen = given
        return given.ids[:, None].float()

    def record(self, forward: Callable[[], Tensor]) -> Run:
        self.recorded += 1
        return forward


@pytest.mark.parametrize("count", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("adapters", [False, True])
def test_a_step_is_padded_to_its_bucket(count: int, adapters: bool) -> None:
    model = Model()
    given = step(count, count if adapters else 0)
    model.graphs.run(step(64, 64 if adapters else 0, BLOCKS))  # leaves its numbers in shared buffers
    logits = model.graphs.run(given)
    assert logits is not None
    assert logits.tolist() == given.ids[:, None].tolist()
    seen = model.seen
    assert seen is not None
    size = len(seen.ids)
    assert model.graphs.bucket(given) == Bucket(size, adapters)
    assert seen.block_tables.shape == (size, BLOCKS)
    assert (seen.slots[count:] == 0).all(), "padding writes to the scratch block"
    assert (seen.seqs[count:] == torch.tensor([size, size, 0])).all(), "padding has no queries, and starts ascend"
    assert seen.segments == (size if adapters else 0)
    if seen.table is not None:
        assert given.table is not None
        assert torch.equal(seen.table[:, :count], given.table)
        assert (seen.table[:, count:, 3] == 0).all(), "a segment without rank does nothing"


def test_a_bucket_is_recorded_once_whatever_the_tables_say() -> None:
    model = Model()
    for segments in (1, 2, 3, 1, 4):
        model.graphs.run(step(3, segments))
    assert model.recorded == 1
    model.graphs.run(step(3))
    assert model.recorded == 2, "base-only steps launch no adapter kernels"


def test_several_adapters_on_a_request_take_a_larger_bucket() -> None:
    assert Model().graphs.bucket(step(2, 5)) == Bucket(8, True)


def test_steps_beyond_the_largest_bucket_run_without_graphs() -> None:
    model = Model()
    assert model.graphs.run(step(MAX_BUCKET + 1)) is None
    assert model.graphs.run(step(2, blocks=BLOCKS + 1)) is None


def test_warming_up_leaves_nothing_to_record() -> None:
    model = Model()
    model.graphs.warm_up(6)
    recorded = model.recorded
    for count in (1, 2, 3, 5, 6):
        model.graphs.run(step(count))
        model.graphs.run(step(count, count))
    assert model.recorded == recorded


@pytest.mark.cuda
def test_graphs_answer_as_launches_do(model_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Loads and evictions between steps included, without a new recording."""
    directories = [tiny_adapter(tmp_path / str(seed), model_dir, seed=seed, r=4 + seed) for seed in range(6)]

    def answers(graphs: bool) -> tuple[list[list[int]], int]:
        engine = load_engine(model_dir, cache_dir, device="cuda", dtype="float32", adapter_bytes=1 << 20)
        recordings = engine.runner.weights.graphs
        assert recordings is not None
        engine.runner.warm_up(16)
        before = len(recordings._recorded)
        if not graphs:
            engine.runner.weights.graphs = None
        references = [*(publish(engine, directory) for directory in directories), None]
        requests = [
            request(f"r{i}", range(5 + i, 30), reference, max_tokens=10) for i, reference in enumerate(references)
        ]
        found = run(engine, requests, every=3)
        return [found[single.id].tokens for single in requests], len(recordings._recorded) - before

    recorded, more = answers(graphs=True)
    assert more == 0
    assert recorded == answers(graphs=False)[0]
