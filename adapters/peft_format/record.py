"""The digest of each file of a published adapter, noted when it came in, for whoever reads the file later.

A disk that gives back other bytes than it took must not change an answer in silence: what is read is held against this.
All of it follows from the adapter's own digest, so that it can be made anew. See `adapters.storage.mending`.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from adapters.disk import write_synced

RECORD_NAME = "files.json"


class DamagedFile(Exception):
    """A file of a published adapter is not what it was when it came in."""


def write(directory: Path) -> None:
    """Note the files that lie in a directory, as they are."""
    files = [
        path
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name != RECORD_NAME and path.name[0] != "."
    ]
    write_synced(directory / RECORD_NAME, json.dumps({path.name: _digest(path) for path in files}).encode())


def read(directory: Path) -> dict[str, str]:
    """File name -> digest. Raises DamagedFile where that was not noted, or cannot be read."""
    try:
        noted = json.loads((directory / RECORD_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        noted = None
    if not isinstance(noted, dict):
        raise DamagedFile(f"{RECORD_NAME} is missing or damaged")
    return noted


def checked(directory: Path, name: str) -> bytes:
    """A small file's content. Raises DamagedFile."""
    try:
        content = (directory / name).read_bytes()
    except OSError as fault:
        raise DamagedFile(f"{name} cannot be read: {fault.strerror}") from None
    if hashlib.sha256(content).hexdigest() != read(directory).get(name):
        raise DamagedFile(f"{name} is damaged")
    return content


def check(directory: Path, names: Iterable[str] | None = None) -> None:
    """Read these files, or all that were noted. Raises DamagedFile, naming those that are not what they were."""
    noted = read(directory)
    damaged = [name for name in (noted if names is None else names) if _found(directory / name) != noted.get(name)]
    if damaged:
        raise DamagedFile(f"{', '.join(damaged)}: damaged")


def _found(path: Path) -> str | None:
    try:
        return _digest(path)
    except OSError:
        return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
