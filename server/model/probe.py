"""One step of a model just loaded, of tokens that mean nothing, and what it tells of the modules that ran.

What their layers keep is `geometry`'s. Here: the norms that adapters may replace, and the tables besides the input
embedding that have a row for each token.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from adapters import kernels
from adapters.device.experts import ExpertLinear
from adapters.device.norms import ROWS, TokenRows

TOKENS: Final = 13  # of no number of heads or groups: their axes must be told from that of tokens
TOKEN: Final = 3  # no position, all of which are 0


class Seen(NamedTuple):
    """What ran.

    Attributes:
        norms: full names of those that an adapter may replace; they have `TokenRows`.
        by_token: full names of tables besides the input embedding that were looked up by token.
    """

    norms: list[str]
    by_token: list[str]


class NoStates:
    """Layers that keep a state, without one: every token's part is nothing."""

    def convolve(self, layer: int, x: Tensor, taps: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        return torch.zeros_like(x)

    def recur(self, layer: int, recurrence: kernels.Recurrence) -> Tensor:
        return torch.zeros_like(recurrence.v)


@contextmanager
def watched(model: nn.Module, embedding: nn.Module) -> Iterator[Seen]:
    """Within it the step of `TOKENS` tokens `TOKEN` runs; what it shows is in the answer afterwards."""
    seen = Seen([], [])
    calls: dict[str, list[TokenRows | None]] = {}
    with ExitStack() as stack:

        def hook(module: nn.Module, function: Any) -> None:
            stack.callback(module.register_forward_hook(function, with_kwargs=True).remove)

        for name, module in model.named_modules():
            if _is_norm(module) and not _of_experts(model, name):
                hook(module, _watch_norm(calls.setdefault(name, [])))
            elif isinstance(module, nn.Embedding) and module is not embedding:
                hook(module, _watch_table(name, seen.by_token))
        yield seen
    for name, found in calls.items():
        if len(found) == 1 and found[0] is not None:
            setattr(model.get_submodule(name), ROWS, found[0])
            seen.norms.append(name)


def _is_norm(module: nn.Module) -> bool:
    """By its name, and as it has nothing but a weight and perhaps a bias."""
    own = {name for name, _ in module.named_parameters()}
    return "norm" in type(module).__name__.lower() and bool(own) and own <= {"weight", "bias"}


def _of_experts(model: nn.Module, name: str) -> bool:
    """Whether it norms rows that are sorted by expert."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return any(isinstance(child, ExpertLinear) for child in parent.children())


def _watch_norm(calls: list[TokenRows | None]) -> Any:
    def watch(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
        shapes = {part.shape if isinstance(part, Tensor) else None for part in (*args, output)}
        rows = _rows(args[0].shape, module) if args and len(shapes) == 1 and None not in shapes else None
        calls.append(None if kwargs else rows)

    return watch


def _rows(shape: torch.Size, norm: nn.Module) -> TokenRows | None:
    """The one axis, before those that are normed, that has a number of rows for each token."""
    normed = max(parameter.dim() for parameter in norm.parameters())
    axes = [axis for axis, size in enumerate(shape[: len(shape) - normed]) if size % TOKENS == 0]
    return TokenRows(axes[0], shape[axes[0]] // TOKENS) if len(axes) == 1 else None


def _watch_table(name: str, by_token: list[str]) -> Any:
    def watch(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
        ids = args[0] if args else next(iter(kwargs.values()))
        if isinstance(ids, Tensor) and bool((ids == TOKEN).all()):
            by_token.append(name)

    return watch
