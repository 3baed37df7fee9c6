"""Merged weights W + BA on the device, kept beside those of the base.

W is the base's weight from its files, as in merge.py, so a bf16 merge equals that of a checkpoint; an NF4 merge is the
same, rounded as the base itself is. One linear at a time, in pieces, so that steps run in between.
"""

from collections.abc import Generator
from typing import get_args

import bitsandbytes.functional
import numpy as np
import torch
from torch import Tensor

from adapters.kernels import QuantizedWeight
from adapters.offline.recipe import MergedDtype
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.outline import Parameter

BLOCK, NESTED_BLOCK = 64, 256  # bitsandbytes' defaults, as in the base
PIECE_WEIGHTS = {"cpu": 1 << 17, "cuda": 1 << 24}  # about 10 ms each
_FILE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

Factors = tuple[Tensor, Tensor, float]  # A [rank, in], B [out, rank], scaling


def merged_bytes(shape: tuple[int, int], dtype: MergedDtype, device: torch.device) -> int:
    """Return the device bytes of a merged weight `[out, in]`, including the scales that kernels hold as fp32."""
    count = shape[0] * shape[1]
    if dtype == "bf16":
        return 2 * count
    blocks = -(-count // BLOCK)
    tables = 4 * (16 + 256)
    held = 4 * blocks if device.type == "cpu" else 0
    return -(-count // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK) + tables + held


def check_source(name: str, source: Parameter | None, shape: tuple[int, int], dtype: MergedDtype) -> Parameter:
    """Return the base's own weight of a linear. Raises AdapterError if it cannot be merged into."""
    if dtype not in get_args(MergedDtype):
        raise AdapterError(f"'{dtype}' is no dtype of merged weights", "dtype")
    if source is None or source.shape != shape or source.dtype not in _FILE_DTYPES:
        raise AdapterError(f"the base's files have no plain weight for '{name}' to merge into", "to")
    if dtype == "nf4" and shape[1] % BLOCK:
        raise AdapterError(f"'{name}' has {shape[1]} inputs, no multiple of {BLOCK}: merge it as bf16", "dtype")
    return source


def merged_weight(
    source: Parameter, factors: Factors, dtype: MergedDtype, device: torch.device
) -> Generator[None, None, QuantizedWeight]:
    """Compute one merged weight; yields after each piece of work.

    Args:
        source: as returned by `check_source`.
        factors: on `device`, and unchanged until the end.
    """
    rows, width = source.shape
    a, b, scaling = factors[0].float(), factors[1].float(), factors[2]
    # Whole blocks of 64 weights for any width.
    step = max(PIECE_WEIGHTS.get(device.type, 1 << 20) // width // BLOCK, 1) * BLOCK
    made = _Nf4(rows, width, device) if dtype == "nf4" else _Bf16(rows, width, device)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        part = _rows(source, first, last).to(device) + b[first:last] @ a * scaling
        made.add(first, part.bfloat16())
        yield
    return made.weight()


def _rows(source: Parameter, first: int, last: int) -> Tensor:
    """Read rows of the weight, fp32 [last - first, in]."""
    dtype, width = _FILE_DTYPES[source.dtype], source.shape[1]
    offset = source.start + first * width * dtype.itemsize
    raw = np.fromfile(source.file, np.uint8, (last - first) * width * dtype.itemsize, offset=offset)
    return torch.from_numpy(raw).view(dtype).view(last - first, width).float()


class _Bf16:
    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self._data = torch.empty(rows, width, dtype=torch.bfloat16, device=device)

    def add(self, first: int, part: Tensor) -> None:
        self._data[first : first + len(part)] = part

    def weight(self) -> QuantizedWeight:
        rows, width = self._data.shape
        return QuantizedWeight(kind="dense", data=self._data, shape=(rows, width))


class _Nf4:
    """Equals `bitsandbytes.functional.quantize_4bit` of the whole weight, with compressed statistics."""

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self._shape = rows, width
        self._data = torch.empty(rows * width // 2, 1, dtype=torch.uint8, device=device)
        self._absmax = torch.empty(rows * width // BLOCK, device=device)

    def add(self, first: int, part: Tensor) -> None:
        packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(part, BLOCK, "nf4", torch.uint8)
        start = first * self._shape[1]
        self._data[start // 2 : start // 2 + len(packed)] = packed
        self._absmax[start // BLOCK : start // BLOCK + len(absmax)] = absmax

    def weight(self) -> QuantizedWeight:
        offset = self._absmax.mean()
        absmax, nested = bitsandbytes.functional.quantize_blockwise(self._absmax - offset, blocksize=NESTED_BLOCK)
        return QuantizedWeight(
            kind="nf4",
            data=self._data,
            shape=self._shape,
            absmax=absmax,
            code=bitsandbytes.functional.get_4bit_type("nf4", device=self._data.device),
            blocksize=BLOCK,
            nested_absmax=nested.absmax,
            nested_code=nested.code,
            nested_blocksize=NESTED_BLOCK,
            offset=float(offset),
        )
