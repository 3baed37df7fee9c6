"""An adapter's rank rows in one file, in the pool's layout, so that loading an adapter only reads.

Made when an adapter is uploaded, beside its own files. The file follows from those, so it is no part of the digest,
needs no copy elsewhere, and may be missing. With numpy only.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adapters.disk import sync
from adapters.peft_format import record
from adapters.peft_format.directory import WEIGHTS_NAME, AdapterSpec
from adapters.peft_format.record import DamagedFile
from adapters.peft_format.sizes import UNIT_BYTES, LinearSize, units_per_row
from adapters.peft_format.weights import TensorEntry, read_header

ROWS_NAME = "rows.bin"

_READ_BYTES = 1 << 20  # at once: some 200 us, after which serving threads get their turn
_READ_BUFFERS = 256  # at once, at most; the system allows 1024

_BITS = {"F32": "<u4", "BF16": "<u2", "F16": "<u2"}


class RowShape(NamedTuple):
    """One linear's part of the file: `units` rows of `inputs` units, then as many of `outputs` units."""

    name: str
    units: int
    inputs: int
    outputs: int
    rank: int
    scaling: float


@dataclass(frozen=True)
class RowFile:
    """The path of a file of rows, its parts in order, and the digest of all of it. See `find`."""

    path: Path
    parts: tuple[RowShape, ...]
    digest: str

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return sum(_part_bytes(part) for part in self.parts)

    def read_into(self, rows: Sequence[np.ndarray]) -> None:
        """Fill arrays of units, together as large as the file, from its beginning to its end.

        Holds Python's lock only briefly, and yields the processor often. Raises OSError; DamagedFile when the content
        does not match the digest.
        """
        digest = hashlib.sha256()
        with self.path.open("rb", buffering=0) as file:
            position = 0
            for batch, size in _batches(rows):
                if os.preadv(file.fileno(), batch, position) != size:
                    raise DamagedFile(f"{self.path.name} was cut short")
                position += size
                for piece in batch:
                    digest.update(piece)
        if digest.hexdigest() != self.digest:
            raise DamagedFile(f"{self.path.name} is damaged")


def find(directory: Path, spec: AdapterSpec, linears: Mapping[str, LinearSize]) -> RowFile | None:
    """The rows of a published adapter; None if they were not laid out. `linears`: the base's, by full name."""
    path = directory / ROWS_NAME
    if spec.variants.names or not path.exists() or (digest := record.read(directory).get(ROWS_NAME)) is None:
        return None
    width = units_per_row(spec.dtype)
    parts = tuple(
        RowShape(name, width * m.rank, linears[name].in_features, linears[name].out_features, m.rank, m.scaling)
        for name, m in spec.modules.items()
    )
    return RowFile(path, parts, digest)


def write(directory: Path, spec: AdapterSpec) -> None:
    """Lay out the rows of an adapter that passed `inspect` and has no variants (fsync'ed)."""
    if spec.variants.names:
        return
    new = directory / f".{ROWS_NAME}.new"  # until it is complete
    with (directory / WEIGHTS_NAME).open("rb") as weights, new.open("wb") as rows:
        entries = read_header(weights)
        for module in spec.modules.values():
            for name, transposed in ((module.a, False), (module.b, True)):
                entry = entries[name]
                weights.seek(entry.start)
                numbers = _in_dtype(spec.dtype, weights.read(entry.end - entry.start), entry)
                rows.write(np.ascontiguousarray(numbers.T if transposed else numbers).data)
    sync(new)
    new.replace(directory / ROWS_NAME)


def _in_dtype(dtype: str, content: bytes, entry: TensorEntry) -> np.ndarray:
    """A tensor's numbers, or their bits, in the adapter's dtype: the tensor's own, or float32."""
    bits = np.frombuffer(content, _BITS[entry.dtype]).reshape(entry.shape)
    if dtype != "float32" or entry.dtype == "F32":
        return bits
    if entry.dtype == "BF16":
        return (bits.astype("<u4") << 16).view("<f4")
    return bits.view("<f2").astype("<f4")


def _part_bytes(part: RowShape) -> int:
    return part.units * (part.inputs + part.outputs) * UNIT_BYTES


def _batches(rows: Sequence[np.ndarray]) -> Iterator[tuple[list[memoryview], int]]:
    """Pieces of the arrays in order, each batch to be read at once, with its size."""
    batch: list[memoryview] = []
    size = 0
    for array in rows:
        content = array.data.cast("B")
        while content:
            taken = content[: _READ_BYTES - size]
            batch.append(taken)
            size += len(taken)
            content = content[len(taken) :]
            if size == _READ_BYTES or len(batch) == _READ_BUFFERS:
                yield batch, size
                batch, size = [], 0
    if batch:
        yield batch, size
