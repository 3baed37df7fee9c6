"""Tensors in host and device memory: large zeroed ones allocated lazily, and small ones copied asynchronously."""

import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros like `torch.zeros`, but on a CPU their pages are the operating system's zero page until written.

    `torch.zeros` writes every byte, so a large cache would cost its time and memory at start. A tensor starts at a
    page, so that rows of whole cache lines are aligned to cache lines.
    """
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(*shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor on the device, without waiting for the device's earlier work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def row_index(rows: Sequence[int], like: Tensor) -> slice | Tensor:
    """Return an index for these rows of a tensor; for all rows a slice, which copies nothing."""
    return slice(None) if len(rows) == len(like) else to_device(torch.tensor(rows), like.device)
