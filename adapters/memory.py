"""Memory on either side: large zeroed tensors that cost nothing until touched, small ones sent without waiting."""

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like `torch.zeros`, but on the CPU the pages are the operating system's zero page until written.

    `torch.zeros` writes every byte: a cache sized for the busiest day would be paid for at start.
    """
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    raw = torch.from_numpy(np.zeros(prod(shape) * dtype.itemsize, np.uint8))
    return raw.view(dtype).view(*shape)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on the device, whose work so far is not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
