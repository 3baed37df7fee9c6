"""What every writer of files here needs to know of disks: when one is full, and when what was written is safe."""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class StorageFull(OSError):
    """The disk is full, and nothing was kept."""


def is_full(fault: OSError) -> bool:
    """Whether this says that there is no room for a file, or none for one so large."""
    return fault.errno in _FULL


@contextmanager
def full_disk_named() -> Iterator[None]:
    """A full disk, in the system's words or SQLite's, becomes StorageFull."""
    try:
        yield
    except OSError as fault:
        if is_full(fault):
            raise StorageFull(fault.errno, "the disk is full; nothing was kept") from None
        raise
    except sqlite3.OperationalError as fault:
        if fault.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise StorageFull(errno.ENOSPC, "the disk is full; nothing was kept") from None
        raise


def sync(path: Path) -> None:
    """Make a file's content, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
