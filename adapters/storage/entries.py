"""Entries of names in a version's directory, from which a lost database can be restored.

One small file for each name, beside the version's own, written after the name has changed. They are read only when a
database was lost, and so they are not synced: those lost in a power cut are written again at the next start.
"""

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.record import DamagedFile
from adapters.storage.receipt import receipt_of
from adapters.storage.versions import Pointer, Version

NAMES = "names"  # in a version's directory

log = logging.getLogger(__name__)


def update(before: Pointer | None, after: Pointer | None) -> None:
    """Update the entries in the directories of a name's versions from the old pointer to the new one."""
    old, new = _entries(before), _entries(after)
    for path in old.keys() - new.keys():
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    for path, entry in new.items():
        if old.get(path) != entry:
            _write(path, entry)


def write_missing(pointer: Pointer) -> None:
    """Write the entries of a name that are missing from its versions' directories."""
    for path, entry in _entries(pointer).items():
        if not (path.exists() and path.stat().st_size):
            _write(path, entry)


def restore_pointers(directories: Iterable[Path]) -> dict[tuple[str, str], Pointer]:
    """The pointers of these versions' names, by tenant and name, as far as the entries tell."""
    found: dict[tuple[str, str], list[tuple[dict[str, Any], Version]]] = {}
    for directory in directories:
        try:
            spec = AdapterSpec.read(directory)
        except (DamagedFile, ValueError, LookupError, TypeError) as fault:
            log.error("%s: its names are not restored: %s", directory.name, fault)
            continue
        for entry in read(directory):
            owner = (entry["tenant"], entry["name"])
            digest = f"sha256:{directory.name.partition('~')[0]}"
            version = Version(*owner, digest, directory, entry["created"], receipt_of(spec), entry["staged"])
            found.setdefault(owner, []).append((entry, version))
    return {owner: _pointer(versions) for owner, versions in found.items()}


def read(directory: Path) -> Iterator[dict[str, Any]]:
    """The entries in a version's directory; unreadable ones are skipped."""
    for path in sorted((directory / NAMES).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            entry = json.loads(path.read_bytes())
            if all(isinstance(entry[key], str) for key in ("tenant", "name")) and entry["since"] + entry["created"]:
                yield {"staged": False, "current": False, "split": [], "pinned": False, "readers": []} | entry


def _pointer(found: list[tuple[dict[str, Any], Version]]) -> Pointer:
    found.sort(key=lambda pair: (pair[0]["current"], not pair[0]["staged"], pair[0]["since"]), reverse=True)
    first = found[0][0]
    versions = tuple(version for _, version in found)
    split = tuple((digest, share) for digest, share in first["split"])
    known = {version.digest for version in versions}
    return Pointer(
        versions, split if {digest for digest, _ in split} <= known else (), first["pinned"], tuple(first["readers"])
    )


def _entries(pointer: Pointer | None) -> dict[Path, dict[str, Any]]:
    if pointer is None:
        return {}
    owner = pointer.current
    key = hashlib.sha256(f"{owner.tenant}\0{owner.name}".encode()).hexdigest()[:32]
    common = {"tenant": owner.tenant, "name": owner.name}
    current = {"current": True, "split": list(map(list, pointer.split)), "pinned": pointer.pinned}
    current |= {"readers": list(pointer.readers)}
    return {
        version.path / NAMES / f"{key}.json": common
        | {"created": version.created, "staged": version.staged}
        | (current if version is owner else {})
        for version in pointer.versions
    }


def _write(path: Path, entry: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(entry | {"since": time.time()}))
    except OSError as fault:  # the database has it, and the next start tries again
        log.debug("%s was not written: %s", path, fault)
