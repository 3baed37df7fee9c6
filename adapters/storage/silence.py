"""Detects a silent object store, so that few threads wait for it at once, and none for long."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from adapters.storage.versions import RemoteUnavailable

_LOOK_SECONDS = 0.1
_FULL = 0.4  # of the silent seconds: patience of a thread that waits for a place


@dataclass(frozen=True)
class Patience:
    """How long, and by how many threads, a store is waited for."""

    answer_seconds: float = 15.0  # for the next bytes of an answer; then it is down. Whole transfers may take longer
    silent_seconds: float = 5.0  # without any answer to a request, after which it is taken to be down
    at_once: int = 48  # waiting threads: fewer than the pool has, so that some stay free for other work


PATIENCE = Patience()


class Line:
    """One process's requests to a store in progress. Used from any thread."""

    def __init__(self, patience: Patience = PATIENCE) -> None:
        self._silent = patience.silent_seconds
        self._places = threading.Semaphore(patience.at_once)
        self._lock = threading.Lock()
        self._asked: dict[int, float] = {}  # thread -> start of its request
        self._answered = 0.0
        self._down_until = 0.0

    def answered(self) -> None:
        """Note that bytes have arrived."""
        self._answered, self._down_until = time.monotonic(), 0.0

    def check(self, seconds: float | None = None) -> None:
        """Raise RemoteUnavailable when the store is taken to be down, or has been silent for `seconds`."""
        seconds = self._silent if seconds is None else seconds
        with self._lock:
            now, oldest = time.monotonic(), min(self._asked.values(), default=None)
        if now < self._down_until or (oldest is not None and now - max(oldest, self._answered) > seconds):
            raise RemoteUnavailable("it has answered nothing for some time")

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Wrap a small request. Raises RemoteUnavailable when the store is silent."""
        self.check()
        while not self._places.acquire(timeout=_LOOK_SECONDS):
            self.check(_FULL * self._silent)
        me, began = threading.get_ident(), time.monotonic()
        with self._lock:
            self._asked[me] = began
        try:
            yield
        except RemoteUnavailable:
            if time.monotonic() - max(began, self._answered) > self._silent:
                self._down_until = time.monotonic() + self._silent
            raise
        except BaseException:  # for example a missing object
            self.answered()
            raise
        else:
            self.answered()
        finally:
            with self._lock:
                del self._asked[me]
            self._places.release()


@cache
def line(url: str, patience: Patience) -> Line:
    """The shared `Line` of a store."""
    return Line(patience)
