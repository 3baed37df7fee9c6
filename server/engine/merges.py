"""Adapters merged into weights of their own, beside the base: which there are, who runs on them, and the next one.

A merge is an adapter under another key. `enter` gives a new sequence that key, its KV blocks are named by it, and the
runner has the weights under it; the scheduler sees an adapter that is always ready. So a sequence ends as it began,
whatever is merged or undone meanwhile, and merged and unmerged keys and values never meet.

A merge belongs to a digest and lasts as long as the engine, or until it is undone or its digest forgotten.
"""

import logging
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

import msgspec
import torch

from adapters.device.cache import Residency
from adapters.device.merged import check_source, merged_bytes, merged_weight
from adapters.device.pool import RowPool
from adapters.kernels import QuantizedWeight
from adapters.offline.recipe import MergedDtype
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.outline import Outline
from server.engine.blocks import BlockPool
from server.engine.comparison import NoRoom, compare
from server.engine.runner import Runner
from server.engine.sequence import AdapterKey
from server.messages.protocol import LOAD_FAILED, AdapterUse, Done, Merge, MergeReport, Unmerge
from server.model.base import Base, with_weights

log = logging.getLogger("lorakeet.engine")


@dataclass(eq=False)
class _Merged:
    """Merged weights that are there."""

    key: str
    report: MergeReport
    rank: int
    references: int = 0  # one of each sequence, and one more while the scheduler has it
    undone: bool = False  # gone with its last sequence


