"""The record of a published adapter: the digest of each file, noted at upload, for checks by later readers.

A disk that returns other bytes than were written must not silently change an answer: every read is checked against
this. The record follows from the adapter's own digest, so it can be rebuilt. See `adapters.storage.mending`.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from adapters.disk import write_synced

RECORD_NAME = "files.json"


class DamagedFile(Exception):
    """A file of a published adapter has changed since its upload."""


def write(directory: Path) -> None:
    """Write the record of the files in a directory, as they are."""
    files = [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name != RECORD_NAME and path.name[0] != "."
    ]
    write_synced(directory / RECORD_NAME, json.dumps({path.name: _digest(path) for path in files}).encode())


def read(directory: Path) -> dict[str, str]:
    """File name -> digest. Raises DamagedFile when the record is missing or unreadable."""
    try:
        recorded = json.loads((directory / RECORD_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        recorded = None
    if not isinstance(recorded, dict):
        raise DamagedFile(f"{RECORD_NAME} is missing or damaged")
    return recorded


def read_checked(directory: Path, name: str) -> bytes:
    """A small file's content, checked against the record. Raises DamagedFile."""
    try:
        content = (directory / name).read_bytes()
    except OSError as fault:
        raise DamagedFile(f"{name} cannot be read: {fault.strerror}") from None
    if hashlib.sha256(content).hexdigest() != read(directory).get(name):
        raise DamagedFile(f"{name} is damaged")
    return content


def check(directory: Path, names: Iterable[str] | None = None) -> None:
    """Check these files, or all in the record. Raises DamagedFile, naming the changed ones."""
    recorded = read(directory)
    damaged = [
        name
        for name in (recorded if names is None else names)
        if _digest_or_none(directory / name) != recorded.get(name)
    ]
    if damaged:
        raise DamagedFile(f"{', '.join(damaged)}: damaged")


def _digest_or_none(path: Path) -> str | None:
    try:
        return _digest(path)
    except OSError:
        return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
