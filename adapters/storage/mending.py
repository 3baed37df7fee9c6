"""What is left of a damaged version: its rows and the record of its files follow from its spec and its weights."""

import contextlib
from pathlib import Path

from adapters.disk import sync
from adapters.peft_format import packed_rows, record
from adapters.peft_format.directory import CONFIG_NAME, SPEC_NAME, AdapterSpec
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.inspection import digest_of
from adapters.storage.versions import DamagedAdapter


def mend(directory: Path, digest: str) -> None:
    """Make anew what can be made, in place. Raises DamagedAdapter when config, spec or weights are damaged."""
    check_noted(directory, CONFIG_NAME, SPEC_NAME)
    complete(directory, verified(directory, digest))


def check_noted(directory: Path, *names: str) -> None:
    """Raises DamagedAdapter when one of these files is not what was noted, where that can be read."""
    with contextlib.suppress(record.DamagedFile):  # versions of earlier releases have no record
        noted = record.read(directory)
        try:
            record.check(directory, noted.keys() & set(names))
        except record.DamagedFile as fault:
            raise DamagedAdapter(f"{directory.name}: {fault}") from None


def verified(directory: Path, digest: str) -> AdapterSpec:
    """The spec in a directory, once spec and weights are known to have this digest. Raises DamagedAdapter."""
    try:
        found = digest_of(directory)
        spec = AdapterSpec.parse((directory / SPEC_NAME).read_text())
    except (AdapterError, OSError, ValueError, LookupError, TypeError) as fault:
        raise DamagedAdapter(f"the files of {digest} are damaged: {fault}") from None
    if found != digest:
        raise DamagedAdapter(f"the files of {digest} are damaged: their digest is {found}")
    return spec


def complete(directory: Path, spec: AdapterSpec) -> None:
    """Lay out the rows of a whole version, and note its files; durable."""
    packed_rows.make(directory, spec)
    record.write(directory)
    sync(directory)


def replace_files(staged: Path, directory: Path) -> None:
    """Give a version these files for its own, one by one: who reads it meanwhile finds damage, never a mixture."""
    for path in sorted(staged.iterdir(), key=lambda path: path.name == record.RECORD_NAME):
        path.replace(directory / path.name)
    sync(directory)
