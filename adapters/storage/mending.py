"""Mending a damaged version: its rows and record follow from its spec and its weights."""

import contextlib
from pathlib import Path

from adapters.disk import sync
from adapters.peft_format import packed_rows, record
from adapters.peft_format.directory import CONFIG_NAME, SPEC_NAME, AdapterSpec
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.inspection import digest_of
from adapters.storage.versions import DamagedAdapter


def mend(directory: Path, digest: str) -> None:
    """Rebuild rows and record in place. Raises DamagedAdapter when config, spec or weights are damaged."""
    check_recorded(directory, CONFIG_NAME, SPEC_NAME)
    write_rows_and_record(directory, verified_spec(directory, digest))


def check_recorded(directory: Path, *names: str) -> None:
    """Check these files against the record, if it can be read. Raises DamagedAdapter."""
    with contextlib.suppress(record.DamagedFile):  # versions of earlier releases have no record
        recorded = record.read(directory)
        try:
            record.check(directory, recorded.keys() & set(names))
        except record.DamagedFile as fault:
            raise DamagedAdapter(f"{directory.name}: {fault}") from None


def verified_spec(directory: Path, digest: str) -> AdapterSpec:
    """The spec in a directory, once spec and weights are verified against the digest. Raises DamagedAdapter."""
    try:
        found = digest_of(directory)
        spec = AdapterSpec.parse((directory / SPEC_NAME).read_text())
    except (AdapterError, OSError, ValueError, LookupError, TypeError) as fault:
        raise DamagedAdapter(f"the files of {digest} are damaged: {fault}") from None
    if found != digest:
        raise DamagedAdapter(f"the files of {digest} are damaged: their digest is {found}")
    return spec


def write_rows_and_record(directory: Path, spec: AdapterSpec) -> None:
    """Lay out the rows of a whole version, and write its record; durable."""
    packed_rows.write(directory, spec)
    record.write(directory)
    sync(directory)


def replace_files(staged: Path, directory: Path) -> None:
    """Replace a version's files one by one, the record last: a concurrent reader finds damage, never a mixture."""
    for path in sorted(staged.iterdir(), key=lambda path: path.name == record.RECORD_NAME):
        path.replace(directory / path.name)
    sync(directory)
