"""The kernels in Triton, for NVIDIA GPUs: the same functions as `reference`, in `functions`.

This file only decides whether they are available; Triton itself is imported when they are first used. They run on CUDA
tensors, or on CPU tensors in Triton's interpreter under `LORAKEET_TRITON=interpret` (slow: for tests);
`LORAKEET_TRITON=0` turns them off.

Every output row is reduced in an order fixed by its launch, never by the timing of programs. `fix_tiles` also fixes all
tiles and splits, the library's included, so that no row's bits depend on other rows.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

_disabled = False
_fixed = False
_use_gpu_tiles = False
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of activations


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("LORAKEET_TRITON") == "interpret"


def large_tiles() -> bool:
    """Whether tiles should be large: the interpreter's time depends on operations and programs, not on sizes."""
    return is_interpreted() and not _use_gpu_tiles


def is_deterministic() -> bool:
    """Whether tiles and splits are the same for all row counts."""
    return _fixed


def fix_tiles(fixed: bool) -> None:
    """Set, for this process, whether tiles and splits are the same for all row counts."""
    global _fixed
    _fixed = fixed


def supports(*tensors: Tensor) -> bool:
    """Whether the kernels support these tensors' devices and dtypes."""
    if _disabled or os.environ.get("LORAKEET_TRITON") == "0":
        return False
    device = "cpu" if is_interpreted() else "cuda"
    return all(tensor.device.type == device and tensor.dtype in DTYPES for tensor in tensors)


@contextmanager
def switched_off() -> Iterator[None]:
    """Make `supports` return False within the context, so that plain torch runs, for comparison."""
    global _disabled
    _disabled = True
    try:
        yield
    finally:
        _disabled = False


@cache
def load() -> ModuleType | None:
    """Return `functions`, or None if Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    if is_interpreted():
        os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when a kernel is defined
    from adapters.kernels.triton import functions

    return functions
