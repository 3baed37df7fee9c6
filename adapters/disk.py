"""Full disks and durable writes, for all writers of files."""

import errno
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
# SQLite reports a full disk as full, and an exceeded quota as a failed write.
_SQLITE = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR_WRITE: errno.EDQUOT,
    sqlite3.SQLITE_READONLY: errno.EROFS,
}
_RUST = re.compile(r"\(os error (\d+)\)")  # a system error in a message of the safetensors library


class StorageFull(OSError):
    """The disk is full or read-only, and nothing was kept."""


def is_disk_full(fault: BaseException) -> bool:
    """Whether an error of the system or a library means that the disk has no room, or none for so large a file."""
    return _errno(fault) in _FULL


def full_disk_reason(fault: BaseException) -> str:
    """The reason in words."""
    return f"the disk is {'read-only' if _errno(fault) == errno.EROFS else 'full'}; nothing was kept"


def _errno(fault: BaseException) -> int | None:
    """The system's number of an error, if it has one."""
    if isinstance(fault, sqlite3.Error):
        code = getattr(fault, "sqlite_errorcode", 0)
        return _SQLITE.get(code) or _SQLITE.get(code & 0xFF)
    if isinstance(fault, OSError):
        return fault.errno
    match = _RUST.search(str(fault))
    return None if match is None else int(match[1])


@contextmanager
def raising_storage_full() -> Iterator[None]:
    """Turn errors of a full disk into StorageFull."""
    try:
        yield
    except Exception as fault:
        if is_disk_full(fault):
            raise StorageFull(_errno(fault), full_disk_reason(fault)) from None
        raise


def write_synced(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader, also after a crash, finds the old content or the new one."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_bytes(content)
        sync(new)
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Make a file's content, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
