"""Uploaded files read in full, with nothing trusted: for a process of its own, where that holds up nobody."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.peft_format import packed_rows as rowfile
from adapters.peft_format.directory import AdapterSpec, inspect
from adapters.peft_format.outline import Outline
from adapters.peft_format.sizes import LinearSize
from adapters.peft_format.text import AdapterText


@dataclass(frozen=True)
class Check:
    """What `adapters.peft_format.directory.inspect` wants to know."""

    directory: Path
    linears: Mapping[str, LinearSize]
    model_class: str
    outline: Outline | None
    text: AdapterText


def inspect_adapter(check: Check) -> AdapterSpec:
    """Inspect the adapter, and lay its rows out beside it. Raises AdapterError, OSError."""
    spec = inspect(check.directory, check.linears, check.model_class, check.outline, check.text)
    rowfile.make(check.directory, spec)
    return spec
