"""Copying files by names that a client chose, from under one directory only."""

import errno
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from adapters.peft_format.fields import AdapterError

_DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY


def copy_files(names: Iterable[str], directory: Path, target: Path, root: Path) -> None:
    """Copy those of the named files that exist in `directory`. Links may lead anywhere under `root`, and not out of it.

    Raises:
        AdapterError: a file that lies elsewhere, is not a regular file, or changes meanwhile.
        OSError: a fault of the disk.
    """
    for name in names:
        path = directory / name
        if not os.path.lexists(path):  # missing files are reported by validation
            continue
        with _opened(path, root) as source, (target / name).open("xb") as copy:
            before = os.fstat(source.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise AdapterError(f"{name} is not a regular file", name)
            shutil.copyfileobj(source, copy, 1 << 20)
            after = os.fstat(source.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise AdapterError(f"{name} was changed while it was copied", name)


@contextmanager
def _opened(path: Path, root: Path) -> Iterator[BinaryIO]:
    """Open a file by its real path, following a link in no part of it, so that none can be slipped in."""
    outside = AdapterError(f"{path.name} does not exist, or lies outside the directory that may be read", path.name)
    try:
        *folders, name = path.resolve().relative_to(root.resolve()).parts
    except (ValueError, OSError, RuntimeError):  # outside, or a loop of links
        raise outside from None
    folder = os.open(root, _DIRECTORY)
    try:
        for part in folders:
            inner = os.open(part, _DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        # O_NONBLOCK: opening a pipe of this name must not wait for its writer.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except (FileNotFoundError, NotADirectoryError):
        raise outside from None
    except PermissionError:  # another user's
        raise AdapterError(f"{path.name} may not be read by the server's user", path.name) from None
    except OSError as fault:
        raise (outside if fault.errno == errno.ELOOP else fault) from None
    finally:
        os.close(folder)
    with os.fdopen(descriptor, "rb") as file:
        yield file
