"""Temporary directories of processes. Those left by killed processes are removed by `remove_stale`."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "lorakeet-"
_LOCK = ".lock"  # held by the process that uses the directory
_SHORT = "/tmp"  # in place of a temporary directory with a path too long for sockets
_SOCKET_PATH = 107  # bytes: sun_path of unix(7), less its end


@contextmanager
def scratch(socket: str = "") -> Iterator[Path]:
    """A new private directory, removed on exit. A socket named `socket` can be bound in it, however long TMPDIR is."""
    path = Path(tempfile.mkdtemp(prefix=_PREFIX))
    if socket and len(os.fsencode(path / socket)) > _SOCKET_PATH:
        path.rmdir()
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_SHORT))
    # Locked before it gets its name, so that `remove_stale` never finds it unlocked.
    lock = os.open(path / f"{_LOCK}.new", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (path / f"{_LOCK}.new").rename(path / _LOCK)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def remove_stale() -> list[Path]:
    """Remove this user's directories of dead processes; return their paths."""
    swept = []
    for path in {path for parent in (tempfile.gettempdir(), _SHORT) for path in Path(parent).glob(f"{_PREFIX}*")}:
        with suppress(OSError):  # not one of ours, or in use
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                lock = os.open(_LOCK, os.O_RDWR | os.O_NOFOLLOW, dir_fd=directory)
            finally:
                os.close(directory)
            try:
                if os.fstat(lock).st_uid != os.geteuid():
                    continue
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
                swept.append(path)
            finally:
                os.close(lock)
    return swept
