"""Decoding under CUDA graphs: one recording per batch size, with adapters and without.

A graph reads and writes fixed addresses, so a step is copied into the static buffers of its bucket and padded there:
with scratch slots of the KV cache, requests without queries, and segments of rank 0. A graph's launches depend on its
bucket alone; a change of adapters changes tables, never a recording.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MAX_BUCKET = 64  # requests; larger steps are not bound by launches

Run = Callable[[], Tensor]


class Bucket(NamedTuple):
    """The key of a recording."""

    requests: int
    adapters: bool


@dataclass(frozen=True)
class DecodeStep:
    """The inputs of a decode step: R requests, one token and one row of logits each.

    Also the static buffers of a bucket, where R is the bucket's size.
    """

    ids: Tensor  # int64 [R]
    positions: Tensor  # int64 [R]
    slots: Tensor  # int64 [R]
    seqs: Tensor  # int32 [R, 3]
    block_tables: Tensor  # int32 [R, blocks]
    table: Tensor | None  # int32 [L, segments, 5], None without adapters
    scale: Tensor | None  # fp32 [L, segments]

    @property
    def segments(self) -> int:
        return 0 if self.table is None else self.table.shape[1]

    def fill(self, step: "DecodeStep") -> None:
        """Copy a step into these buffers, and pad it."""
        count, size = len(step.ids), len(self.ids)
        for own, given in (
            (self.ids, step.ids),
            (self.positions, step.positions),
            (self.slots, step.slots),
            (self.seqs, step.seqs),
        ):
            own[:count] = given
        self.block_tables[:count, : step.block_tables.shape[1]] = step.block_tables
        self.ids[count:] = 0
        self.positions[count:] = 0
        self.slots[count:] = 0  # block 0 of the cache is scratch
        self.seqs[count:, :2] = size  # empty queries, with starts still ascending
        self.seqs[count:, 2] = 0
        if self.table is not None and self.scale is not None:
            self.table.zero_()
            if step.table is not None and step.scale is not None:
                self.table[:, : step.segments] = step.table
                self.scale[:, : step.segments] = step.scale


class DecodeGraphs:
    """Recordings of `forward`, made when a bucket is first needed.

    Args:
        forward: computes a step's fp32 logits [R, V], with the same kernel launches for all steps of equal shapes.
        linears: rows of a segment table.
        max_blocks: KV blocks of the longest sequence.
        record: for tests; runs its argument once and returns a function that repeats it.
    """

    def __init__(
        self,
        forward: Callable[[DecodeStep], Tensor],
        *,
        linears: int,
        max_blocks: int,
        device: torch.device,
        record: Callable[[Run], Run] | None = None,
    ) -> None:
        self._forward = forward
        self._linears = linears
        self._max_blocks = max_blocks
        self._device = device
        self._record = record or CudaRecorder()
        self._recorded: dict[Bucket, tuple[DecodeStep, Run]] = {}

    def bucket(self, step: DecodeStep) -> Bucket | None:
        """Return the bucket that fits a step; None if it is too large."""
        need = max(len(step.ids), step.segments)
        if need > MAX_BUCKET or step.block_tables.shape[1] > self._max_blocks:
            return None
        size = next(size for size in (1, 2, 4, 8, 16, 24, 32, 48, MAX_BUCKET) if size >= need)
        return Bucket(size, step.table is not None)

    def run(self, step: DecodeStep) -> Tensor | None:
        """Return the step's logits [R, V], valid until the next run; None if no bucket fits."""
        bucket = self.bucket(step)
        if bucket is None:
            return None
        if bucket not in self._recorded:
            self._recorded[bucket] = self._prepare(bucket)
        buffers, replay = self._recorded[bucket]
        buffers.fill(step)
        return replay()[: len(step.ids)]

    def warm_up(self, requests: int) -> None:
        """Record every bucket for up to `requests` requests, largest first, since they share memory."""
        sizes = [size for size in (1, 2, 4, 8, 16, 24, 32, 48, MAX_BUCKET) if size < 2 * requests]
        for size in reversed(sizes):
            for adapters in (False, True):
                bucket = Bucket(size, adapters)
                if bucket not in self._recorded:
                    self._recorded[bucket] = self._prepare(bucket)

    def _prepare(self, bucket: Bucket) -> tuple[DecodeStep, Run]:
        buffers = self._buffers(bucket)
        return buffers, self._record(lambda: self._forward(buffers))

    def _buffers(self, bucket: Bucket) -> DecodeStep:
        """Return a bucket's buffers, filled with padding."""
        size = bucket.requests

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self._device)

        buffers = DecodeStep(
            ids=zeros(size),
            positions=zeros(size),
            slots=zeros(size),
            seqs=zeros(size, 3, dtype=torch.int32),
            block_tables=zeros(size, self._max_blocks, dtype=torch.int32),
            table=zeros(self._linears, size, 5, dtype=torch.int32) if bucket.adapters else None,
            scale=zeros(self._linears, size, dtype=torch.float32) if bucket.adapters else None,
        )
        buffers.seqs[:, :2] = size
        return buffers


class CudaRecorder:
    """Captures CUDA graphs, all in one memory pool, since only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Run) -> Run:
        # Two runs before the capture compile and tune kernels, and allocate their persistent memory.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate during the capture: the adapter loader pins memory.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            logits = run()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
