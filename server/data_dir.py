"""The data directory at start: locked for one server, its databases opened, or set aside and made anew if damaged."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from adapters.storage import entries, lost
from adapters.storage.database import DatabaseBusy, DatabaseDamaged, NewerLayoutError
from adapters.storage.names import LocalNames
from server.settings import SettingError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Lock the directory against other servers; make it if missing. Raises SettingError."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise SettingError(f"--data-dir: {data_dir} cannot be made: {fault.strerror}") from None
    lock = FileLock(data_dir / "server.lock")
    with contextlib.ExitStack() as held:
        try:
            lock.acquire(timeout=0)
            held.callback(lock.release)
        except (Timeout, BlockingIOError):
            raise SettingError(f"--data-dir: another server is using {data_dir}") from None
        except OSError as fault:
            log.warning("no lock file can be made in %s (%s)", data_dir, fault.strerror)
            _lock_directory(data_dir, held)
        yield


def _lock_directory(data_dir: Path, held: contextlib.ExitStack) -> None:
    """Lock the directory instead of a file in it, on a read-only disk."""
    with as_setting_error():
        descriptor = os.open(data_dir, os.O_RDONLY)
        held.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SettingError(f"--data-dir: another server is using {data_dir}") from None
    except OSError as fault:
        raise SettingError(f"--data-dir: {data_dir} cannot be locked ({fault.strerror})") from None


@contextlib.contextmanager
def as_setting_error() -> Iterator[None]:
    """Turn faults of the databases and the disk at start into SettingError, one line for the operator."""
    try:
        yield
    except (NewerLayoutError, DatabaseBusy, DatabaseDamaged, OSError) as fault:
        raise SettingError(f"--data-dir: {fault}") from None


def open_names(data_dir: Path, busy_seconds: float) -> LocalNames:
    """Open the names of this disk's adapters. A damaged database is set aside and made anew from the versions.

    Raises SettingError.
    """
    path = data_dir / "adapters.db"
    with as_setting_error():
        try:
            return LocalNames(path, busy_seconds)
        except DatabaseDamaged as fault:
            aside = lost.set_aside_database(path)
            names = LocalNames(path, busy_seconds)
            count = restore_names(names, lost.entries(data_dir / "adapters" / "versions"))
            log.error("%s: set aside as %s; %d names were restored from their versions", fault, aside.name, count)
            return names


def restore_names(names: LocalNames, versions: list[Path]) -> int:
    """Restore names from the versions in these directories; for a name that exists, add them as older versions. Return
    the number of names."""
    known = {(found.current.tenant, found.current.name): found for found in names.load(Path)}
    restored = entries.restore_pointers(versions)
    for owner, pointer in restored.items():
        names.save(*owner, known[owner].with_older_versions(pointer.versions) if owner in known else pointer)
    return len(restored)
