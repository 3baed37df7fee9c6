"""Where weights lie in memory: on huge pages, so that reading experts here and there does not wait for address lookups.

A tensor that was read from a file is a view of that file's pages, small ones, and begins anywhere in a cache line.
"""

import contextlib
import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20


def on_huge_pages(tensor: Tensor) -> Tensor:
    """The same numbers in memory of their own that begins on a huge page, if they are on a CPU and fill one.

    The system gives huge pages where it has them and is set to (`/sys/kernel/mm/transparent_hugepage/enabled`).
    """
    if not tensor.is_cpu or tensor.nbytes < HUGE_PAGE:
        return tensor
    size = tensor.nbytes
    memory = mmap.mmap(-1, size + HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # which keeps the memory
    first = -whole.data_ptr() % HUGE_PAGE
    placed = whole[first : first + size].view(tensor.dtype).view(tensor.shape)
    return placed.copy_(tensor)
