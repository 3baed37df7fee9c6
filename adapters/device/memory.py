"""Memory on either side: large zeroed tensors that cost nothing until touched, small ones sent without waiting."""

import mmap
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like `torch.zeros`, but on the CPU the pages are the operating system's zero page until written.

    `torch.zeros` writes every byte: a cache sized for the busiest day would be paid for at start. A tensor begins with
    a page, so that rows of whole cache lines lie in whole cache lines.
    """
    size = prod(shape) * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(*shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(*shape)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on the device, whose work so far is not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def places_of(rows: Sequence[int], like: Tensor) -> slice | Tensor:
    """An index of these rows of a tensor; of all of them one that copies nothing."""
    return slice(None) if len(rows) == len(like) else sent(torch.tensor(rows), like.device)
