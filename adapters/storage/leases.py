"""Leases: which server works on a record that many see.

Whoever claims a record writes a lease into it and counts in it from time to time. Nobody compares clocks: another
server may claim it once it has seen the same count for as long as the lease says. A holder's change is made only while
the record still has its lease, so that one who was thought dead writes nothing over what came after.
"""

import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from adapters.storage.records import Content, Records

LEASE = "lease"  # in a record's content: {"holder", "count", "seconds"}, or None

_Lease = dict[str, Any] | None


class LeaseLost(Exception):
    """Another server works on the record, or none may any more."""


class Leases:
    """The leases of some records, as one server holds and sees them. Used from any thread.

    Args:
        seconds: how long its own last after each renewal.
    """

    def __init__(self, records: Records, seconds: float) -> None:
        self.seconds = seconds
        self._records = records
        self._seen: dict[str, tuple[_Lease, float]] = {}  # key -> what was seen, first when
        self._held: dict[str, tuple[str, float]] = {}  # key -> holder, when its last renewal began
        self._lock = threading.Lock()

    def see(self, key: str, content: Content) -> None:
        """Note how a record's lease stands in the store."""
        lease = content.get(LEASE)
        with self._lock:
            if key not in self._seen or self._seen[key][0] != lease:
                self._seen[key] = lease, time.monotonic()

    def free(self, key: str) -> bool:
        """Whether nobody holds a record, or its holder has not been heard of for as long as its lease lasts."""
        with self._lock:
            lease, since = self._seen.get(key, (None, 0.0))
        return lease is None or time.monotonic() - since > lease["seconds"]

    def held(self) -> list[str]:
        """Keys of the records that are held here."""
        with self._lock:
            return list(self._held)

    def holds(self, key: str) -> bool:
        """Whether this server holds a record."""
        with self._lock:
            return key in self._held

    def left(self, key: str) -> float:
        """For how many seconds a record that is held here can be worked on without another renewal."""
        with self._lock:
            return self.seconds - (time.monotonic() - self._held[key][1]) if key in self._held else 0.0

    def claim(self, key: str, apply: Callable[[Content | None], Content] | None = None) -> Content:
        """Hold a record that is free, or that `apply` makes. Raises LeaseLost when another server was faster."""
        with self._lock:
            seen = self._seen.get(key, (None, 0.0))[0]
        holder, began = uuid.uuid4().hex, time.monotonic()

        def claimed(content: Content | None) -> Content:
            if apply is not None:
                content = apply(content)
            if content is None or (content.get(LEASE) != seen and _holder(content) != holder):
                raise LeaseLost(key)
            return content | {LEASE: {"holder": holder, "count": 0, "seconds": self.seconds}}

        content = self._change(key, claimed)
        with self._lock:
            self._held[key] = holder, began
        return content

    def change(self, key: str, apply: Callable[[Content], Content], *, release: bool = False) -> Content:
        """Change a record that is held here, and renew its lease or end it. Raises LeaseLost, and what `apply` does."""
        with self._lock:
            if key not in self._held:
                raise LeaseLost(key)
            holder, _ = self._held[key]
        began = time.monotonic()

        def renewed(content: Content | None) -> Content:
            if content is None or _holder(content) != holder:
                raise LeaseLost(key)
            after = apply(content)
            lease = content[LEASE] | {"count": content[LEASE]["count"] + 1}
            return after | {LEASE: None if release else lease}

        try:
            content = self._change(key, renewed)
        except LeaseLost:
            self.drop(key)
            raise
        with self._lock:
            if release:
                self._held.pop(key, None)
            elif key in self._held:
                self._held[key] = holder, began
        return content

    def drop(self, key: str) -> None:
        """Hold a record no longer, whatever the store says."""
        with self._lock:
            self._held.pop(key, None)

    def forget(self, key: str) -> None:
        """Hold a record no longer, and know nothing of it."""
        with self._lock:
            self._held.pop(key, None)
            self._seen.pop(key, None)

    def _change(self, key: str, apply: Callable[[Content | None], Content]) -> Content:
        content = self._records.change(key, apply).content
        assert content is not None
        self.see(key, content)
        return content


def _holder(content: Content) -> str | None:
    lease = content.get(LEASE)
    return None if lease is None else lease["holder"]
