"""States of fixed size that some layers keep of a sequence, in slots; the counterpart of `attention`'s KV cache."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters import kernels
from adapters.device.memory import zeros


@dataclass(frozen=True)
class LayerState:
    """One layer's state."""

    inputs: tuple[int, int]  # of its convolution: past inputs, channels
    memory: tuple[int, int, int] | None = None  # of its linear attention: heads, key size, value size

    @property
    def bytes(self) -> int:
        return 4 * (math.prod(self.inputs) + (0 if self.memory is None else math.prod(self.memory)))


class StateCache:
    """The states of all such layers, in fp32. Slot 0 is the state before a first token and is never written.

    Attributes:
        inputs, memory: by layer `[1 + slots, ...]`.
    """

    def __init__(self, layers: Mapping[int, LayerState], slots: int, device: torch.device) -> None:
        def tensor(shape: tuple[int, ...]) -> Tensor:
            return zeros((1 + slots, *shape), torch.float32, device)

        self.inputs = {layer: tensor(state.inputs) for layer, state in layers.items()}
        self.memory = {layer: tensor(state.memory) for layer, state in layers.items() if state.memory is not None}


@dataclass(frozen=True)
class StateStep:
    """The states of one serving step.

    Args:
        runs: as in `kernels.recurrence`; those of a sequence in order.
    """

    cache: StateCache
    runs: Tensor

    def convolve(self, layer: int, x: Tensor, taps: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        return kernels.convolve(x, taps, bias, silu, self.cache.inputs[layer], self.runs)

    def recur(self, layer: int, recurrence: kernels.Recurrence) -> Tensor:
        return kernels.recur(recurrence, self.cache.memory[layer], self.runs)
