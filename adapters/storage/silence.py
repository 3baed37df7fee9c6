"""Notices that an object store answers nothing, so that few wait for it at once, and nobody for long."""

import contextlib
import threading
import time
from collections.abc import Iterator
from functools import cache

from adapters.storage.versions import RemoteUnavailable

SILENT_SECONDS = 5.0  # after which a store that was asked, and has answered nothing, is taken to be down
FULL_SECONDS = 2.0  # likewise, for who would be one more than may wait for it
_AT_ONCE = 48  # threads that wait for one store: fewer than there are, so that others find one
_LOOK_SECONDS = 0.1


class Line:
    """What one process has asked a store. Used from any thread."""

    def __init__(self) -> None:
        self._places = threading.Semaphore(_AT_ONCE)
        self._lock = threading.Lock()
        self._asked: dict[int, float] = {}  # thread -> since when it waits
        self._answered = 0.0
        self._down_until = 0.0

    def answered(self) -> None:
        """Something came."""
        self._answered, self._down_until = time.monotonic(), 0.0

    def check(self, seconds: float | None = None) -> None:
        """Raises RemoteUnavailable when the store is silent, or has been for so many seconds."""
        seconds = SILENT_SECONDS if seconds is None else seconds
        with self._lock:
            now, oldest = time.monotonic(), min(self._asked.values(), default=None)
        if now < self._down_until or (oldest is not None and now - max(oldest, self._answered) > seconds):
            raise RemoteUnavailable("it has answered nothing for some time")

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Ask it for something small. Raises RemoteUnavailable when it is silent."""
        self.check()
        while not self._places.acquire(timeout=_LOOK_SECONDS):
            self.check(FULL_SECONDS)
        me, began = threading.get_ident(), time.monotonic()
        with self._lock:
            self._asked[me] = began
        try:
            yield
        except RemoteUnavailable:
            if time.monotonic() - max(began, self._answered) > SILENT_SECONDS:
                self._down_until = time.monotonic() + SILENT_SECONDS
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
def line(url: str) -> Line:
    """The one of a store."""
    return Line()
