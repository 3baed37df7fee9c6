"""Simulated power cuts: every `os.fsync` is recorded with the state that it made durable."""

import os
import stat
from pathlib import Path

import pytest


class Synced:
    """Records of `os.fsync` by inode: a file's last change, a directory's entries."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._files: dict[int, int] = {}  # inode -> time of last change, in nanoseconds
        self._directories: dict[int, dict[str, int]] = {}  # inode -> name -> inode
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._note)

    def _note(self, descriptor: int) -> None:
        self._fsync(descriptor)
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(descriptor) as entries:
                self._directories[status.st_ino] = {entry.name: entry.inode() for entry in entries}
        else:
            self._files[status.st_ino] = status.st_mtime_ns

    def lost(self, root: Path, path: Path) -> list[Path]:
        """The parts of a file's path from `root` on whose current state is not durable: entries, and the content."""
        status = path.stat()
        lost = [] if self._files.get(status.st_ino) == status.st_mtime_ns else [path]
        while path != root:
            entries = self._directories.get(path.parent.stat().st_ino, {})
            if entries.get(path.name) != path.stat().st_ino:
                lost.append(path.parent)
            path = path.parent
        return lost

    def lost_below(self, root: Path, directory: Path) -> list[Path]:
        """The same for every file in a directory, which must not be empty."""
        files = [path for path in directory.rglob("*") if path.is_file()]
        assert files
        return [path for file in files for path in self.lost(root, file)]
