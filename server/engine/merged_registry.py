"""The registry of merged weights beside the base, and of the sequences that run on them.

A merge is an adapter under another key. `acquire_key` gives a new sequence that key; its KV blocks are named by it, and
the runner holds the weights under it. To the scheduler it is an adapter that is always ready. So merging or undoing
does not affect running sequences, and merged and unmerged KV are never mixed.

A merge belongs to a digest and lasts until it is undone, its digest is forgotten, or the engine ends.
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
    references: int = 0  # one per sequence, and one more while the scheduler runs it
    undone: bool = False  # removed with its last reference


class MergedRegistry:
    """The merges of one engine, in front of its adapter cache: the scheduler's `AdapterResidency`.

    Args:
        budget: device bytes for all merges together.
    """

    def __init__(self, runner: Runner, cache: AdapterCache, budget: int) -> None:
        self.budget = budget
        self._runner = runner
        self._cache = cache
        self._merged: dict[str, Merged] = {}  # by key, undone ones with sequences included
        self._in_force: dict[str, Merged] = {}  # by digest
        self._reported: list[MergeReport] = []
        self._changed: set[str] = set()

    # --- AdapterResidency ------------------------------------------------------------------------------

    def acquire(self, key: AdapterKey) -> Literal["ready", "loading", "full", "failed"]:
        if not self.has(key):
            return self._cache.acquire(key)
        self._merged[key[0][0]].references += 1
        return "ready"

    def release(self, key: AdapterKey) -> None:
        if self.has(key):
            self.release_key(key)
        else:
            self._cache.release(key)

    def error(self, key: AdapterKey) -> str:
        return self._cache.error(key)

    # --- sequences -----------------------------------------------------------------------------------------

    def has(self, key: AdapterKey) -> bool:
        """Whether this is a merge's key."""
        return bool(self._merged) and len(key) == 1 and key[0][0] in self._merged

    def acquire_key(self, key: AdapterKey) -> AdapterKey:
        """Return the merge's key for a new sequence's adapters if there is one, else `key`. Pair with `release_key`."""
        merged = self._in_force.get(key[0][0]) if len(key) == 1 and key[0][1] == 1 else None
        if merged is None:
            return key
        merged.references += 1
        return ((merged.key, 1.0),)

    def release_key(self, key: AdapterKey) -> None:
        """Release the reference of an ended sequence that acquired this key."""
        if self.has(key):
            merged = self._merged[key[0][0]]
            merged.references -= 1
            self._drop_if_unused(merged)

    # --- merges --------------------------------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """The device memory of all merged weights."""
        return sum(merged.report.bytes for merged in self._merged.values())

    def find(self, key: str) -> Merged | None:
        """Return the merge under a key, undone or not."""
        return self._merged.get(key)

    def in_force(self, digest: str) -> Merged | None:
        """Return the merge on which new sequences of this adapter run."""
        return self._in_force.get(digest)

    def add(self, merged: Merged) -> None:
        """Put a merge in force, also one that was undone: new sequences run on its weights, installed in the runner."""
        merged.undone = False
        self._merged[merged.key] = self._in_force[merged.report.digest] = merged
        self._changed.add(merged.key)

    def forget(self, digest: str) -> bool:
        """Undo a digest's merge: no new sequence runs on it. Returns whether there was one."""
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

    # --- reports -------------------------------------------------------------------------------------------

    def take_reports(self) -> list[MergeReport] | None:
        """Return the merges in force if they have changed since the last call, else None."""
        reports = [merged.report for merged in self._in_force.values()]
        if reports == self._reported:
            return None
        self._reported = reports
        return reports

    def take_changed(self) -> set[str]:
        """Return the keys of merges added or removed since the last call."""
        changed, self._changed = self._changed, set()
        return changed
