"""LoraLinear: one frozen linear of the base, plus the current step's deltas.

A step (serving or training) installs itself in the model's one `StepSlot`; every LoraLinear gets its deltas from there.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from adapters import kernels
from adapters.kernels import reference
from adapters.peft_format.sizes import LinearSize


class Deltas(Protocol):
    """The adapters' deltas of one step."""

    def add(self, linear: "LoraLinear", x: Tensor, y: Tensor) -> Tensor:
        """Return `y + delta(x)`; may write into `y`. x [tokens, in], y [tokens, out]."""


class RoutedTokens:
    """A step's tokens sorted by expert: the rows of experts' products.

    Args:
        experts: int64 [rows], ascending.
        tokens: int64 [rows], ascending for each expert.
        counts: int64 [experts], rows of each.
        total: tokens of the step.
    """

    def __init__(self, experts: Tensor, tokens: Tensor, counts: Tensor, total: int) -> None:
        self.counts = counts
        self._rows = experts, tokens
        self._total = total
        self._runs: dict[tuple[int, int], list[tuple[int, int, int]]] = {}

    def runs(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Return the rows of tokens `start` to `end`: (expert, first row, end) for each expert with any."""
        if (start, end) not in self._runs:
            experts, tokens = self._rows
            first = torch.arange(len(self.counts), device=tokens.device) * self._total
            bounds = torch.stack([first + start, first + end])
            rows = torch.searchsorted(experts * self._total + tokens, bounds).T.tolist()
            self._runs[start, end] = [(expert, *run) for expert, run in enumerate(rows) if run[0] < run[1]]
        return self._runs[start, end]


class ExpertDeltas(Protocol):
    """The adapters' deltas of one step in experts' linears."""

    def add(self, name: str, index: int, x: Tensor, y: Tensor, routed: RoutedTokens) -> Tensor:
        """Return `y + delta(x)` of the parameter `name`; may write into `y`. x [rows, in], y [rows, out]."""


class Attention(Protocol):
    """The attention of one step's tokens."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scaling: float,
        window: int,
        softcap: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """q [T, H, D], k and v [T, Hkv, D] after rope -> [T, H, D]; the rest as in `kernels.paged_attention`."""


class States(Protocol):
    """The convolutions and recurrences of one step in layers that keep a state; arguments as in `kernels`."""

    def convolve(self, layer: int, x: Tensor, taps: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        """`kernels.convolve`."""

    def recur(self, layer: int, recurrence: kernels.Recurrence) -> Tensor:
        """`kernels.recur`."""


class StepSlot:
    """Holds the current step. One instance per model, shared by all its LoraLinears, experts, attention layers and
    mixers.

    `deltas` is None when no token of the step uses an adapter: the LoRA path is then skipped altogether. Likewise
    `experts`, when no adapter of the step targets experts.
    """

    def __init__(self) -> None:
        self.deltas: Deltas | None = None
        self.experts: ExpertDeltas | None = None
        self.attention: Attention | None = None
        self.states: States | None = None


class FrozenLinear(nn.Module):
    """A linear of the base `[out, in]` with a weight that never changes.

    Args:
        base: the original module (`nn.Linear`, bitsandbytes `Linear4bit` or `Linear8bitLt`); kept but never called,
            since bitsandbytes' own forward recasts the bias in place and may repack the weight.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.weight = kernels.QuantizedWeight.from_linear(base)
        bias = getattr(base, "bias", None)
        self.bias: Tensor | None = None if bias is None else bias.data
        self.out_features, self.in_features = self.weight.shape

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        y = kernels.base_linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        return reference.with_row_gaps(y).view(*x.shape[:-1], self.out_features)


class LoraLinear(FrozenLinear):
    """A frozen linear that adds adapters' deltas.

    Args:
        name: full module name in the base, as in PEFT.
        index: position among the model's LoraLinears; row of a segment table.
    """

    def __init__(self, base: nn.Module, name: str, index: int, slot: StepSlot) -> None:
        super().__init__(base)
        self.name = name
        self.index = index
        self.slot = slot
        self.size = LinearSize(name.rpartition(".")[2], self.in_features, self.out_features)

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        rows = x.reshape(-1, self.in_features)
        y = kernels.base_linear(rows, self.weight, self.bias)
        if self.slot.deltas is not None:
            y = self.slot.deltas.add(self, rows, y)
        return reference.with_row_gaps(y).view(*x.shape[:-1], self.out_features)


def wrap_linears(decoder: nn.Module, prefix: str, slot: StepSlot) -> list[LoraLinear]:
    """Replace every linear below `decoder` by a LoraLinear, in module order; their names start with `prefix`."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers.pytorch_utils import Conv1D

    wrapped: list[LoraLinear] = []
    for name, module in list(decoder.named_modules()):
        if isinstance(module, Conv1D):
            module = _as_linear(module.weight, module.bias)
        if isinstance(module, nn.Linear | Linear4bit | Linear8bitLt):
            linear = LoraLinear(module, f"{prefix}{name}", len(wrapped), slot)
            parent, _, child = name.rpartition(".")
            setattr(decoder.get_submodule(parent), child, linear)
            wrapped.append(linear)
    return wrapped


def _as_linear(weight: nn.Parameter, bias: nn.Parameter) -> nn.Linear:
    """Return a linear for a weight [in, out]."""
    in_features, out_features = weight.shape
    linear = nn.Linear(in_features, out_features, device="meta")
    linear.weight = nn.Parameter(weight.data.T.contiguous(), requires_grad=False)
    linear.bias = nn.Parameter(bias.data, requires_grad=False)
    return linear
