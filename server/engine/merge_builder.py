"""Building merged weights between steps: wait for the adapter, merge each linear, compare, and put them in force.

One order at a time, in pieces (a `GapWorker`). A fault ends only its order, and everything built for it is removed.
"""

import logging
import time
from collections.abc import Generator

import msgspec
import torch

from adapters.device.merged import check_source, merged_bytes, merged_weight
from adapters.kernels import QuantizedWeight
from adapters.offline.recipe import MergedDtype
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.outline import Outline
from server.engine.comparison import CacheTooSmall, compare
from server.engine.engine import Engine
from server.engine.merged_registry import Merged
from server.engine.sequence import AdapterKey
from server.messages.protocol import LOAD_FAILED, Done, Forget, Merge, MergeReport, Request, Unmerge
from server.model.base import with_weights

log = logging.getLogger("lorakeet.engine")


class MergeBuilder:
    """Carries out `Merge` and `Unmerge` on one engine.

    Args:
        outline: of the base's files, which hold the unquantised weights.
    """

    handles = (Merge, Unmerge, Forget)

    def __init__(self, engine: Engine, outline: Outline) -> None:
        self._engine = engine
        self._registry = engine.merges
        self._outline = outline
        self._order: Merge | None = None  # in progress
        self._pieces: Generator[str, None, Merged] | None = None
        self._kind = ""  # of the next piece
        self._seconds: dict[str, float] = {}
        self._replies: list[MergeReport | Done] = []

    # --- orders ------------------------------------------------------------------------------------------------

    def handle(self, message: Request) -> None:
        """Start a merge, or undo or abandon one. `Forget` abandons a merge in progress for its digest."""
        match message:
            case Merge():
                self._start(message)
            case Unmerge():
                found = self._abandon(message.digest) or self._registry.forget(message.digest)
                self._replies.append(Done(id=message.id, code=None if found else "merge_not_found"))
            case Forget():
                self._abandon(message.digest)

    def take_replies(self) -> list[MergeReport | Done]:
        """Return the answers to orders since the last call."""
        replies, self._replies = self._replies, []
        return replies

    def _start(self, order: Merge) -> None:
        current = self._registry.in_force(order.adapter.digest)
        if self._order is not None:
            self._refuse(order.id, "another merge is being built", "merge_busy")
        elif current is not None and current.report.dtype != order.dtype:
            self._refuse(order.id, f"it is merged as {current.report.dtype} already: undo that first", "merge_exists")
        elif (existing := current or self._registry.find(_key(order))) is not None:
            self._registry.add(existing)
            self._answer(order, existing.report)
        else:
            self._engine.adapter_cache.register(order.adapter.digest, order.adapter.path)
            self._order, self._pieces, self._kind = order, self._build(order), "waiting"

    def _abandon(self, digest: str) -> bool:
        """Abandon the order in progress if it is for this digest. Returns whether it was."""
        order, pieces = self._order, self._pieces
        if order is None or pieces is None or order.adapter.digest != digest:
            return False
        self._order = self._pieces = None
        pieces.close()
        self._refuse(order.id, "the merge was abandoned: it was undone, or its version was replaced", "merge_given_up")
        return True

    def _answer(self, order: Merge, report: MergeReport) -> None:
        self._replies.append(msgspec.structs.replace(report, id=order.id))

    def _refuse(self, id: str, message: str, code: str) -> None:  # noqa: A002
        self._replies.append(Done(id=id, error=message, code=code))

    # --- building, between steps ---------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing is being built."""
        return self._order is None

    @property
    def ready(self) -> bool:
        """Whether there is a piece to run now."""
        return self._order is not None and not (self._kind == "waiting" and self._engine.adapter_cache.loading)

    @property
    def next_seconds(self) -> float:
        """The estimated duration of the next piece; 0 if none of its kind has run yet."""
        return self._seconds.get(self._kind, 0.0)

    @torch.no_grad()
    def run_piece(self) -> float:
        """Run the next piece. Returns its duration in seconds. A fault ends only the merge."""
        assert self._pieces is not None
        assert self._order is not None
        began, kind, order = time.monotonic(), self._kind, self._order
        try:
            self._kind = next(self._pieces)
        except StopIteration as end:
            merged: Merged = end.value
            self._registry.add(merged)
            self._order = self._pieces = None
            self._answer(order, merged.report)
        except Exception as fault:
            self._order = self._pieces = None
            if isinstance(fault, AdapterError | CacheTooSmall):
                self._refuse(order.id, str(fault), getattr(fault, "code", None) or "merge_refused")
            else:
                log.exception("a merge failed")
                self._refuse(order.id, f"{type(fault).__name__} while merging", "merge_failed")
        seconds = time.monotonic() - began
        self._seconds[kind] = 0.7 * self._seconds.get(kind, seconds) + 0.3 * seconds
        return seconds

    def _build(self, order: Merge) -> Generator[str, None, Merged]:
        began, digest, key = time.monotonic(), order.adapter.digest, _key(order)
        engine, cache, runner = self._engine, self._engine.adapter_cache, self._engine.runner
        unmerged: AdapterKey = ((digest, 1.0),)
        while (answer := cache.acquire(unmerged)) in ("loading", "full"):
            yield "waiting"
        if answer == "failed":
            raise AdapterError(cache.error(unmerged), "name", LOAD_FAILED)
        installed = False
        try:
            resident = engine.pool.adapter(digest)
            assert resident is not None  # it was acquired
            if not resident.plain:
                raise AdapterError("only plain LoRA can be merged", "to", "unsupported_adapter_feature")
            taken, rank = self._check_mergeable(digest, order.dtype)
            weights = yield from self._merge_weights(digest, order.dtype)
            runner.install(key, with_weights(runner.base, weights))
            installed = True
            keys = unmerged, ((key, 1.0),)
            found = yield from compare(runner, engine.blocks, keys, order.prompts, engine.max_batch_requests)
            if not abs(found.divergence) < float("inf"):
                raise AdapterError("the merged weights give logits that are not finite", "dtype")
        except BaseException:
            if installed:
                runner.remove(key)
            raise
        finally:
            cache.release(unmerged)
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
        return Merged(key, report, rank)

    def _check_mergeable(self, digest: str, dtype: MergedDtype) -> tuple[int, int]:
        """Return the bytes of a merge and the adapter's rank. Raises AdapterError if the merge is impossible."""
        base, budget = self._engine.base, self._registry.budget
        if base.transposed:
            raise AdapterError("the base's files hold transposed weights (Conv1D), which cannot be merged into", "to")
        need, rank = 0, 0
        for linear in base.linears:
            if (factors := self._engine.pool.factors(digest, linear.name)) is not None:
                shape = linear.weight.shape
                check_source(linear.name, self._outline.parameters.get(f"{linear.name}.weight"), shape, dtype)
                need += merged_bytes(shape, dtype, base.device)
                rank = max(rank, len(factors[0]))
        free = max(budget - self._registry.bytes, 0)
        if need > free:
            raise AdapterError(
                f"the merged weights take {need} bytes as {dtype}; {free} of {budget} are free (--merged-bytes)",
                "dtype",
                "merge_too_large",
            )
        return need, rank

    def _merge_weights(self, digest: str, dtype: MergedDtype) -> Generator[str, None, dict[str, QuantizedWeight]]:
        base = self._engine.base
        merged: dict[str, QuantizedWeight] = {}
        for linear in base.linears:
            factors = self._engine.pool.factors(digest, linear.name)
            if factors is None:
                continue
            source = self._outline.parameters[f"{linear.name}.weight"]
            pieces = merged_weight(source, factors, dtype, base.device)
            while True:
                yield "weights"
                try:
                    next(pieces)
                except StopIteration as end:
                    merged[linear.name] = end.value
                    break
        return merged


def _key(order: Merge) -> str:
    """Return the merge's key; equal keys mean equal weights, by digest and dtype over this base."""
    return f"{order.adapter.digest}/{order.dtype}"
