"""Uploaded files read in full, with nothing trusted: for a process of its own, where that holds up nobody."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.peft_format import packed_rows as rowfile
from adapters.peft_format.conversion import convert
from adapters.peft_format.directory import WEIGHTS_NAME, AdapterSpec, inspect
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
    ignore_vision: bool = False


def inspect_adapter(check: Check) -> AdapterSpec:
    """Convert and inspect the adapter, and lay its rows out beside it. Raises AdapterError, OSError."""
    weights = check.directory / WEIGHTS_NAME
    converted = convert(weights) if weights.is_file() else []
    asked = check.directory, check.linears, check.model_class, check.outline, check.text
    spec = inspect(*asked, ignore_vision=check.ignore_vision)
    spec = dataclasses.replace(spec, warnings=(*converted, *spec.warnings))
    rowfile.make(check.directory, spec)
    return spec
