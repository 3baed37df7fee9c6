"""A new LoRA adapter made of several, equal to PEFT's `add_weighted_adapter`.

The mathematics follow PEFT (`tuners/lora/model.py`, `utils/merge_utils.py`) but for two things: the result's scaling is
1 for rsLoRA sources too, and random pruning draws from its own generator, so that a mix can be reproduced. `mix` works
on factors alone; `carry_out` mixes directories, in a process of its own so that the server need neither load torch nor
wait.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters.offline import of_experts
from adapters.offline.factors import Factors, read_factors
from adapters.offline.recipe import Recipe
from adapters.peft_format import directory as adapter_format
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.sizes import ExpertsSize


def mix(adapters: Sequence[Mapping[str, Factors]], recipe: Recipe) -> dict[str, tuple[Tensor, Tensor]]:
    """The mixed adapter: module -> (A fp32 [rank, in], B fp32 [out, rank]), with scaling 1.

    Args:
        adapters: module -> factors, one per weight. A module missing from some adapters is mixed of the others.

    Raises:
        AdapterError: ranks differ where the method needs them equal.
    """
    # PEFT ignores the method for a single adapter.
    method = "linear" if len(adapters) == 1 else recipe.method
    combine = _Combination(method, recipe)
    rank = recipe.rank or max(len(factors.a) for adapter in adapters for factors in adapter.values())
    mixed: dict[str, tuple[Tensor, Tensor]] = {}
    for module in dict.fromkeys(name for adapter in adapters for name in adapter):
        pairs = zip(adapters, recipe.weights, strict=True)
        present = [(adapter[module], weight) for adapter, weight in pairs if module in adapter]
        if method == "cat":
            mixed[module] = _concatenated(present)
        elif method == "svd":
            mixed[module] = _truncated(*_concatenated(present), rank)
        elif method.endswith("_svd"):
            delta = combine([factors.delta for factors, _ in present], [weight for _, weight in present])
            mixed[module] = _decomposed(delta, rank)
        else:
            if len({len(factors.a) for factors, _ in present}) > 1:
                raise AdapterError(f"'{method}' needs adapters of equal rank; at '{module}' they differ", "mix")
            # The weight of a product is shared between its factors.
            weights = [weight * factors.scaling for factors, weight in present]
            roots = [math.sqrt(abs(weight)) for weight in weights]
            signed = [math.copysign(root, weight) for root, weight in zip(roots, weights, strict=True)]
            a = combine([factors.a for factors, _ in present], signed)
            mixed[module] = a, combine([factors.b for factors, _ in present], roots)
    return mixed


def _concatenated(present: Sequence[tuple[Factors, float]]) -> tuple[Tensor, Tensor]:
    """The exact sum, with the sum of the ranks as its rank."""
    a = torch.cat([factors.a * (weight * factors.scaling) for factors, weight in present])
    return a, torch.cat([factors.b for factors, _ in present], dim=1)


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`_decomposed(b @ a, rank)` without computing that product."""
    q_b, r_b = torch.linalg.qr(b)  # [out, k], [k, R]
    q_a, r_a = torch.linalg.qr(a.T)  # [in, k'], [k', R]
    inner_a, inner_b = _decomposed(r_b @ r_a.T, rank)
    return inner_a @ q_a.T, q_b @ inner_b


def _decomposed(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best A [rank, in] and B [out, rank] for delta [out, in]; the singular values go into B, as in PEFT."""
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return vh[:rank].contiguous(), (u[:, :rank] * s[:rank]).contiguous()


class _Combination:
    """The weighted sum of tensors, pruned first; with `ties` the mean of those that agree with the elected sign."""

    def __init__(self, method: str, recipe: Recipe) -> None:
        self._random = method.startswith("dare")
        self._ties = "ties" in method
        self._density = recipe.density if self._random or method.startswith(("ties", "magnitude")) else 1.0
        self._majority_sign = recipe.majority_sign
        self._generator = torch.Generator().manual_seed(recipe.seed)

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        stacked = torch.stack([self._prune(tensor) for tensor in tensors])
        weighted = stacked * torch.tensor(weights).view(-1, 1, 1)
        if not self._ties:
            return weighted.sum(dim=0)
        sign = stacked.sign()
        votes = (stacked if self._majority_sign == "total" else sign).sum(dim=0)
        agree = sign == torch.where(votes >= 0, 1, -1)
        return (weighted * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1.0)

    def _prune(self, tensor: Tensor) -> Tensor:
        if self._density >= 1:
            return tensor
        if self._random:
            kept = torch.bernoulli(torch.full_like(tensor, self._density), generator=self._generator)
            return tensor * kept / self._density
        mask = torch.zeros(tensor.numel())
        mask[tensor.abs().flatten().topk(int(self._density * tensor.numel())).indices] = 1
        return tensor * mask.view_as(tensor)


# --- directories -----------------------------------------------------------------------------------


def write_mixed(
    directory: Path, mixed: Mapping[str, tuple[Tensor, Tensor]], base: str | None, experts: Collection[str] = ()
) -> None:
    """Write factors with scaling 1 as a PEFT adapter.

    Args:
        mixed: by module, those of experts by the names of `of_experts.read_per_expert`.
        experts: the parameters that hold the base's experts, in their order.
    """
    ranks = {of_experts.parameter_of(name) or name: len(a) for name, (a, _) in mixed.items()}
    rank = max(ranks.values())
    others = {name: number for name, number in ranks.items() if number != rank}
    config = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(name for name in ranks if name in mixed),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
    }
    if parameters := sorted(name for name in ranks if name not in mixed):
        config["target_parameters"] = parameters
    adapter_format.write(directory, config, of_experts.join_experts(mixed, experts))


def carry_out(order: Mapping[str, Any]) -> None:
    """Mix `order["sources"]` by `order["recipe"]` into the existing directory `order["target"]`."""
    recipe = Recipe(**order["recipe"])
    sizes = {name: ExpertsSize(**size) for name, size in order["experts"].items()}
    sources = [Path(source) for source in order["sources"]]
    read = [
        read_factors(source, allowed_variants={"experts"}) | of_experts.read_per_expert(source, sizes)
        for source in sources
    ]
    write_mixed(Path(order["target"]), mix(read, recipe), order["base"], sizes)