class Merges:
    """The merges of one engine. `Residency` to the scheduler.

    Args:
        outline: of the base's files.
        budget: bytes on the device, for all merges together.
        max_requests: most that run at once.
    """

    def __init__(
        self,
        base: Base,
        outline: Outline,
        runner: Runner,
        pool: RowPool,
        residency: Residency,
        blocks: BlockPool,
        *,
        budget: int,
        max_requests: int,
    ) -> None:
        self.budget = budget
        self._base = base
        self._outline = outline
        self._runner = runner
        self._pool = pool
        self._residency = residency
        self._blocks = blocks
        self._max_requests = max_requests
        self._merged: dict[str, _Merged] = {}  # by key, undone ones with sequences included
        self._in_force: dict[str, _Merged] = {}  # by digest
        self._order: Merge | None = None  # what is being built
        self._pieces: Generator[str, None, _Merged] | None = None
        self._kind = ""  # of the next piece
        self._seconds: dict[str, float] = {}
        self._replies: list[MergeReport | Done] = []
        self._told: list[MergeReport] = []

    # --- what the scheduler asks -----------------------------------------------------------------------

    def acquire(self, key: AdapterKey) -> Literal["ready", "loading", "full", "failed"]:
        if not self.has(key):
            return self._residency.acquire(key)
        self._merged[key[0][0]].references += 1
        return "ready"

    def release(self, key: AdapterKey) -> None:
        if self.has(key):
            self.leave(key)  # not at once when its sequence is gone: a step may be in flight
        else:
            self._residency.release(key)

    def error(self, key: AdapterKey) -> str:
        return self._residency.error(key)

    # --- sequences -----------------------------------------------------------------------------------------

    def has(self, key: AdapterKey) -> bool:
        """Whether this is a merge's key."""
        return bool(self._merged) and len(key) == 1 and key[0][0] in self._merged

    def enter(self, key: AdapterKey) -> AdapterKey:
        """What a new sequence's adapters are called: by a merge's key where there is one. To be followed by `leave`."""
        merged = self._in_force.get(key[0][0]) if len(key) == 1 and key[0][1] == 1 else None
        if merged is None:
            return key
        merged.references += 1
        return ((merged.key, 1.0),)

    def leave(self, key: AdapterKey) -> None:
        """A sequence that entered under this key is gone."""
        if self.has(key):
            merged = self._merged[key[0][0]]
            merged.references -= 1
            self._drop_if_unused(merged)

    def uses(self, running: dict[str, int], waiting: dict[str, int]) -> list[AdapterUse]:
        """One line for each merge, given sequences by key."""
        return [
            AdapterUse(merged.report.digest, "merged", merged.rank, running.get(key, 0), waiting.get(key, 0))
            for key, merged in self._merged.items()
        ]

    # --- orders ------------------------------------------------------------------------------------------------

    def start(self, order: Merge) -> None:
        """Begin to build; `take_replies` has the outcome in the end."""
        there = self._in_force.get(order.adapter.digest)
        if self._order is not None:
            self._refuse(order.id, "another merge is being built", "merge_busy")
        elif there is not None and there.report.dtype != order.dtype:
            self._refuse(order.id, f"it is merged as {there.report.dtype} already: undo that first", "merge_exists")
        elif there is not None:
            self._answer(order, there.report)
        elif (undone := self._merged.get(_key(order))) is not None:
            undone.undone = False
            self._in_force[order.adapter.digest] = undone
            self._answer(order, undone.report)
        else:
            self._residency.register(order.adapter.digest, order.adapter.path)
            self._order, self._pieces, self._kind = order, self._build(order), "waiting"

    def stop(self, order: Unmerge) -> None:
        """Undo a merge, or give it up; sequences that run on it go on."""
        found = self.forget(order.digest)
        self._replies.append(Done(id=order.id, code=None if found else "merge_not_found"))

    def forget(self, digest: str) -> bool:
        """Nobody is to run on this digest's merge any more. Whether there was one, or one under way."""
        if self._order is not None and self._order.adapter.digest == digest:
            order, pieces = self._order, self._pieces
            self._order = self._pieces = None
            assert pieces is not None
            pieces.close()
            self._refuse(order.id, "the merge was given up: it was undone, or its version replaced", "merge_given_up")
            return True
        merged = self._in_force.pop(digest, None)
        if merged is None:
            return False
        merged.undone = True
        self._drop_if_unused(merged)
        return True

    def take_replies(self) -> list[MergeReport | Done]:
        """Answers to orders since the last call."""
        replies, self._replies = self._replies, []
        return replies

    def news(self) -> list[MergeReport] | None:
        """The merges in force when they are others than at the last call."""
        reports = [merged.report for merged in self._in_force.values()]
        if reports == self._told:
            return None
        self._told = reports
        return reports

    def _answer(self, order: Merge, report: MergeReport) -> None:
        self._replies.append(msgspec.structs.replace(report, id=order.id))

    def _refuse(self, id: str, message: str, code: str) -> None:  # noqa: A002
        self._replies.append(Done(id=id, error=message, code=code))

    def _drop_if_unused(self, merged: _Merged) -> None:
        if merged.undone and not merged.references:
            del self._merged[merged.key]
            self._runner.router.remove(merged.key)

    # --- building, between steps ---------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """There is a piece to run now."""
        return self._order is not None and not (self._kind == "waiting" and self._residency.loading)

    @property
    def next_seconds(self) -> float:
        """About how long the next piece will take; 0 when nothing like it has run yet."""
        return self._seconds.get(self._kind, 0.0)

    @torch.no_grad()
    def run_piece(self) -> float:
        """Run the next piece; the seconds it took. A fault ends the merge and nothing else."""
        assert self._pieces is not None
        assert self._order is not None
        began, kind, order = time.monotonic(), self._kind, self._order
        try:
            self._kind = next(self._pieces)
        except StopIteration as end:
            merged: _Merged = end.value
            self._merged[merged.key] = self._in_force[order.adapter.digest] = merged
            self._order = self._pieces = None
            self._answer(order, merged.report)
        except Exception as fault:
            self._order = self._pieces = None
            if isinstance(fault, AdapterError | NoRoom):
                self._refuse(order.id, str(fault), getattr(fault, "code", None) or "merge_refused")
            else:
                log.exception("a merge failed")
                self._refuse(order.id, f"{type(fault).__name__} while merging", "merge_failed")
        seconds = time.monotonic() - began
        self._seconds[kind] = 0.7 * self._seconds.get(kind, seconds) + 0.3 * seconds
        return seconds

    def _build(self, order: Merge) -> Generator[str, None, _Merged]:
        began, digest, key = time.monotonic(), order.adapter.digest, _key(order)
        unmerged: AdapterKey = ((digest, 1.0),)
        while (answer := self._residency.acquire(unmerged)) in ("loading", "full"):
            yield "waiting"
        if answer == "failed":
            raise AdapterError(self._residency.error(unmerged), "name", LOAD_FAILED)
        installed = False
        try:
            if digest in self._pool.extras or digest in self._pool.invocations:
                raise AdapterError("only plain LoRA can be merged", "to", "unsupported_adapter_feature")
            taken, rank = self._check(digest, order.dtype)
            weights = yield from self._weights(digest, order.dtype)
            self._runner.router.install(key, with_weights(self._runner.router.base, weights))
            installed = True
            sides = unmerged, ((key, 1.0),)
            found = yield from compare(self._runner, self._blocks, sides, order.prompts, self._max_requests)
            if not abs(found.divergence) < float("inf"):
                raise AdapterError("the merged weights give logits that are not finite", "dtype")
        except BaseException:
            if installed:
                self._runner.router.remove(key)
            raise
        finally:
            self._residency.release(unmerged)
        report = MergeReport(
            id=order.id,
            digest=digest,
            dtype=order.dtype,
            bytes=taken,
            positions=found.positions,
            mean_kl=found.divergence / found.positions,
            agreement=found.agreeing / found.positions,
            speeds=found.speeds,
            seconds=time.monotonic() - began,
        )
        return _Merged(key, report, rank)

    def _check(self, digest: str, dtype: MergedDtype) -> tuple[int, int]:
        """The bytes of a merge and the adapter's rank. Raises AdapterError for one that cannot be."""
        need, rank = 0, 0
        for linear in self._base.linears:
            if (factors := self._pool.factors(digest, linear.name)) is not None:
                shape = linear.weight.shape
                check_source(linear.name, self._outline.parameters.get(f"{linear.name}.weight"), shape, dtype)
                need += merged_bytes(shape, dtype, self._base.device)
                rank = max(rank, len(factors[0]))
        taken = sum(merged.report.bytes for merged in self._merged.values())
        if taken + need > self.budget:
            raise AdapterError(
                f"the merged weights take {need} bytes as {dtype}; {max(self.budget - taken, 0)} of {self.budget} are "
                "free (--merged-bytes)",
                "dtype",
                "merge_too_large",
            )
        return need, rank

    def _weights(self, digest: str, dtype: MergedDtype) -> Generator[str, None, dict[str, QuantizedWeight]]:
        made: dict[str, QuantizedWeight] = {}
        for linear in self._base.linears:
            factors = self._pool.factors(digest, linear.name)
            if factors is None:
                continue
            source = self._outline.parameters[f"{linear.name}.weight"]
            pieces = merged_weight(source, factors, dtype, self._base.device)
            while True:
                yield "weights"
                try:
                    next(pieces)
                except StopIteration as end:
                    made[linear.name] = end.value
                    break
        return made


def _key(order: Merge) -> str:
    """Equal keys mean equal weights: those of this digest, in this dtype, over this base."""
    return f"{order.adapter.digest}/{order.dtype}"
