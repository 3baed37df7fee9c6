"""Norms that an adapter brings whole, in place of the base's.

Which of the base's may be replaced, and where tokens lie in what passes them, its loading found out (`TokenRows`).
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

ROWS = "token_rows"  # attribute of a norm that may be replaced


class TokenRows(NamedTuple):
    """Where a norm has a step's tokens: along this axis of its input, in so many rows each, one token's after another.

    Norms of heads have these before the tokens, `[1, heads, tokens, size]`, or both in one, `[tokens * heads, size]`.
    """

    axis: int
    each: int

    def of(self, tensor: Tensor, start: int, end: int) -> Tensor:
        """The part of these tokens; a view."""
        return tensor.narrow(self.axis, start * self.each, (end - start) * self.each)


def like_norm(norm: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """The same norm with some other parameters, and without the hooks that a step may have on it."""
    other = copy.copy(norm)
    replaced = {
        name: nn.Parameter(parameters.get(name, old.data).to(old.dtype), requires_grad=False)
        for name, old in norm.named_parameters(recurse=False)
    }
    other._parameters, other._forward_hooks = dict(replaced), OrderedDict()
    return other


def norm_hook(runs: Sequence[tuple[int, int, nn.Module]]) -> Any:
    """A forward hook: other norms for some runs of tokens (start, end)."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        rows: TokenRows = getattr(module, ROWS)
        for start, end, norm in runs:
            rows.of(output, start, end).copy_(norm(*(rows.of(part, start, end) for part in args)))

    return hook
