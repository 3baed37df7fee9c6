"""The untrusted safetensors file of an adapter: its validated header, and checks of its bytes.

With numpy only.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, Final, Literal, NamedTuple

import numpy as np

from adapters import safetensors_header
from adapters.peft_format.fields import AdapterError, shorten

Dtype = Literal["float32", "bfloat16", "float16"]


class Format(NamedTuple):
    """Layout of a dtype's numbers in a file, and torch's name for the dtype."""

    name: Dtype
    itemsize: int
    exponent_mask: int  # mask of the exponent's bits; all set means infinite or NaN


FORMATS: Final = {
    "F32": Format("float32", 4, 0x7F800000),
    "BF16": Format("bfloat16", 2, 0x7F80),
    "F16": Format("float16", 2, 0x7C00),
}
MAX_HEADER_BYTES = 16 << 20  # some 150 for each matrix; experts have thousands
MAX_TENSORS = 100_000
MAX_DIMENSION = 1 << 31
CHUNK_BYTES = 4 << 20  # a multiple of every item size


class TensorEntry(NamedTuple):
    """One tensor of a safetensors file; `start` and `end` count from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: BinaryIO, formats: Mapping[str, Format] = FORMATS) -> dict[str, TensorEntry]:
    """The tensors declared by a safetensors file, once the header is known to fit the file.

    Args:
        formats: the allowed dtypes.

    Raises:
        AdapterError: the header is not JSON, larger than `MAX_HEADER_BYTES`, or describes anything but floating vectors
            and matrices that lie one behind the other and fill the file exactly.
    """
    try:
        header = safetensors_header.read_header(file, MAX_HEADER_BYTES)
    except safetensors_header.HeaderFault as fault:
        raise AdapterError(shorten(f"weights {fault}", 600), "weights") from None
    if not 0 < len(header.tensors) <= MAX_TENSORS:
        raise AdapterError(f"weights hold {len(header.tensors)} tensors; 1 to {MAX_TENSORS} are allowed", "weights")
    tensors = {name: _parse_entry(name, entry, header.data_start, formats) for name, entry in header.tensors.items()}
    size = os.fstat(file.fileno()).st_size
    position = header.data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            raise AdapterError(f"tensor '{shorten(name)}' overlaps another or leaves a gap before it", name)
        position = tensor.end
    if position != size:
        raise AdapterError(f"weights have {size} bytes, but the tensors end at byte {position}", "weights")
    return tensors


def _parse_entry(name: str, entry: Any, data_start: int, formats: Mapping[str, Format]) -> TensorEntry:
    def refuse(reason: str) -> AdapterError:
        return AdapterError(f"tensor '{shorten(name)}' {reason}", name)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse("must be declared by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in formats:
        known = "F32, F16, BF16, F64, F8_E4M3 or F8_E5M2"
        raise refuse(f"has a dtype that is not served: {shorten(json.dumps(dtype), 40)} ({known})")
    for numbers, counts, expected in (
        (shape, (1, 2), "a shape of one or two natural numbers"),
        (offsets, (2,), "data_offsets [begin, end] of two natural numbers"),
    ):
        natural = isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
        if not natural or len(numbers) not in counts:
            raise refuse(f"needs {expected}, not {shorten(json.dumps(numbers), 40)}")
    if max(shape) > MAX_DIMENSION or offsets[1] - offsets[0] != math.prod(shape) * formats[dtype].itemsize:
        raise refuse(f"has data_offsets that do not fit its shape {shorten(json.dumps(shape), 40)}")
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def read_chunks(file: BinaryIO, tensor: TensorEntry) -> Iterator[bytes]:
    """A tensor's bytes, in chunks of whole numbers."""
    file.seek(tensor.start)
    remaining = tensor.end - tensor.start
    while remaining:
        chunk = file.read(min(remaining, CHUNK_BYTES))
        if len(chunk) != min(remaining, CHUNK_BYTES):
            raise AdapterError("weights were cut short while being read", "weights")
        remaining -= len(chunk)
        yield chunk


def check_finite(chunk: bytes, name: str, tensor: TensorEntry) -> None:
    """Check that all these numbers are finite. Raises AdapterError."""
    number = FORMATS[tensor.dtype]
    bits = np.frombuffer(chunk, dtype=f"<u{number.itemsize}")
    if np.any(bits & number.exponent_mask == number.exponent_mask):
        raise AdapterError(f"tensor '{shorten(name)}' holds NaN or infinite values", name, "non_finite_weights")


def is_zero(chunk: bytes, tensor: TensorEntry) -> bool:
    """Whether all of these numbers are 0 or -0."""
    bits = np.frombuffer(chunk, dtype=f"<u{FORMATS[tensor.dtype].itemsize}")
    return not np.any(bits << 1)


def last_rows_bytes(tensor: TensorEntry, rows: int) -> int:
    """The size of a matrix's last rows."""
    return rows * math.prod(tensor.shape[1:]) * FORMATS[tensor.dtype].itemsize
