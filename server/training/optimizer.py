"""AdamW over a job's flat parameters, a slice at a time, so that an update is several short pieces of work.

torch's fused AdamW, or bitsandbytes' paged variants: on a CPU there is nothing to page, so only the width of their
state differs there. The state can be saved and restored bit for bit.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

from server.messages import training as messages

SLICE = {"cpu": 1 << 20, "cuda": 1 << 24}  # numbers updated in one piece
BETAS = (0.9, 0.999)
EPS = 1e-8


class AdamW:
    """One job's optimiser.

    Args:
        values, grads: fp32 [parameters].
        decayed: number of leading parameters subject to weight decay.
    """

    def __init__(
        self, values: Tensor, grads: Tensor, *, decayed: int, kind: messages.Optimizer, weight_decay: float
    ) -> None:
        self._slices: list[torch.optim.Optimizer] = []
        for begin, end, decay in ((0, decayed, weight_decay), (decayed, len(values), 0.0)):
            for first in range(begin, end, SLICE[values.device.type]):
                part = slice(first, min(end, first + SLICE[values.device.type]))
                parameter = nn.Parameter(values[part])
                parameter.grad = grads[part]
                self._slices.append(_make(parameter, kind, decay))

    def updates(self) -> Iterator["Update"]:
        """Return the pieces of one step."""
        return iter([Update(optimizer) for optimizer in self._slices])

    def state(self) -> dict[str, Tensor]:
        """Return copies of the optimiser's state, by name."""
        found = {}
        for number, optimizer in enumerate(self._slices):
            for name, value in optimizer.state[_parameter(optimizer)].items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                found[f"{number}.{name}"] = tensor.detach().clone()
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a result of `state`."""
        for number, optimizer in enumerate(self._slices):
            parameter = _parameter(optimizer)
            prefix = f"{number}."
            entries: dict[str, Any] = {
                name.removeprefix(prefix): tensor.to(parameter.device)
                for name, tensor in state.items()
                if name.startswith(prefix)
            }
            if entries and not isinstance(optimizer, torch.optim.AdamW):
                entries["step"] = int(entries["step"])  # bitsandbytes keeps a plain int
            optimizer.state[parameter] = entries


class Update:
    """One piece of a step."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    @property
    def size(self) -> int:
        """The number of parameters updated."""
        return _parameter(self._optimizer).numel()

    def run(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()


def _parameter(optimizer: torch.optim.Optimizer) -> nn.Parameter:
    parameter: nn.Parameter = optimizer.param_groups[0]["params"][0]
    return parameter


def _make(parameter: nn.Parameter, kind: messages.Optimizer, weight_decay: float) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": 0.0, "betas": BETAS, "eps": EPS, "weight_decay": weight_decay}
    on_gpu = parameter.device.type == "cuda"
    optimizer: torch.optim.Optimizer
    if kind == "paged_adamw_8bit":
        eight_bit = bitsandbytes.optim.PagedAdamW8bit if on_gpu else bitsandbytes.optim.AdamW8bit
        optimizer = eight_bit([parameter], **settings)
    elif kind == "paged_adamw_32bit" and on_gpu:
        optimizer = bitsandbytes.optim.PagedAdamW32bit([parameter], **settings)
    else:
        optimizer = torch.optim.AdamW([parameter], fused=True, **settings)
    return optimizer
