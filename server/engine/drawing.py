"""Random draw of one token per row of scores, in plain torch on any device; `native.Kernels.draw` equals it on a CPU.

A row's token is a function of that row alone: no sum here depends on the number of rows (torch splits a sum over
threads when it yields a single number, so long sums go through blocks). Truncation is a floor under the weights, so
tokens of equal weight are kept or dropped together, in any order of a sort (vLLM's `top_p` may split them).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.device.memory import row_index, to_device
from adapters.kernels import Truncation

_LN2 = math.log(2.0)
_BLOCK = 128  # vocabulary entries that are summed together
_NUCLEUS_GUESS = 128  # tokens to rank at first: nearly every nucleus is among them


def draw(scores: Tensor, truncations: Sequence[Truncation], uniforms: Sequence[float]) -> Tensor:
    """Draw one token per row: int64 [rows]. A row with scores other than finite ones and -inf gives any token.

    Args:
        scores: float32 [rows, vocabulary]; -inf for tokens that are not allowed.
        truncations: one per row.
        uniforms: a random number in [0, 1) per row.
    """
    # Relative to the peak before dividing: no temperature can overflow, and the likeliest token weighs exactly 1.
    weights = scores - scores.amax(-1, keepdim=True)  # [rows, vocabulary]
    # Base 2, since `exp` of -inf takes five times as long.
    temperatures = _column([row.temperature * _LN2 for row in truncations], scores)
    weights.div_(temperatures).exp2_()

    limited = [index for index, row in enumerate(truncations) if 0 < row.top_k < weights.shape[1]]
    if limited or any(row.min_p for row in truncations):
        floor = _column([row.min_p for row in truncations], scores)
        if limited:
            limits = [truncations[index].top_k for index in limited]
            places = row_index(limited, scores)
            top = weights[places].topk(max(limits)).values
            kth = top.gather(1, to_device(torch.tensor(limits), scores.device)[:, None] - 1)
            floor[places] = torch.maximum(floor[places], kth)
        weights *= weights >= floor

    nuclei = [index for index, row in enumerate(truncations) if row.top_p < 1.0]
    if nuclei:
        shares = torch.tensor([[truncations[index].top_p] for index in nuclei], dtype=torch.float64)
        floor = weights.new_zeros(len(truncations), 1)
        places = row_index(nuclei, scores)
        floor[places] = _nucleus_floor(weights[places], to_device(shares, scores.device))
        weights *= weights >= floor

    return _invert(weights, to_device(torch.tensor(uniforms, dtype=torch.float64)[:, None], scores.device))


def _column(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Return one number per row as a column, float32 [rows, 1]."""
    return to_device(torch.tensor(numbers, dtype=torch.float32)[:, None], like.device)


def _nucleus_floor(weights: Tensor, p: Tensor) -> Tensor:
    """Return the smallest weight in each row's nucleus, the smallest set of likeliest tokens with a share `p` of all:
    float32 [rows, 1].

    Args:
        weights: float32 [rows, vocabulary].
        p: float64 [rows, 1].
    """
    total = block_sums(weights).sum(-1, keepdim=True)  # float64 [rows, 1]
    guesses = weights.device.type != "cuda"  # on a GPU, ranking all costs less than the sync to check the guess
    most = min(_NUCLEUS_GUESS, weights.shape[1])
    ranked = weights.topk(most).values if guesses else weights.sort(descending=True).values
    last = (ranked.cumsum(-1, dtype=torch.float64) < p * total).sum(-1, keepdim=True)  # rank that reaches the share p
    floor = ranked.gather(1, last.clamp(max=ranked.shape[1] - 1))
    if not guesses:
        return floor
    wide = (last == ranked.shape[1]).squeeze(1).nonzero().squeeze(1)
    if len(wide):
        weights, p, total = weights[wide], p[wide], total[wide]
        # Tokens below this weight have at most 1 - p together, so none is in the nucleus; only the others are ranked.
        candidate = weights >= ((1 - p) * total / weights.shape[1]).float()
        counts = candidate.sum(-1, keepdim=True)
        ranked = weights.new_zeros(len(wide), int(counts.max()))
        ranked[torch.arange(ranked.shape[1], device=weights.device) < counts] = weights[candidate]
        ranked = ranked.sort(descending=True).values
        last = (ranked.cumsum(-1, dtype=torch.float64) < p * total).sum(-1, keepdim=True)
        floor[wide] = ranked.gather(1, torch.minimum(last, counts - 1))  # by rounding, all may sum to just below p
    return floor


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return the token at which each row's running sum of weights passes its share `uniforms` [rows, 1] of the sum."""
    blocks = _as_blocks(weights)
    edges = block_sums(weights).cumsum(-1)  # float64 [rows, blocks]
    goal = uniforms * edges[:, -1:]
    block = _first_beyond(edges, goal)
    before = F.pad(edges, (1, 0)).gather(1, block)
    inside = blocks[torch.arange(len(weights), device=weights.device), block.squeeze(1)].cumsum(-1, dtype=torch.float64)
    return (block * _BLOCK + _first_beyond(inside, goal - before)).squeeze(1)


def _first_beyond(sums: Tensor, goal: Tensor) -> Tensor:
    """Return the index of the first running sum above the goal, or, if rounding leaves none, of the last increase."""
    return torch.minimum((sums <= goal).sum(-1, keepdim=True), (sums < sums[:, -1:]).sum(-1, keepdim=True))


def _as_blocks(weights: Tensor) -> Tensor:
    """Return weights [rows, vocabulary] as [rows, blocks, block], padded with zeros."""
    missing = -weights.shape[1] % _BLOCK
    return (F.pad(weights, (0, missing)) if missing else weights).unflatten(1, (-1, _BLOCK))


def block_sums(weights: Tensor) -> Tensor:
    """Return the sums over blocks of the vocabulary, float64 [rows, blocks]."""
    return _as_blocks(weights).sum(-1).double()  # float32 is accurate enough within a block, and needs no wider copy
