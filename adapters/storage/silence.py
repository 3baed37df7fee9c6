"""Detects a silent object store, so that few threads wait for it at once, and none for long."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from adapters.storage.versions import RemoteUnavailable

_POLL_SECONDS = 0.1
_SLOT_WAIT = 0.4  # of the silent seconds: a thread's longest wait for a slot


@dataclass(frozen=True)
class RequestLimits:
    """How long, and by how many threads, a store is waited for."""

    answer_seconds: float = 15.0  # for the next bytes of an answer; then it is down. Whole transfers may take longer
    silent_seconds: float = 5.0  # without any answer to a request, after which it is taken to be down
    max_concurrent: int = 48  # waiting threads: fewer than the pool has, so that some stay free for other work


REQUEST_LIMITS = RequestLimits()


class Requests:
    """One process's requests to a store in progress. Used from any thread."""

    def __init__(self, limits: RequestLimits = REQUEST_LIMITS) -> None:
        self._silent_seconds = limits.silent_seconds
        self._slots = threading.Semaphore(limits.max_concurrent)
        self._lock = threading.Lock()
        self._started: dict[int, float] = {}  # thread -> start of its request
        self._last_answer = 0.0
        self._down_until = 0.0

    def note_answer(self) -> None:
        """Note that bytes have arrived."""
        self._last_answer, self._down_until = time.monotonic(), 0.0

    def check(self, seconds: float | None = None) -> None:
        """Raise RemoteUnavailable when the store is taken to be down, or has been silent for `seconds`."""
        seconds = self._silent_seconds if seconds is None else seconds
        with self._lock:
            now, oldest = time.monotonic(), min(self._started.values(), default=None)
        if now < self._down_until or (oldest is not None and now - max(oldest, self._last_answer) > seconds):
            raise RemoteUnavailable("the object store does not answer")

    @contextlib.contextmanager
    def track(self) -> Iterator[None]:
        """Wrap a small request. Raises RemoteUnavailable when the store is silent."""
        self.check()
        while not self._slots.acquire(timeout=_POLL_SECONDS):
            self.check(_SLOT_WAIT * self._silent_seconds)
        thread, began = threading.get_ident(), time.monotonic()
        with self._lock:
            self._started[thread] = began
        try:
            yield
        except RemoteUnavailable:
            if time.monotonic() - max(began, self._last_answer) > self._silent_seconds:
                self._down_until = time.monotonic() + self._silent_seconds
            raise
        except BaseException:  # for example a missing object
            self.note_answer()
            raise
        else:
            self.note_answer()
        finally:
            with self._lock:
                del self._started[thread]
            self._slots.release()


@cache
def shared_requests(url: str, limits: RequestLimits) -> Requests:
    """The `Requests` of a store, shared by all users of it in this process."""
    return Requests(limits)
