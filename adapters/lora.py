"""LoraLinear: one frozen linear of the base, plus whatever the current step adds to it.

A step (serving or training) installs itself in the model's one `StepSlot`; every LoraLinear asks it for the adapters'
part. This file knows neither where adapter rows live (pool.py) nor what a request or a training job is.
"""

from typing import Protocol

from torch import Tensor, nn

from adapters import kernels


class Deltas(Protocol):
    """The adapters' part of one step."""

    def add(self, linear: "LoraLinear", x: Tensor, y: Tensor) -> Tensor:
        """Return `y + delta(x)`; may write into `y`. x [tokens, in], y [tokens, out]."""


class StepSlot:
    """Holds the step in force. One instance per model, shared by all its LoraLinears and attention layers.

    `deltas` is None when no token of the step uses an adapter: the LoRA path is then skipped altogether.
    """

    def __init__(self) -> None:
        self.deltas: Deltas | None = None


class LoraLinear(nn.Module):
    """A linear of the base `[out, in]` whose weight never changes, with room for adapters' deltas.

    Args:
        base: the original module (`nn.Linear`, bitsandbytes `Linear4bit` or `Linear8bitLt`); kept, never called:
            bitsandbytes' own forward recasts the bias in place and may repack the weight.
        name: full module name in the base, as PEFT writes it.
        index: position among the model's LoraLinears; row of a segment table.
    """

    def __init__(self, base: nn.Module, name: str, index: int, slot: StepSlot) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self.index = index
        self.slot = slot
        self.weight = kernels.QuantizedWeight.from_linear(base)
        bias = getattr(base, "bias", None)
        self.bias: Tensor | None = None if bias is None else bias.data
        self.out_features, self.in_features = self.weight.shape

    @property
    def kind(self) -> str:
        """Last component of the name: `q_proj`, `down_proj`, ..."""
        return self.name.rsplit(".", 1)[-1]

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        rows = x.reshape(-1, self.in_features)
        y = kernels.base_linear(rows, self.weight, self.bias)
        if self.slot.deltas is not None:
            y = self.slot.deltas.add(self, rows, y)
        return y.view(*x.shape[:-1], self.out_features)


def wrap_linears(decoder: nn.Module, prefix: str, slot: StepSlot) -> list[LoraLinear]:
    """Replace every linear below `decoder` by a LoraLinear, in module order. Returns them; names start with `prefix`."""
    import bitsandbytes as bnb

    found = [
        (name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear | bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    ]
    wrapped = []
    for index, (name, module) in enumerate(found):
        if getattr(module, "bias", None) is not None:
            module.bias.requires_grad_(False)
        linear = LoraLinear(module, f"{prefix}{name}", index, slot)
        parent_name, _, child = name.rpartition(".")
        setattr(decoder.get_submodule(parent_name), child, linear)
        wrapped.append(linear)
    return wrapped
