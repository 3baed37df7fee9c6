"""Works of a forward pass as tensors: their tokens in one row, and where keys, values and adapters lie."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapters.device.memory import sent
from adapters.device.pool import RowPool, SegmentDeltas, Use
from adapters.device.variants import ExtraUse, StepExtras
from server.engine.graphs import DecodeStep
from server.engine.sequence import Sequence, Work
from server.model.attention import KVCache, PagedAttention


@dataclass(frozen=True)
class Batch:
    """T packed tokens of R requests."""

    works: Seq[Work]
    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    attention: PagedAttention
    deltas: SegmentDeltas | None
    keep: Tensor  # int64 [K], the logits indices: rows whose logits somebody wants
    kept: list[int]  # how many consecutive ones of them are each work's own
    extras: StepExtras | None  # what its adapters do besides rank rows

    @property
    def decodes(self) -> bool:
        """Whether it is one token of each request, and all of their logits are wanted."""
        return len(self.ids) == len(self.attention.seqs) == len(self.keep)

    def planned(self) -> DecodeStep:
        """As a planned decoder takes it."""
        attention, deltas = self.attention, self.deltas
        return DecodeStep(
            ids=self.ids,
            positions=self.positions,
            slots=attention.slots,
            seqs=attention.seqs,
            block_tables=attention.block_tables,
            table=None if deltas is None else deltas.table,
            scale=None if deltas is None else deltas.scale,
        )


class Packer:
    """Packs works over one KV cache and one row pool."""

    def __init__(self, cache: KVCache, pool: RowPool) -> None:
        self._cache = cache
        self._pool = pool

    def pack(
        self,
        works: Seq[Work],
        tokens_after: Callable[[Seq[Sequence]], Tensor] | None,
        *,
        adapters: bool,
        drafts_apart: bool,
    ) -> Batch:
        """Works that share a forward pass.

        Args:
            tokens_after: gives the pending tokens of sequences, on the device; see `InFlightStep`.
            adapters: whether sequences' adapters add anything.
            drafts_apart: a draft attends as a request of its own: as decoding is recorded.
        """
        size = self._cache.block_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        keep: list[int] = []
        uses: list[Use] = []
        kept: list[int] = []
        seqs: list[tuple[int, int, int]] = []
        pending: list[tuple[int, Sequence]] = []  # whose last token is pending, and where that comes among the ids
        extra_uses: list[ExtraUse] = []
        extra_kept: list[ExtraUse] = []
        width = max(-(-(work.start + work.count) // size) for work in works)
        tables = np.zeros((len(works) + drafts_apart * sum(len(work.drafts) for work in works), width), np.int32)
        for work in works:
            sequence, first, last = work.sequence, work.start, work.start + work.count
            offset = len(ids)
            ids += sequence.tokens[first : last - len(work.drafts)]
            ids += work.drafts  # none after a pending token
            if work.pending:
                pending.append((len(ids), sequence))
                ids.append(0)
            blocks = sequence.blocks[: -(-last // size)]
            positions += range(first, last)
            slots += [blocks[position // size] * size + position % size for position in range(first, last)]
            begins = [first, *range(last - len(work.drafts), last)] if drafts_apart and work.drafts else [first]
            for begin, end in pairwise([*begins, last]):
                tables[len(seqs), : len(blocks)] = blocks
                seqs.append((offset + begin - first, offset + end - first, end))
            own = [offset + p - first for p in work.prompt_rows]
            if work.samples:
                own += range(len(ids) - 1 - len(work.drafts) + work.skipped, len(ids))
            keep += own
            kept.append(len(own))
            for digest, weight in sequence.adapter if adapters else ():
                begin = max(offset, offset + sequence.starts.get(digest, 0) - first)
                if begin >= len(ids):  # an activated adapter that is not in force yet
                    continue
                uses.append(Use(begin, len(ids), digest, weight))
                adapter = self._pool.adapter(digest)
                if adapter is not None and (extras := adapter.extras) is not None:
                    skipped = sum(token < begin for token in own)
                    extra_uses.append(ExtraUse(begin, len(ids), extras, weight))
                    extra_kept.append(ExtraUse(len(keep) - len(own) + skipped, len(keep), extras, weight))
        device = self._pool.device

        def tensor(numbers: list[Any], dtype: type[np.generic] = np.int64) -> Tensor:
            return sent(torch.from_numpy(np.array(numbers, dtype)), device)  # half as long as a tensor from a list

        attention = PagedAttention(
            self._cache,
            tensor(slots),
            tensor(seqs, np.int32),
            sent(torch.from_numpy(tables), device),
        )
        packed = tensor(ids)
        if pending:
            assert tokens_after is not None
            tokens = tokens_after([sequence for _, sequence in pending])
            if len(pending) == len(ids):
                packed = tokens
            else:
                packed[tensor([place for place, _ in pending])] = tokens
        return Batch(
            works=works,
            ids=packed,
            positions=tensor(positions),
            attention=attention,
            deltas=self._pool.deltas(_joined(uses)),
            keep=tensor(keep),
            kept=kept,
            extras=StepExtras(extra_uses, extra_kept) if extra_uses else None,
        )


def _joined(uses: list[Use]) -> list[Use]:
    """Neighbouring runs of one adapter become one, unless several adapters lie on the same tokens."""
    joined: list[Use] = []
    for use in uses:
        last = joined[-1] if joined else None
        if last is not None and last.end == use.start and last[2:] == use[2:]:
            joined[-1] = last._replace(end=use.end)
        else:
            joined.append(use)
    return joined
