"""The registry of merged weights beside the base, and of the sequences that run on them.

A merge is an adapter under another key. `enter` gives a new sequence that key, its KV blocks are named by it, and the
runner has the weights under it; the scheduler sees an adapter that is always ready. So a sequence ends as it began,
whatever is merged or undone meanwhile, and merged and unmerged keys and values never meet.

A merge belongs to a digest and lasts as long as the engine, or until it is undone or its digest forgotten.
"""

from dataclasses import dataclass
from typing import Literal

from adapters.device.cache import AdapterCache
from server.engine.runner import Runner
from server.engine.sequence import AdapterKey
from server.messages.protocol import MergeReport


@dataclass(eq=False)
class Merged:
    """One adapter's merged weights."""

    key: str
    report: MergeReport
    rank: int  # of the adapter
    references: int = 0  # one of each sequence, and one more while the scheduler runs it
    undone: bool = False  # gone with its last reference


class MergedRegistry:
    """The merges of one engine, before its adapter cache: `AdapterResidency` to the scheduler.

    Args:
        budget: bytes on the device, for all merges together.
    """

    def __init__(self, runner: Runner, cache: AdapterCache, budget: int) -> None:
        self.budget = budget
        self._runner = runner
        self._cache = cache
        self._merged: dict[str, Merged] = {}  # by key, undone ones with sequences included
        self._in_force: dict[str, Merged] = {}  # by digest
        self._told: list[MergeReport] = []
        self._changed: set[str] = set()

    # --- what the scheduler asks -----------------------------------------------------------------------

    def acquire(self, key: AdapterKey) -> Literal["ready", "loading", "full", "failed"]:
        if not self.has(key):
            return self._cache.acquire(key)
        self._merged[key[0][0]].references += 1
        return "ready"

    def release(self, key: AdapterKey) -> None:
        if self.has(key):
            self.leave(key)
        else:
            self._cache.release(key)

    def error(self, key: AdapterKey) -> str:
        return self._cache.error(key)

    # --- sequences -----------------------------------------------------------------------------------------

    def has(self, key: AdapterKey) -> bool:
        """Whether this is a merge's key."""
        return bool(self._merged) and len(key) == 1 and key[0][0] in self._merged

    def enter(self, key: AdapterKey) -> AdapterKey:
        """A new sequence's adapters by a merge's key, where there is one; else unchanged. To be followed by `leave`."""
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

    # --- merges come and go --------------------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """Device memory of all merged weights."""
        return sum(merged.report.bytes for merged in self._merged.values())

    def find(self, key: str) -> Merged | None:
        """The merge under a key, undone or not."""
        return self._merged.get(key)

    def in_force(self, digest: str) -> Merged | None:
        """The merge on which new sequences of this adapter run."""
        return self._in_force.get(digest)

    def add(self, merged: Merged) -> None:
        """New sequences run on these weights, which the runner has; an undone merge is in force again."""
        merged.undone = False
        self._merged[merged.key] = self._in_force[merged.report.digest] = merged
        self._changed.add(merged.key)

    def forget(self, digest: str) -> bool:
        """No new sequence is to run on this digest's merge. Whether there was one."""
        merged = self._in_force.pop(digest, None)
        if merged is None:
            return False
        merged.undone = True
        self._drop_if_unused(merged)
        return True

    def _drop_if_unused(self, merged: Merged) -> None:
        if merged.undone and not merged.references:
            del self._merged[merged.key]
            self._changed.add(merged.key)
            self._runner.remove(merged.key)

    # --- what is reported ----------------------------------------------------------------------------------

    def news(self) -> list[MergeReport] | None:
        """The merges in force when they are others than at the last call."""
        reports = [merged.report for merged in self._in_force.values()]
        if reports == self._told:
            return None
        self._told = reports
        return reports

    def take_changed(self) -> set[str]:
        """Keys of the merges that came or went since the last call."""
        changed, self._changed = self._changed, set()
        return changed
