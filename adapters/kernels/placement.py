"""Placement of weights on huge pages, so that reading scattered experts does not wait for TLB misses.

A tensor read from a file is a view of that file's small pages, and not aligned to cache lines.
"""

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def on_huge_pages(tensor: Tensor) -> Tensor:
    """Copy a tensor to memory aligned to huge pages, if it is on a CPU and at least one huge page large.

    The system uses huge pages if they are available and enabled (`/sys/kernel/mm/transparent_hugepage/enabled`).
    """
    if not tensor.is_cpu or tensor.nbytes < HUGE_PAGE:
        return tensor
    return empty_on_huge_pages(tensor.shape, tensor.dtype).copy_(tensor)


def empty_on_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised CPU tensor that begins on a huge page, if it fills one."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # keeps the memory alive
    first = -whole.data_ptr() % HUGE_PAGE
    return whole[first : first + size].view(dtype).view(shape)
