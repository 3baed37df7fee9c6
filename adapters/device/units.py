"""Row units as tensors: int16 `[units, width]`, the same bytes as `[rank, width]` numbers of any dtype."""

import torch
from torch import Tensor

from adapters import kernels

DTYPE_CODES = {torch.float32: kernels.FP32, torch.bfloat16: kernels.BF16, torch.float16: kernels.FP16}
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


def as_units(matrix: Tensor) -> Tensor:
    """`[rank, width]` numbers -> int16 `[units, width]`."""
    return matrix.flatten().view(torch.int16).view(-1, matrix.shape[1])  # strides of one column may be anything


def from_units(storage: Tensor, first: int, rank: int, code: int) -> Tensor:
    """A copy of `rank` rows that begin at unit `first` of int16 `[units, width]`: `[rank, width]` numbers."""
    dtype = _DTYPES[code]
    units = rank * dtype.itemsize // storage.dtype.itemsize
    return storage[first : first + units].flatten().clone().view(dtype).view(rank, -1)
