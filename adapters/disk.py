"""What every writer of files here needs to know of disks: when one is full, and when what was written is safe."""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


class StorageFull(OSError):
    """The disk takes nothing more, being full or read-only, and nothing was kept."""


def is_full(fault: OSError) -> bool:
    """Whether this says that there is no room for a file, none for one so large, or none for any."""
    return fault.errno in _FULL


def why_full(number: int | None) -> str:
    """The same in words, of an error's number."""
    return f"the disk is {'read-only' if number == errno.EROFS else 'full'}; nothing was kept"


@contextmanager
def full_disk_named() -> Iterator[None]:
    """A full disk, in the system's words or SQLite's, becomes StorageFull."""
    try:
        yield
    except OSError as fault:
        if is_full(fault):
            raise StorageFull(fault.errno, why_full(fault.errno)) from None
        raise
    except sqlite3.OperationalError as fault:
        number = {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_READONLY: errno.EROFS}.get(
            fault.sqlite_errorcode & 0xFF
        )
        if number is not None:
            raise StorageFull(number, why_full(number)) from None
        raise


def write_synced(path: Path, content: bytes) -> None:
    """Write a file whole: whoever opens it meanwhile, or after a crash, finds the old content or the new one."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content)
    sync(new)
    new.replace(path)


def sync(path: Path) -> None:
    """Make a file's content, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
