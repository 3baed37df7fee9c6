"""Modules of the base that an adapter replaces as a whole: norms and routers.

Replaceable modules, and the places of tokens in their inputs and outputs (`ModuleRows`), are found when the base loads.
"""

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from adapters.device.experts import pad_router

ROWS = "token_rows"  # attribute of a replaceable module: its `ModuleRows`


class TokenRows(NamedTuple):
    """The places of a step's tokens in a tensor: along `axis`, with `per_token` consecutive rows per token.

    Norms over heads take `[1, heads, tokens, size]`, or `[tokens * heads, size]`.
    """

    axis: int
    per_token: int

    def of(self, tensor: Tensor, start: int, end: int) -> Tensor:
        """Return a view of these tokens' rows."""
        return tensor.narrow(self.axis, start * self.per_token, (end - start) * self.per_token)


class ModuleRows(NamedTuple):
    """The places of tokens in a module's arguments, the same in all, and in each of its results."""

    arguments: TokenRows
    results: tuple[TokenRows, ...]


def copy_module(module: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a module with some parameters replaced, and without the hooks of a step."""
    other = copy.copy(module)
    replaced = {
        name: nn.Parameter(parameters.get(name, old.data).to(old.dtype), requires_grad=False)
        for name, old in module.named_parameters(recurse=False)
    }
    other._parameters, other._forward_hooks = dict(replaced), OrderedDict()
    if vars(other).pop("forward", None) is not None:  # a padded router's, bound to the original
        pad_router(other, next(weight for weight in replaced.values() if weight.dim() == 2))
    return other


def replacing_hook(runs: Sequence[tuple[int, int, nn.Module]]) -> Any:
    """Return a forward hook that applies other modules to runs of tokens (start, end, module)."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        rows: ModuleRows = getattr(module, ROWS)
        for start, end, other in runs:
            found = other(*(rows.arguments.of(part, start, end) for part in args))
            for place, old, new in zip(rows.results, as_tuple(output), as_tuple(found), strict=True):
                place.of(old, start, end).copy_(new)

    return hook


def as_tuple(output: Any) -> tuple[Any, ...]:
    """Return a module's results as a tuple."""
    return output if isinstance(output, tuple) else (output,)
