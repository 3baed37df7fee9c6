"""Leases: which of many servers works on a record.

The holder writes a lease into the record and increments its count from time to time. No clocks are compared: another
server may claim the record once it has seen the same count for the lease's seconds. A holder's change is made only
while the record still has its lease, so a holder wrongly presumed dead overwrites nothing newer.
"""

import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from adapters.storage.records import Content, Records

LEASE = "lease"  # key in a record's content: {"holder", "count", "seconds"}, or None

_Lease = dict[str, Any] | None


class LeaseLost(Exception):
    """Another server works on the record, or nobody may any more."""


class Leases:
    """The leases of some records, as seen and held by one server. Used from any thread.

    Args:
        seconds: the duration of its own leases from each renewal.
    """

    def __init__(self, records: Records, seconds: float) -> None:
        self.seconds = seconds
        self._records = records
        self._seen: dict[str, tuple[_Lease, float]] = {}  # key -> the lease as seen, first seen when
        self._held: dict[str, tuple[str, float]] = {}  # key -> holder, start of its last renewal
        self._lock = threading.Lock()

    def observe(self, key: str, content: Content) -> None:
        """Note the lease in a record's content as read from the store."""
        lease = content.get(LEASE)
        with self._lock:
            if key not in self._seen or self._seen[key][0] != lease:
                self._seen[key] = lease, time.monotonic()

    def is_free(self, key: str) -> bool:
        """Whether nobody holds a record, or its holder has not renewed the lease for the lease's seconds."""
        with self._lock:
            lease, since = self._seen.get(key, (None, 0.0))
        return lease is None or time.monotonic() - since > lease["seconds"]

    def held_keys(self) -> list[str]:
        """Keys of the records held by this server."""
        with self._lock:
            return list(self._held)

    def holds(self, key: str) -> bool:
        """Whether this server holds a record."""
        with self._lock:
            return key in self._held

    def seconds_left(self, key: str) -> float:
        """Seconds for which a record held here can be worked on without another renewal."""
        with self._lock:
            return self.seconds - (time.monotonic() - self._held[key][1]) if key in self._held else 0.0

    def claim(self, key: str, apply: Callable[[Content | None], Content] | None = None) -> Content:
        """Claim a free record, or one made by `apply`. Raises LeaseLost when another server was faster."""
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
        """Change a record held here, and renew its lease or end it. Raises LeaseLost, and the errors of `apply`."""
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
        """Give up a record in this process, without changing the store."""
        with self._lock:
            self._held.pop(key, None)

    def forget(self, key: str) -> None:
        """Give up a record in this process, and forget its lease as seen."""
        with self._lock:
            self._held.pop(key, None)
            self._seen.pop(key, None)

    def _change(self, key: str, apply: Callable[[Content | None], Content]) -> Content:
        content = self._records.change(key, apply).content
        assert content is not None
        self.observe(key, content)
        return content


def _holder(content: Content) -> str | None:
    lease = content.get(LEASE)
    return None if lease is None else lease["holder"]
