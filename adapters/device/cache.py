"""The adapter cache: device rows <- host memory <- disk, each tier a least-recently-used cache of the next.

`acquire` answers at once whether a sequence's adapters are resident; worker threads read files and fill rows; `poll`
(between steps) takes in the finished ones. An adapter in use is never evicted, a pinned one only for an adapter that
does not fit beside the pinned ones. The rows themselves are in pool.py.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Literal, NamedTuple

from adapters.background import Priority, thread_pool
from adapters.device.host import HostAdapter
from adapters.device.pool import RowPool
from adapters.device.rows import round_up
from adapters.peft_format.sizes import EXTRAS

FRESH_SECONDS = 1.0  # time for which a newly loaded adapter is not evicted before its first use

Key = tuple[tuple[str, float], ...]  # (digest, weight) of each adapter of a sequence; () is the bare base
Answer = Literal["ready", "loading", "full", "failed"]
Units = Mapping[str, int]  # row units per kind
Owner = tuple[str, int]  # a tenant, and the limit on its adapters' rows of each kind together


class Resident(NamedTuple):
    """An adapter's tier and largest rank."""

    tier: Literal["device", "host"]
    rank: int


def choose_victims(
    need: Units, free: Units, candidates: Iterable[str], units_of: Callable[[str], Units]
) -> list[str] | None:
    """Return the adapters to evict until `need` is free; None if evicting all candidates is not enough.

    Args:
        need, free: units per kind.
        candidates: digests in order of eviction; skipped if their rows do not help.
        units_of: returns a candidate's units per kind.
    """
    room = Counter(free)
    victims: list[str] = []
    remaining = iter(candidates)
    while not _covers(room, need):
        digest = next(remaining, None)
        if digest is None:
            return None
        held = units_of(digest)
        if any(room[kind] < need.get(kind, 0) for kind in held):
            victims.append(digest)
            room.update(held)
    return victims


def _covers(room: Units, need: Units) -> bool:
    return all(room.get(kind, 0) >= units for kind, units in need.items())


