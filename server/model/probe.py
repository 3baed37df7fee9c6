"""Facts about a loaded model's modules, recorded in one step of dummy tokens.

They are the norms and routers that adapters may replace, and the tables besides the input embedding with a row per
token. `geometry` records the layers' KV in the same step.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from adapters import kernels
from adapters.device.experts import ExpertLinear
from adapters.device.whole_modules import ROWS, ModuleRows, TokenRows, as_tuple

TOKENS: Final = 13  # divides no number of heads or groups, so that the token axis can be recognised
TOKEN: Final = 3  # different from the positions, all of which are 0


class RecordedModules(NamedTuple):
    """The modules found in the step.

    Attributes:
        norms: full names of norms that an adapter may replace; they have `ModuleRows`.
        routers: the same for routers.
        by_token: full names of tables besides the input embedding that were looked up by token.
    """

    norms: list[str]
    routers: list[str]
    by_token: list[str]


class NoStates:
    """A stand-in for states that gives zeros for every token."""

    def convolve(self, layer: int, x: Tensor, taps: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        return torch.zeros_like(x)

    def recur(self, layer: int, recurrence: kernels.Recurrence) -> Tensor:
        return torch.zeros_like(recurrence.v)


@contextmanager
def recorded_modules(model: Any, routers: Sequence[nn.Module]) -> Iterator[RecordedModules]:
    """Record a step of `TOKENS` tokens `TOKEN` run within the context; the yielded object is filled at its end."""
    seen, embedding = RecordedModules([], [], []), model.get_input_embeddings()
    calls: dict[str, list[ModuleRows | None]] = {}
    with ExitStack() as stack:

        def hook(module: nn.Module, function: Any) -> None:
            stack.callback(module.register_forward_hook(function, with_kwargs=True).remove)

        for name, module in model.named_modules():
            if module in routers or (_is_norm(module) and not _is_expert_norm(model, name)):
                hook(module, _rows_hook(calls.setdefault(name, [])))
            elif isinstance(module, nn.Embedding) and module is not embedding:
                hook(module, _table_hook(name, seen.by_token))
        yield seen
    for name, found in calls.items():
        if len({*found}) == 1 and found[0] is not None:  # the same layout in every call
            module = model.get_submodule(name)
            setattr(module, ROWS, found[0])
            (seen.routers if module in routers else seen.norms).append(name)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: by its class's name, and with no parameters but a weight and perhaps a bias."""
    own = {name for name, _ in module.named_parameters()}
    return "norm" in type(module).__name__.lower() and bool(own) and own <= {"weight", "bias"}


def _is_expert_norm(model: nn.Module, name: str) -> bool:
    """Whether a norm runs on rows sorted by expert."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return any(isinstance(child, ExpertLinear) for child in parent.children())


def _rows_hook(calls: list[ModuleRows | None]) -> Any:
    def watch(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
        results = as_tuple(output)
        found = None
        if args and not kwargs and all(isinstance(part, Tensor) for part in (*args, *results)):
            own = max(parameter.dim() for parameter in module.parameters()) if _is_norm(module) else 1
            arguments = {_rows(part.shape, own) for part in args}
            given = tuple(_rows(part.shape, own) for part in results)
            if len(arguments) == 1 and None not in (*arguments, *given):
                found = ModuleRows(arguments.pop(), given)  # type: ignore[arg-type]
        calls.append(found)

    return watch


def _rows(shape: torch.Size, own_axes: int) -> TokenRows | None:
    """Return the only axis, before the last `own_axes` ones, with a whole number of rows per token; None if unclear."""
    axes = [axis for axis, size in enumerate(shape[: len(shape) - own_axes]) if size % TOKENS == 0]
    return TokenRows(axes[0], shape[axes[0]] // TOKENS) if len(axes) == 1 else None


def _table_hook(name: str, by_token: list[str]) -> Any:
    def watch(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
        ids = args[0] if args else next(iter(kwargs.values()))
        if isinstance(ids, Tensor) and bool((ids == TOKEN).all()):
            by_token.append(name)

    return watch
