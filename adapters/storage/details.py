"""What the owner of a published adapter may ask beyond its receipt, read from its directory when asked.

A receipt is kept in memory for every version of every name, so it is short; what grows with the number of modules, or
was written into the file by whoever made it, is here. Numpy only.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.peft_format.directory import WEIGHTS_NAME, AdapterSpec
from adapters.peft_format.record import DamagedFile
from adapters.peft_format.sizes import LinearSize, device_bytes
from adapters.safetensors_header import HeaderFault, read_header


def details_of(directory: Path, linears: Mapping[str, LinearSize] | None) -> dict[str, Any]:
    """Rank and scaling per module, the file's own metadata, and bytes per tier.

    Args:
        directory: of a published version, leased.
        linears: full module name -> sizes, of the base that serves; None while that is not known.

    Raises DamagedFile.
    """
    spec = AdapterSpec.read(directory)
    try:
        with (directory / WEIGHTS_NAME).open("rb") as file:
            metadata = read_header(file).metadata
    except (HeaderFault, OSError) as fault:
        raise DamagedFile(f"{WEIGHTS_NAME}: {fault}") from None
    return {
        "modules": {name: {"rank": m.rank, "scaling": m.scaling} for name, m in sorted(spec.adapted.items())},
        "file_metadata": metadata,
        "bytes_on_disk": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        "bytes_on_device": None if linears is None else device_bytes(spec.rows(linears), linears),
    }
