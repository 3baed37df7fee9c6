"""The adapter cache: device rows <- host memory <- disk, each tier a least-recently-used cache of the next.

The scheduler asks `acquire` for a sequence's adapters and gets an answer at once; worker threads read files and fill
rows where that takes time; `poll` (between steps) takes in what they finished. An adapter in use is never evicted, a
pinned one only for an adapter that could not run beside it. The rows themselves are pool.py's.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Literal, NamedTuple

from adapters.background import Priority, thread_pool
from adapters.device.host import HostAdapter
from adapters.device.pool import RowPool
from adapters.device.rows import rounded
from adapters.peft_format.sizes import EXTRAS

FRESH_SECONDS = 1.0  # for which an adapter stays that was loaded for a sequence not yet scheduled

Key = tuple[tuple[str, float], ...]  # (digest, weight) of each adapter of a sequence; () is the bare base
Answer = Literal["ready", "loading", "full", "failed"]
Units = Mapping[str, int]  # row units per kind
Owner = tuple[str, int]  # a tenant, and the rows of each kind that its adapters may have together


class Resident(NamedTuple):
    """Where an adapter is, and its largest rank."""

    tier: Literal["device", "host"]
    rank: int


def choose_victims(
    need: Units, free: Units, candidates: Iterable[str], units_of: Callable[[str], Units]
) -> list[str] | None:
    """The adapters to evict until `need` is free; None when not even all candidates would make that room.

    Args:
        need, free: units per kind.
        candidates: digests in the order in which they should leave; passed over where their rows are of no use.
        units_of: units per kind that a candidate gives back.
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
        load: reads one adapter's directory into a `HostAdapter` (runs in the worker thread; raises on a bad one).
        host_bytes: bound on the host tier; an adapter larger than it passes through.
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
        self._owners: dict[str, Owner] = {}  # of adapters that were last asked for by one with a limit
        self._host: OrderedDict[str, HostAdapter] = OrderedDict()  # least recently used first
        self._held = 0  # bytes, in the host tier
        self._device: OrderedDict[str, int] = OrderedDict()  # digest -> rank, least recently used first
        self._references: Counter[str] = Counter()
        self._loading: dict[str, tuple[Future[HostAdapter], float]] = {}
        self._filling: dict[str, tuple[Future[None], HostAdapter, float]] = {}  # on their way to the device, since when
        self._fresh: dict[str, float] = {}  # digest -> when it was filled; until first acquired
        self._errors: dict[str, str] = {}
        self._forgotten: set[str] = set()
        self._pinned: dict[str, str] = {}  # digest -> path, in order of preference
        self._reader = thread_pool(1, "adapter-reader", priority)
        self._filler = thread_pool(1, "adapter-filler", priority)
        self.loads: list[tuple[str, float]] = []  # (digest, seconds) since the reader of this list last cleared it
        self.evictions: list[str] = []
        self._changed: set[str] = set()  # digests that came into a tier or left one

    # --- what the scheduler asks ---------------------------------------------------------------

    def register(self, digest: str, path: str, owner: Owner | None = None) -> None:
        """Say where an adapter's files are. A digest is forgotten no longer once registered again."""
        self._paths[digest] = path
        if owner is not None:
            self._owners[digest] = owner
        elif self._owners:
            self._owners.pop(digest, None)
        self._forgotten.discard(digest)

    def prefetch(self, digest: str) -> None:
        """Start reading an adapter that will be asked for, unless the host tier is full (it would push others out)."""
        if digest in self._device or digest in self._host or digest in self._errors:
            return
        if self._held < self._host_bytes:
            self._start_loading(digest)

    def insert(self, adapter: HostAdapter) -> None:
        """Take an adapter that has been read into the host tier."""
        self._let_go(adapter.digest)
        self._host[adapter.digest] = adapter
        self._held += adapter.bytes
        self._changed.add(adapter.digest)

    def pin(self, adapters: Mapping[str, str]) -> None:
        """Keep these on the device, and no longer those named before. `adapters`: digest -> path."""
        self._pinned = dict(adapters)
        for digest, path in adapters.items():
            self.register(digest, path, self._owners.get(digest))

    def acquire(self, key: Key) -> Answer:
        """Take a reference on every adapter of `key` if all can be on the device now.

        "ready": references taken. "loading": on their way. "full": rows are held by adapters in use.
        "failed": cannot be loaded; `error(key)` says why, once.
        """
        digests = [digest for digest, _ in key]
        if any(digest in self._errors for digest in digests):
            return "failed"
        missing = [digest for digest in digests if digest not in self._device]
        here = [digest for digest in missing if digest in self._host and digest not in self._filling]
        # Those that are here move up at once: while the others are read, the host tier may have to let them go.
        if here and not self._place(here, keep=digests):
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
        """Give back the references of `acquire`."""
        for digest, _ in key:
            self._references[digest] -= 1
            if not self._references[digest]:
                del self._references[digest]
                if digest in self._forgotten:
                    self._drop(digest)

    def error(self, key: Key) -> str:
        """Why `acquire(key)` failed. Reading it clears it, so that a later request tries again."""
        return "; ".join(self._errors.pop(digest) for digest, _ in key if digest in self._errors)

    # --- between steps ---------------------------------------------------------------------------

    @property
    def loading(self) -> bool:
        """Whether the worker thread has something under way."""
        return bool(self._loading or self._filling)

    def poll(self) -> None:
        """Take in the adapters that the worker thread has read, or put on the device."""
        for digest, (filled, adapter, started) in list(self._filling.items()):
            if not filled.done():
                continue
            del self._filling[digest]
            fault = filled.exception()
            if fault is None:
                self._arrive(adapter)
                if digest not in self._pinned:
                    self._fresh[digest] = time.monotonic()
                if adapter.file is not None:
                    self.loads.append((digest, time.monotonic() - started))
            else:
                self._errors[digest] = str(fault) or type(fault).__name__
                self._pool.remove(digest)
                self._let_go(digest)
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
                self._bring_back(digest)
        if arrived:
            self._trim_host(arrived)

    def forget(self, digest: str) -> None:
        """Drop an adapter's rows and host copy, now or when its last reference is released."""
        self._forgotten.add(digest)
        if digest not in self._references:
            self._drop(digest)

    def find(self, digest: str) -> Resident | None:
        """An adapter on the device or, failing that, in host memory; None when it is in neither."""
        if digest in self._device:
            return Resident("device", self._device[digest])
        adapter = self._host.get(digest)
        return None if adapter is None else Resident("host", adapter.rank)

    def take_changed(self) -> set[str]:
        """Adapters that came into a tier or left one since the last call; `find` has where each of them is now."""
        changed, self._changed = self._changed, set()
        return changed

    def close(self) -> None:
        for worker in (self._reader, self._filler):
            worker.shutdown(wait=False, cancel_futures=True)

    # --- the tiers -------------------------------------------------------------------------------

    def _bring_back(self, digest: str) -> None:
        """See a pinned adapter onto the device, as soon as there is room beside those in use and the other pins."""
        if digest in self._host:
            self._place([digest], keep=self._pinned)
        elif digest not in self._errors:  # until a request has been given the error
            self._start_loading(digest)

    def _start_loading(self, digest: str) -> None:
        if digest not in self._loading and digest not in self._filling:
            self._loading[digest] = (self._reader.submit(self._load, digest, self._paths[digest]), time.monotonic())

    def _let_go(self, digest: str) -> None:
        """Drop an adapter from the host tier, if it is there."""
        adapter = self._host.pop(digest, None)
        if adapter is not None:
            self._held -= adapter.bytes
            self._changed.add(digest)

    def _trim_host(self, arrived: set[str]) -> None:
        """Keep the host tier within its bound; new arrivals stay, they are on their way to the device."""
        leaving = (digest for digest in list(self._host) if digest not in arrived)
        while self._held > self._host_bytes and (digest := next(leaving, None)) is not None:
            self._let_go(digest)

    def _place(self, digests: Sequence[str], keep: Collection[str]) -> bool:
        """Copy adapters from the host tier to the device, or begin to, evicting idle ones. False: there is no room."""
        adapters = [self._host[digest] for digest in digests]
        need: Counter[str] = Counter()
        for adapter in adapters:
            need.update({kind: rounded(units) for kind, units in adapter.units(self._pool.kinds).items()})
        self._leave_for_own(digests, need, keep)
        victims = choose_victims(need, self._pool.free, self._candidates(need, keep), self._pool.units_of)
        if victims is None:
            return False
        for digest in victims:
            self._evict(digest)
        return all(self._fill(adapter) for adapter in adapters)

    def _candidates(self, need: Units, keep: Collection[str]) -> Iterator[str]:
        """Adapters that may leave the device for those that need so much, in the order in which they should."""
        yield from (digest for digest in self._device if digest not in self._pinned and self._idle(digest, keep))
        staying = (self._pinned.keys() | set(keep)) & self._device.keys()
        if not self._fits_beside(need, staying):
            yield from [digest for digest in self._device if digest in self._pinned and self._idle(digest, keep)]

    def _idle(self, digest: str, keep: Collection[str]) -> bool:
        used = digest in self._references or digest in keep
        return not used and self._fresh.get(digest, 0.0) < time.monotonic() - FRESH_SECONDS

    def _leave_for_own(self, digests: Sequence[str], need: Units, keep: Collection[str]) -> None:
        """Evict idle adapters of a tenant that would have more rows than it may with these, which it asks for."""
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
            if digest in self._device and digest not in self._pinned and self._idle(digest, keep):
                held.subtract(self._pool.units_of(digest))
                self._evict(digest)

    def _fits_beside(self, need: Units, staying: Collection[str]) -> bool:
        """Whether so much would be free if these alone were on the device."""
        room = Counter(self._pool.capacity)
        for digest in staying:
            room.subtract(self._pool.units_of(digest))
        return _covers(room, need)

    def _fill(self, adapter: HostAdapter) -> bool:
        """Reserve an adapter's rows and copy it there, or begin to."""
        if not self._pool.reserve(adapter, compact=not self._filling):
            return False  # for now: rows that are being filled cannot be moved
        if adapter.digest in self._host:
            self._host.move_to_end(adapter.digest)
        if adapter.fills_at_once:
            self._pool.fill(adapter)
            self._arrive(adapter)
        else:
            filled = self._filler.submit(self._pool.fill, adapter)
            self._filling[adapter.digest] = (filled, adapter, time.monotonic())
        return True

    def _arrive(self, adapter: HostAdapter) -> None:
        self._device[adapter.digest] = adapter.rank
        self._changed.add(adapter.digest)

    def _evict(self, digest: str) -> None:
        self._fresh.pop(digest, None)
        self._pool.remove(digest)
        del self._device[digest]
        self._changed.add(digest)
        self.evictions.append(digest)

    def _drop(self, digest: str) -> None:
        if digest in self._filling:  # it has rows to give back once they are filled
            return
        self._forgotten.discard(digest)
        if digest in self._device:
            self._evict(digest)
        self._let_go(digest)  # its path stays: a sequence may still be waiting for it
