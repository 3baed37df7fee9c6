"""Notices that an object store answers nothing, so that few wait for it at once, and nobody for long."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from adapters.storage.versions import RemoteUnavailable

_LOOK_SECONDS = 0.1
_FULL = 0.4  # of the silent seconds, for who would be one more than may wait for it


@dataclass(frozen=True)
class Patience:
    """How long a store is waited for, and by how many."""

    answer_seconds: float = 15.0  # for the next bytes of an answer; then it is down. Whole transfers may take longer
    silent_seconds: float = 5.0  # after which one that was asked, and has answered nothing, is taken to be down
    at_once: int = 48  # threads that wait for it: fewer than there are, so that others find one


PATIENCE = Patience()


class Line:
    """What one process has asked a store. Used from any thread."""

    def __init__(self, patience: Patience = PATIENCE) -> None:
        self._silent = patience.silent_seconds
        self._places = threading.Semaphore(patience.at_once)
        self._lock = threading.Lock()
        self._asked: dict[int, float] = {}  # thread -> since when it waits
        self._answered = 0.0
        self._down_until = 0.0

    def answered(self) -> None:
        """Something came."""
        self._answered, self._down_until = time.monotonic(), 0.0

    def check(self, seconds: float | None = None) -> None:
        """Raises RemoteUnavailable when the store is silent, or has been for so many seconds."""
        seconds = self._silent if seconds is None else seconds
        with self._lock:
            now, oldest = time.monotonic(), min(self._asked.values(), default=None)
        if now < self._down_until or (oldest is not None and now - max(oldest, self._answered) > seconds):
            raise RemoteUnavailable("it has answered nothing for some time")

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Ask it for something small. Raises RemoteUnavailable when it is silent."""
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
        except BaseException:  # there is no such object, say
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
    """The one of a store."""
    return Line(patience)
