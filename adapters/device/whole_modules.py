"""Modules of its base that an adapter has whole, with other parameters: norms and routers.

Which of them may be replaced, and where tokens lie in what passes them, its loading found out (`ModuleRows`).
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from adapters.device.experts import pad_router

ROWS = "token_rows"  # attribute of a module that may be replaced: its `ModuleRows`


class TokenRows(NamedTuple):
    """Where a step's tokens are in a tensor: along this axis, in so many rows each, one token's after another.

    Norms of heads have these before the tokens, `[1, heads, tokens, size]`, or both in one, `[tokens * heads, size]`.
    """

    axis: int
    each: int

    def of(self, tensor: Tensor, start: int, end: int) -> Tensor:
        """The part of these tokens; a view."""
        return tensor.narrow(self.axis, start * self.each, (end - start) * self.each)


class ModuleRows(NamedTuple):
    """Where they are in a module's arguments, all alike, and in each tensor that it gives."""

    arguments: TokenRows
    results: tuple[TokenRows, ...]


def like_module(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """The same module with some other parameters, and without the hooks that a step may have on it."""
    other = copy.copy(module)
    replaced = {
        name: nn.Parameter(parameters.get(name, old.data).to(old.dtype), requires_grad=False)
        for name, old in module.named_parameters(recurse=False)
    }
    other._parameters, other._forward_hooks = dict(replaced), OrderedDict()
    if vars(other).pop("forward", None) is not None:  # a padded router's, which knows that one
        pad_router(other, next(weight for weight in replaced.values() if weight.dim() == 2))
    return other


def replacing_hook(runs: Sequence[tuple[int, int, nn.Module]]) -> Any:
    """A forward hook: other modules for some runs of tokens (start, end)."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        rows: ModuleRows = getattr(module, ROWS)
        for start, end, other in runs:
            found = other(*(rows.arguments.of(part, start, end) for part in args))
            for place, old, new in zip(rows.results, tensors_of(output), tensors_of(found), strict=True):
                place.of(old, start, end).copy_(new)

    return hook


def tensors_of(output: Any) -> tuple[Any, ...]:
    """What a module gave, one by one."""
    return output if isinstance(output, tuple) else (output,)
