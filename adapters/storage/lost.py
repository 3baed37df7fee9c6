"""Files unknown to any database: set aside in `lost+found/`, never deleted on a guess.

A change of several steps (a version placed, then named; a file's row deleted, then its bytes) is marked while it is
pending. At the next start, a file unknown to the database is removed if it has a mark, since it was never acknowledged.
Without a mark it was once known, and the database has lost it; `lorakeet doctor` handles these.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

LOST_AND_FOUND = "lost+found"
PENDING = ".pending"
_REMOVING_SUFFIX = ".gone"

log = logging.getLogger(__name__)


class Pending:
    """Marks of pending changes below one directory, by the changed file's name; kept beside that directory."""

    def __init__(self, root: Path) -> None:
        self._directory = root.parent / PENDING / root.name

    def mark(self, *names: str) -> None:
        """Mark a change before its first step. On a full disk the change goes on without a mark."""
        with contextlib.suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            for name in names:
                (self._directory / name).touch()

    def clear(self, *names: str) -> None:
        """Remove the marks after the last step."""
        for name in names:
            with contextlib.suppress(OSError):
                (self._directory / name).unlink(missing_ok=True)

    def names(self) -> set[str]:
        """Names of the changes that were pending when the last process died."""
        return {path.name for path in entries(self._directory)}


def entries(directory: Path) -> list[Path]:
    """The entries of a directory without hidden files; none if the directory is missing."""
    with contextlib.suppress(OSError):
        return sorted(path for path in directory.iterdir() if path.name[0] != ".")
    return []


def remove_or_set_aside(unknown: Iterable[Path], pending: Pending, aside: Path, database: str) -> None:
    """Once, at start: of the paths unknown to `database`, remove those with a mark, and move the rest to `aside`."""
    marked = pending.names()
    lost = []
    for path in unknown:
        if path.name in marked:
            remove(path)
        else:
            lost.append(path)
    pending.clear(*marked)
    if lost:
        _set_aside(lost, aside, database)


def _set_aside(lost: list[Path], aside: Path, database: str) -> None:
    try:
        aside.mkdir(parents=True, exist_ok=True)
        for path in lost:
            path.rename(unused_path(aside / path.name))
    except OSError as fault:
        log.error("%d entries of %s are unknown to %s and left alone: %s", len(lost), lost[0].parent, database, fault)
        return
    log.error(
        "%d entries of %s are unknown to %s: set aside in %s, where `lorakeet doctor` finds them",
        *(len(lost), lost[0].parent, database, aside),
    )


def set_aside_database(path: Path) -> Path:
    """Rename a damaged database, with its write-ahead log; return the new path."""
    damaged = unused_path(path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}"))
    for suffix in ("-wal", "-shm", ""):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(damaged.with_name(damaged.name + suffix))
    return damaged


def ensure_directory(path: Path, aside: Path) -> None:
    """Make a directory, moving a regular file in its place to `aside`, and finish the removals that `rename_and_remove`
    began there. On a full disk this fails silently; the next write there reports it."""
    with contextlib.suppress(OSError):
        if path.exists() and not path.is_dir():
            aside.mkdir(parents=True, exist_ok=True)
            log.error("%s is not a directory: set aside as %s", path, moved := unused_path(aside / path.name))
            path.rename(moved)
        path.mkdir(parents=True, exist_ok=True)
        for half_removed in path.glob(f".*{_REMOVING_SUFFIX}"):
            remove(half_removed)


def rename_and_remove(path: Path) -> None:
    """Remove a directory that a thread may still be writing into: it is renamed first, so that nobody finds it."""
    gone = path.with_name(f".{path.name}{_REMOVING_SUFFIX}")
    with contextlib.suppress(OSError):
        path.rename(gone)
        remove(gone)


def remove(path: Path) -> None:
    """Remove a file, or a directory with its content. Failures are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def unused_path(path: Path) -> Path:
    """This path, or the first free one with a number appended."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}~{number}")
    return candidate
