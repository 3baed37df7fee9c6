"""Experts of a mixture: the base's frozen weights, and how routed tokens pass them.

`forward` is an experts implementation of transformers, as attention is: the modules, their routers and gates stay
transformers' own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from adapters import kernels
from adapters.kernels import ExpertWeights, reference


class ExpertLinear(nn.Module):
    """One linear of all experts of a layer; stands where transformers has a parameter `[experts, ...]`.

    Args:
        shape: of that parameter.
        transposed: it holds each weight as `[in, out]`.
    """

    weights: ExpertWeights

    def __init__(self, shape: torch.Size, transposed: bool) -> None:
        super().__init__()
        self.shape = shape
        self.transposed = transposed
        self._is_hf_initialized = True

    def fill(self, weights: ExpertWeights, dtype: torch.dtype) -> None:
        """Take the weights in, once; `dtype` is the model's."""
        self.weights, self.dtype = weights, dtype
        for name, tensor in weights.tensors().items():
            self.register_buffer(name, tensor, persistent=False)

    def __getitem__(self, expert: Tensor) -> Tensor:
        """One expert's weight, dense, as transformers' own experts ask for it."""
        dense = self.weights[int(expert)].dequantize(self.dtype)
        return dense.T if self.transposed else dense

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Rows sorted by expert, `counts` of each: `[rows, in] -> [rows, out]`."""
        return kernels.grouped_linear(rows, self.weights, counts)


def forward(module: Any, hidden: Tensor, index: Tensor, scores: Tensor) -> Tensor:
    """The experts that each token was routed to, weighted: `[T, H] -> [T, H]`.

    The weighted outputs of a token are added in the router's order, so that its sum is its own.

    Args:
        module: transformers' experts, whose weights are `ExpertLinear`s.
        index: `[T, k]`, the experts.
        scores: `[T, k]`, their weights.
    """
    top_k = index.shape[1]
    experts, order = index.flatten().sort(stable=True)
    counts = torch.bincount(experts, minlength=module.num_experts)
    rows = hidden[order // top_k]
    if module.has_gate:
        rows = module.gate_up_proj(rows, counts)
        rows = module._apply_gate(rows + module.gate_up_proj_bias[experts] if module.has_bias else rows)
    else:
        rows = module.up_proj(rows, counts)
        rows = module.act_fn(rows + module.up_proj_bias[experts] if module.has_bias else rows)
    rows = module.down_proj(rows, counts)
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
    """Let a router see its rows padded, so that a library product gives each of them the same bits in any company.

    Args:
        weight: its own `[experts, in]`.
    """
    inner = type(router).forward

    def padded(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        count = hidden.shape[-2]
        hidden = reference.pad_rows(hidden, weight)
        found = inner(router, hidden, *args, **kwargs)
        whole = hidden.shape[-2]
        if isinstance(found, Tensor):
            return _cut(found, whole, count)
        return tuple(_cut(part, whole, count) for part in found)

    router.forward = padded


def _cut(part: Any, whole: int, count: int) -> Any:
    """The first `count` rows of a tensor of `whole` rows, packed or flattened."""
    if not isinstance(part, Tensor) or whole == count:
        return part
    if part.shape[0] == whole:
        return part[:count]
    return part[:, :count] if part.dim() > 1 and part.shape[1] == whole else part
