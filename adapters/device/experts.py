"""Experts of a mixture: the base's frozen weights, and the forward pass of routed tokens.

`forward` is registered with transformers as an experts implementation: the modules, routers and gates stay
transformers' own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from adapters import kernels
from adapters.device.lora import RoutedTokens, StepSlot
from adapters.kernels import ExpertWeights, reference
from adapters.peft_format.sizes import ExpertsSize


class ExpertLinear(nn.Module):
    """One linear of all experts of a layer; replaces a parameter `[experts, ...]` of transformers.

    Args:
        shape: of the parameter.
        transposed: whether the parameter holds each weight as `[in, out]`.
    """

    weights: ExpertWeights
    name: str  # the parameter's full name
    index: int  # after those of the model's LoraLinears
    slot: StepSlot

    def __init__(self, shape: torch.Size, transposed: bool) -> None:
        super().__init__()
        self.shape = shape
        self.transposed = transposed
        experts, inputs, outputs = shape if transposed else (shape[0], shape[2], shape[1])
        self.size = ExpertsSize(experts, inputs, outputs)
        self._is_hf_initialized = True

    def attach(self, name: str, index: int, slot: StepSlot) -> None:
        """Set the linear's name, index and the model's slot for adapters."""
        self.name, self.index, self.slot = name, index, slot

    def fill(self, weights: ExpertWeights, dtype: torch.dtype) -> None:
        """Set the weights, once; `dtype` is the model's."""
        self.weights, self.dtype = weights.to_huge_pages(), dtype
        for name, tensor in self.weights.tensors().items():
            self.register_buffer(name, tensor, persistent=False)

    def __getitem__(self, expert: Tensor) -> Tensor:
        """Return one expert's weight, dense, for transformers' own implementations."""
        dense = self.weights[int(expert)].dequantize(self.dtype)
        return dense.T if self.transposed else dense

    def forward(self, rows: Tensor, routed: RoutedTokens) -> Tensor:
        """Multiply rows sorted by expert: `[rows, in] -> [rows, out]`."""
        y = kernels.grouped_linear(rows, self.weights, routed.counts)
        deltas = self.slot.experts
        return y if deltas is None else deltas.add(self.name, self.index, rows, y, routed)


def forward(module: Any, hidden: Tensor, index: Tensor, scores: Tensor) -> Tensor:
    """Return the weighted sum of each token's experts: `[T, H] -> [T, H]`.

    The weighted outputs of a token are added in the router's order, so that no other token changes its sum.

    Args:
        module: transformers' experts, with `ExpertLinear`s for weights.
        index: `[T, k]`, the experts.
        scores: `[T, k]`, their weights.
    """
    top_k = index.shape[1]
    experts, order = index.flatten().sort(stable=True)
    tokens = order // top_k
    counts = experts.new_zeros(module.num_experts).scatter_add_(0, experts, torch.ones_like(experts))
    routed = RoutedTokens(experts, tokens, counts, len(hidden))
    rows = hidden[tokens]
    if module.has_gate:
        rows = module.gate_up_proj(rows, routed)
        rows = module._apply_gate(rows + module.gate_up_proj_bias[experts] if module.has_bias else rows)
    else:
        rows = module.up_proj(rows, routed)
        rows = module.act_fn(rows + module.up_proj_bias[experts] if module.has_bias else rows)
    rows = module.down_proj(rows, routed)
    if module.has_bias:
        rows = rows + module.down_proj_bias[experts]
    if module.has_post_expert_norm:
        rows = module.post_expert_norm(rows)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    weighted = rows[places].view(len(hidden), top_k, -1).float() * scores[..., None]
    total = weighted[:, 0]
    for choice in range(1, top_k):
        total = total + weighted[:, choice]
    return total.to(hidden.dtype)


def pad_router(router: nn.Module, weight: Tensor) -> None:
    """Pad a router's rows, so that torch's operations give a row the same bits for any number of rows.

    Args:
        weight: the router's, `[experts, in]`.
    """
    inner = type(router).forward

    def padded(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        count = hidden.shape[-2]
        hidden = reference.pad_rows(hidden, weight, whole_lanes=True)
        found = inner(router, hidden, *args, **kwargs)
        whole = hidden.shape[-2]
        if isinstance(found, Tensor):
            return _drop_padding(found, whole, count)
        return tuple(_drop_padding(part, whole, count) for part in found)

    router.forward = padded


def _drop_padding(part: Any, num_padded: int, count: int) -> Any:
    """Return the first `count` of a tensor's `num_padded` rows, along its first or second dimension."""
    if not isinstance(part, Tensor) or num_padded == count:
        return part
    if part.shape[0] == num_padded:
        return part[:count]
    return part[:, :count] if part.dim() > 1 and part.shape[1] == num_padded else part
