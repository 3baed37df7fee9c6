"""Raises an error where the server calls a database in the thread of an event loop, which would block all requests."""

import asyncio
import contextlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.storage.database import Database

TESTS = str(Path(__file__).parent.parent)


class AskedOnTheLoop(AssertionError):
    """A database call blocked an event loop."""


def check() -> None:
    """Raise if an event loop runs in this thread, unless a test's own coroutine made the call."""
    if asyncio._get_running_loop() is None:
        return
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_flags & (inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            if code.co_filename.startswith(TESTS):
                return
            break
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    raise AskedOnTheLoop("a database call on the event loop: use asyncio.to_thread")


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Watch every database of this process; errors that the server swallowed are raised at the end."""
    caught: list[AskedOnTheLoop] = []

    def watched(real: Any) -> Any:
        def call(self: Database, **options: Any) -> Any:
            try:
                check()
            except AskedOnTheLoop as fault:
                caught.append(fault)
                raise
            return real(self, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("transaction", "reading"):
            patch.setattr(Database, name, watched(getattr(Database, name)))
        yield
    if caught:
        raise caught[0]
