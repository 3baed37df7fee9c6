"""A step's statistics: gauges, counts since the last report, and adapters with a changed tier or use.

The cost depends on the running sequences and the changes, not on the number of resident adapters.
"""

from collections import Counter

from adapters.device.cache import AdapterCache
from server.engine.blocks import BlockGroups
from server.engine.merged_registry import MergedRegistry
from server.engine.scheduler import Scheduler
from server.engine.sequence import AdapterKey, Counters
from server.messages.protocol import AdapterUse, Stats


class Reporter:
    """Makes the `Stats` of one engine's steps. Each must be sent, since changes are reported only once."""

    def __init__(self, scheduler: Scheduler, blocks: BlockGroups, cache: AdapterCache, merges: MergedRegistry) -> None:
        self._scheduler = scheduler
        self._blocks = blocks
        self._cache = cache
        self._merges = merges
        self._sequences: Counter[str] = Counter()  # running and waiting, by adapter or merge
        self._running: Counter[str] = Counter()  # running only, as last reported
        self._touched: set[str] = set()  # adapters with sequences queued or ended since the last report
        self._reported: dict[str, AdapterUse] = {}

    def add_sequence(self, key: AdapterKey) -> None:
        """Count a queued sequence."""
        for name, _ in key:
            self._sequences[name] += 1
            self._touched.add(name)

    def remove_sequence(self, key: AdapterKey) -> None:
        """Remove an ended sequence from the counts."""
        for name, _ in key:
            self._sequences[name] -= 1
            if not self._sequences[name]:
                del self._sequences[name]
            self._touched.add(name)

    def stats(self, requests: int, adapters: int, seconds: float) -> Stats:
        """Return the statistics after a step of this many requests and adapters, and this duration."""
        scheduler, cache = self._scheduler, self._cache
        counters, scheduler.counters = scheduler.counters, Counters()
        evictions, cache.evictions = cache.evictions, []
        loads, cache.loads = cache.loads, []
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            waiting_tokens=scheduler.waiting_tokens,
            step_requests=requests,
            step_adapters=adapters,
            step_seconds=seconds,
            kv_usage=self._blocks.usage,
            state_usage=0.0 if self._blocks.states is None else self._blocks.states.usage,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            preemptions=counters.preemptions,
            drafted_tokens=counters.drafted,
            accepted_tokens=counters.accepted,
            evictions=evictions,
            loads=loads,
            adapters=self._changes(),
            merges=self._merges.take_reports(),
        )

    def _changes(self) -> list[AdapterUse]:
        running = Counter(name for sequence in self._scheduler.running for name, _ in sequence.adapter)
        names = self._touched | self._cache.take_changed() | self._merges.take_changed()
        if running != self._running:
            names |= {name for name in running | self._running if running[name] != self._running[name]}
        self._running, self._touched = running, set()
        return [change for name in sorted(names) for change in self._changes_of(name)]

    def _changes_of(self, name: str) -> list[AdapterUse]:
        """Return the changes of one adapter or merge: removal from its previous tier, and its present use."""
        before, now = self._reported.pop(name, None), self._use(name)
        if now is not None:
            self._reported[name] = now
        if now == before:
            return []
        gone = before is not None and (now is None or now.tier != before.tier)
        changes = [AdapterUse(before.digest, before.tier, present=False)] if gone and before is not None else []
        return changes if now is None else [*changes, now]

    def _use(self, name: str) -> AdapterUse | None:
        running = self._running[name]
        waiting = self._sequences[name] - running
        if (merged := self._merges.find(name)) is not None:
            return AdapterUse(merged.report.digest, "merged", merged.rank, running, waiting)
        entry = self._cache.find(name)
        return None if entry is None else AdapterUse(name, entry.tier, entry.rank, running, waiting)