class AdapterCache:
    """Tiers of adapters over one `RowPool`.

    Args:
        load: reads one adapter's directory into a `HostAdapter` (in a worker thread; raises on a bad one).
        host_bytes: bound on the host tier; larger adapters only pass through it.
        priority: of the worker threads.
    """

    def __init__(
        self,
        pool: RowPool,
        load: Callable[[str, str], HostAdapter],
        host_bytes: int,
        priority: Priority = "low",
    ) -> None:
        self._pool = pool
        self._load = load
        self._host_bytes = host_bytes
        self._paths: dict[str, str] = {}
        self._owners: dict[str, Owner] = {}  # by digest, if last registered by a tenant with a limit
        self._host: OrderedDict[str, HostAdapter] = OrderedDict()  # least recently used first
        self._host_bytes_used = 0  # bytes in the host tier
        self._device: OrderedDict[str, int] = OrderedDict()  # digest -> rank, least recently used first
        self._references: Counter[str] = Counter()
        self._loading: dict[str, tuple[Future[HostAdapter], float]] = {}
        self._filling: dict[str, tuple[Future[None], HostAdapter, float]] = {}  # being copied to the device; start time
        self._fresh: dict[str, float] = {}  # digest -> time of filling, until first acquired
        self._errors: dict[str, str] = {}
        self._forgotten: set[str] = set()
        self._pinned: dict[str, str] = {}  # digest -> path, in order of preference
        self._reader = thread_pool(1, "adapter-reader", priority)
        self._filler = thread_pool(1, "adapter-filler", priority)
        self.loads: list[tuple[str, float]] = []  # (digest, seconds); cleared by the reader, like `evictions`
        self.evictions: list[str] = []
        self._changed: set[str] = set()  # digests that entered or left a tier

    # --- requests ------------------------------------------------------------------------------

    def register(self, digest: str, path: str, owner: Owner | None = None) -> None:
        """Register the directory of an adapter's files. Undoes `forget`."""
        self._paths[digest] = path
        if owner is not None:
            self._owners[digest] = owner
        elif self._owners:
            self._owners.pop(digest, None)
        self._forgotten.discard(digest)

    def prefetch(self, digest: str) -> None:
        """Start reading an adapter that will be acquired, unless the host tier is full (others would be evicted)."""
        if digest in self._device or digest in self._host or digest in self._errors:
            return
        if self._host_bytes_used < self._host_bytes:
            self._start_loading(digest)

    def insert(self, adapter: HostAdapter) -> None:
        """Put an adapter into the host tier."""
        self._evict_from_host(adapter.digest)
        self._host[adapter.digest] = adapter
        self._host_bytes_used += adapter.bytes
        self._changed.add(adapter.digest)

    def pin(self, adapters: Mapping[str, str]) -> None:
        """Pin these adapters to the device, instead of those of the last call. `adapters`: digest -> path."""
        self._pinned = dict(adapters)
        for digest, path in adapters.items():
            self.register(digest, path, self._owners.get(digest))

    def acquire(self, key: Key) -> Answer:
        """Take a reference to every adapter of `key` if all can be on the device now.

        "ready": references taken. "loading": being loaded. "full": rows are held by adapters in use.
        "failed": cannot be loaded; `error(key)` returns the reason, once.
        """
        digests = [digest for digest, _ in key]
        if any(digest in self._errors for digest in digests):
            return "failed"
        missing = [digest for digest in digests if digest not in self._device]
        in_host = [digest for digest in missing if digest in self._host and digest not in self._filling]
        # Adapters in the host tier are placed at once: while the others are read, they might be evicted from it.
        if in_host and not self._place(in_host, keep=digests):
            return "full"
        missing = [digest for digest in missing if digest not in self._device]
        for digest in missing:
            self._start_loading(digest)
        if missing:
            return "loading"
        for digest in digests:
            self._fresh.pop(digest, None)
            self._references[digest] += 1
            self._device.move_to_end(digest)
        return "ready"

    def release(self, key: Key) -> None:
        """Release the references taken by `acquire`."""
        for digest, _ in key:
            self._references[digest] -= 1
            if not self._references[digest]:
                del self._references[digest]
                if digest in self._forgotten:
                    self._drop(digest)

    def error(self, key: Key) -> str:
        """Return and clear the reason why `acquire(key)` failed, so that a later request tries again."""
        return "; ".join(self._errors.pop(digest) for digest, _ in key if digest in self._errors)

    # --- between steps ---------------------------------------------------------------------------

    @property
    def loading(self) -> bool:
        """Whether a worker thread is loading or filling an adapter."""
        return bool(self._loading or self._filling)

    def poll(self) -> None:
        """Take in the adapters that worker threads have read or copied to the device."""
        for digest, (filled, adapter, started) in list(self._filling.items()):
            if not filled.done():
                continue
            del self._filling[digest]
            fault = filled.exception()
            if fault is None:
                self._add_resident(adapter)
                if digest not in self._pinned:
                    self._fresh[digest] = time.monotonic()
                if adapter.file is not None:
                    self.loads.append((digest, time.monotonic() - started))
            else:
                self._errors[digest] = str(fault) or type(fault).__name__
                self._pool.remove(digest)
                self._evict_from_host(digest)
            if digest in self._forgotten:
                self._drop(digest)
        arrived: set[str] = set()
        for digest, (future, started) in list(self._loading.items()):
            if not future.done():
                continue
            del self._loading[digest]
            fault = future.exception()
            if fault is not None:
                self._errors[digest] = str(fault) or type(fault).__name__
                continue
            adapter = future.result()
            self.insert(adapter)
            if adapter.file is None:
                self.loads.append((digest, time.monotonic() - started))
            arrived.add(digest)
        for digest in self._pinned:
            if digest not in self._device and digest not in self._filling:
                self._place_pinned(digest)
        if arrived:
            self._trim_host(arrived)

    def forget(self, digest: str) -> None:
        """Drop an adapter's rows and host copy, now or when its last reference is released."""
        self._forgotten.add(digest)
        if digest not in self._references:
            self._drop(digest)

    def find(self, digest: str) -> Resident | None:
        """Return an adapter's highest tier; None if it is neither on the device nor in host memory."""
        if digest in self._device:
            return Resident("device", self._device[digest])
        adapter = self._host.get(digest)
        return None if adapter is None else Resident("host", adapter.rank)

    def take_changed(self) -> set[str]:
        """Return the adapters that entered or left a tier since the last call; `find` has their present tiers."""
        changed, self._changed = self._changed, set()
        return changed

    def close(self) -> None:
        for worker in (self._reader, self._filler):
            worker.shutdown(wait=False, cancel_futures=True)

    # --- the tiers -------------------------------------------------------------------------------

    def _place_pinned(self, digest: str) -> None:
        """Place a pinned adapter on the device, once there is room beside those in use and the other pins."""
        if digest in self._host:
            self._place([digest], keep=self._pinned)
        elif digest not in self._errors:  # not again before a request has received the error
            self._start_loading(digest)

    def _start_loading(self, digest: str) -> None:
        if digest not in self._loading and digest not in self._filling:
            self._loading[digest] = (self._reader.submit(self._load, digest, self._paths[digest]), time.monotonic())

    def _evict_from_host(self, digest: str) -> None:
        """Evict an adapter from the host tier, if it is there."""
        adapter = self._host.pop(digest, None)
        if adapter is not None:
            self._host_bytes_used -= adapter.bytes
            self._changed.add(digest)

    def _trim_host(self, arrived: set[str]) -> None:
        """Keep the host tier within its bound; new arrivals stay, since they are about to be placed."""
        leaving = (digest for digest in list(self._host) if digest not in arrived)
        while self._host_bytes_used > self._host_bytes and (digest := next(leaving, None)) is not None:
            self._evict_from_host(digest)

    def _place(self, digests: Sequence[str], keep: Collection[str]) -> bool:
        """Copy adapters from the host tier to the device, or start to, evicting idle ones. False: there is no room."""
        adapters = [self._host[digest] for digest in digests]
        need: Counter[str] = Counter()
        for adapter in adapters:
            need.update({kind: round_up(units) for kind, units in adapter.units(self._pool.kinds).items()})
        self._enforce_owner_limit(digests, need, keep)
        victims = choose_victims(need, self._pool.free, self._candidates(need, keep), self._pool.units_of)
        if victims is None:
            return False
        for digest in victims:
            self._evict(digest)
        return all(self._fill(adapter) for adapter in adapters)

    def _candidates(self, need: Units, keep: Collection[str]) -> Iterator[str]:
        """Yield the adapters that may be evicted from the device for this need, in order of eviction."""
        yield from (
            digest for digest in self._device if digest not in self._pinned and self._is_evictable(digest, keep)
        )
        staying = (self._pinned.keys() | set(keep)) & self._device.keys()
        if not self._fits_beside(need, staying):
            yield from [
                digest for digest in self._device if digest in self._pinned and self._is_evictable(digest, keep)
            ]

    def _is_evictable(self, digest: str, keep: Collection[str]) -> bool:
        used = digest in self._references or digest in keep
        return not used and self._fresh.get(digest, 0.0) < time.monotonic() - FRESH_SECONDS

    def _enforce_owner_limit(self, digests: Sequence[str], need: Units, keep: Collection[str]) -> None:
        """Evict idle adapters of these adapters' tenant, if these would take it above its limit."""
        owner = self._owners.get(digests[0])
        if owner is None:
            return
        held = Counter(need)
        own = [digest for digest in (*self._device, *self._filling) if self._owners.get(digest, ("",))[0] == owner[0]]
        for digest in own:
            held.update(self._pool.units_of(digest))
        for digest in own:
            if all(units <= owner[1] for kind, units in held.items() if kind != EXTRAS):
                break
            if digest in self._device and digest not in self._pinned and self._is_evictable(digest, keep):
                held.subtract(self._pool.units_of(digest))
                self._evict(digest)

    def _fits_beside(self, need: Units, staying: Collection[str]) -> bool:
        """Whether `need` would be free if only the `staying` adapters were on the device."""
        room = Counter(self._pool.capacity)
        for digest in staying:
            room.subtract(self._pool.units_of(digest))
        return _covers(room, need)

    def _fill(self, adapter: HostAdapter) -> bool:
        """Reserve an adapter's rows and copy it there, or start to."""
        if not self._pool.reserve(adapter, compact=not self._filling):
            return False  # for now: rows being filled cannot be moved
        if adapter.digest in self._host:
            self._host.move_to_end(adapter.digest)
        if adapter.fills_at_once:
            self._pool.fill(adapter)
            self._add_resident(adapter)
        else:
            filled = self._filler.submit(self._pool.fill, adapter)
            self._filling[adapter.digest] = (filled, adapter, time.monotonic())
        return True

    def _add_resident(self, adapter: HostAdapter) -> None:
        self._device[adapter.digest] = adapter.rank
        self._changed.add(adapter.digest)

    def _evict(self, digest: str) -> None:
        self._fresh.pop(digest, None)
        self._pool.remove(digest)
        del self._device[digest]
        self._changed.add(digest)
        self.evictions.append(digest)

    def _drop(self, digest: str) -> None:
        if digest in self._filling:  # its rows are released once they are filled
            return
        self._forgotten.discard(digest)
        if digest in self._device:
            self._evict(digest)
        self._evict_from_host(digest)  # the path stays: a sequence may still be waiting for it
