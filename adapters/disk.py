"""What every writer of files here needs to know of disks: when one is full, and when what was written is safe."""

import errno
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_RUST = re.compile(r"\(os error (\d+)\)")  # how the safetensors library tells of a fault of the system


class StorageFull(OSError):
    """The disk is full, and nothing was kept."""


def is_full(fault: BaseException) -> bool:
    """Whether this says, in the words of the system or a library, that there is no room for a file or one so large."""
    if isinstance(fault, sqlite3.OperationalError):  # it calls a full disk full, and a quota a failed write
        return fault.sqlite_errorcode in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE}
    if isinstance(fault, OSError):
        return fault.errno in _FULL
    number = _RUST.search(str(fault))
    return number is not None and int(number[1]) in _FULL


@contextmanager
def full_disk_named() -> Iterator[None]:
    """A full disk becomes StorageFull."""
    try:
        yield
    except Exception as fault:
        if is_full(fault):
            raise StorageFull(errno.ENOSPC, "the disk is full; nothing was kept") from None
        raise


def sync(path: Path) -> None:
    """Make a file's content, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
