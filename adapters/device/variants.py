"""An adapter's variants on the device, beyond rank rows: DoRA, biases, norms, embeddings, heads, single tokens.

`variant_builder` makes an adapter's `Extras`; `StepExtras` applies those of one step, by hooks on the base's modules
that exist only while the step runs, so that a step without extras runs only the base's modules. Every row's result
is independent of other rows.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapters import kernels
from adapters.device.lora import Deltas, ExpertDeltas, FrozenLinear, LoraLinear, RoutedTokens
from adapters.device.memory import to_device
from adapters.device.whole_modules import copy_module, replacing_hook


class Affine(NamedTuple):
    """`y * gain + shift`, per output; None leaves out a part. fp32 [out] each."""

    gain: Tensor | None
    shift: Tensor | None

    def apply_(self, y: Tensor) -> None:  # [n, out]
        if self.gain is not None:
            y.mul_(self.gain)
        if self.shift is not None:
            y.add_(self.shift)


class LowRank(NamedTuple):
    """A pair of A and B with its own storage: row units as in the pool, `[units, in]` and `[units, out]`.

    Pairs of experts lie one after the other, each of this rank.
    """

    a: Tensor
    b: Tensor
    rank: int
    scaling: float
    dtype: int

    def add_(self, y: Tensor, x: Tensor, weight: float) -> None:
        """`y [n, out] += weight * scaling * B A x`; x [n, in]."""
        table = torch.tensor([[0, len(x), 0, self.rank, self.dtype]], dtype=torch.int32, device=y.device)
        scale = torch.tensor([weight * self.scaling], device=y.device)
        kernels.lora_add_(y, x, self.a, self.b, table, scale)

    def add_runs_(self, y: Tensor, x: Tensor, runs: Sequence[tuple[int, int, int]], weight: float) -> None:
        """The same for runs of rows (expert, first row, end), each with the expert's A and B."""
        units = self.rank * (2 if self.dtype == kernels.FP32 else 1)
        rows = [[start, end, expert * units, self.rank, self.dtype] for expert, start, end in runs]
        table = to_device(torch.tensor(rows, dtype=torch.int32), y.device)
        scale = torch.full([len(rows)], weight * self.scaling, device=y.device)
        kernels.lora_add_(y, x, self.a, self.b, table, scale, self.rank)


@dataclass(frozen=True, eq=False)
class TrainedRows:
    """Rows that replace some of an embedding's or a head's. ids int64 [n], ascending; rows [n, width]."""

    ids: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class EmbeddingExtras:
    """A changed input embedding.

    `new`: rows [n, width] of the tokens beyond the base's vocabulary. `columns`: A's columns by token,
    [vocabulary, rank]. `lora`: B, with an identity for A.
    """

    new: Tensor | None = None
    weight: Tensor | None = None  # [vocabulary, width]
    trained: TrainedRows | None = None
    columns: Tensor | None = None
    lora: LowRank | None = None
    affine: Affine | None = None

    def apply_(self, y: Tensor, ids: Tensor, weight: float, scale: float, vocabulary: int) -> None:
        """Change the embedded tokens y [n, width] of ids [n]; `scale` is the factor of the base's rows.

        `vocabulary` is the base's: tokens from there on have no valid embedding yet.
        """
        if self.new is not None:
            beyond = ids >= vocabulary
            y[beyond] = self.new[ids[beyond] - vocabulary].to(y.dtype) * scale
        if self.weight is not None:
            y.copy_(self.weight[ids.clamp(max=len(self.weight) - 1)]).mul_(scale)
        if self.trained is not None:
            at = torch.searchsorted(self.trained.ids, ids).clamp_(max=len(self.trained.ids) - 1)
            found = self.trained.ids[at] == ids
            y[found] = self.trained.rows[at[found]].to(y.dtype) * scale
        if self.lora is not None and self.columns is not None:
            columns = self.columns[ids.clamp(max=len(self.columns) - 1)]
            self.lora.add_(y, columns.to(y.dtype), weight * scale)
        if self.affine is not None:
            self.affine.apply_(y)


@dataclass(frozen=True, eq=False)
class HeadExtras:
    """A changed output head; all weights [out, width]. `new`: for the tokens beyond the base's vocabulary."""

    new: kernels.QuantizedWeight | None = None
    weight: kernels.QuantizedWeight | None = None
    trained_ids: Tensor | None = None
    trained: kernels.QuantizedWeight | None = None
    lora: LowRank | None = None
    affine: Affine | None = None
    bias: Tensor | None = None  # the base's, in the adapter's vocabulary

    def apply_(self, y: Tensor, x: Tensor, weight: float) -> None:
        """Change the logits y [n, vocabulary] of normed hidden states x [n, width]."""
        bias = self.bias
        if self.new is not None:
            new = self.new.shape[0]
            y[:, -new:] = kernels.base_linear(x, self.new, None if bias is None else bias[-new:])
        if self.weight is not None:
            y.copy_(kernels.base_linear(x, self.weight, bias))
        if self.trained is not None and self.trained_ids is not None:
            added = None if bias is None else bias[self.trained_ids]
            y[:, self.trained_ids] = kernels.base_linear(x, self.trained, added)
        if self.lora is not None:
            self.lora.add_(y, x, weight)
        if self.affine is not None:
            self.affine.apply_(y)


@dataclass(frozen=True, eq=False)
class Classifier:
    """A classification head: normed hidden state to a score per label. weight fp32 [labels, hidden], bias [labels]."""

    weight: kernels.QuantizedWeight
    bias: Tensor | None = None

    def scores(self, x: Tensor) -> Tensor:
        """Return the scores of a hidden state x [hidden]: fp32 [labels]."""
        return kernels.base_linear(x.float()[None], self.weight, self.bias)[0]


@dataclass(frozen=True, eq=False)
class Extras:
    """One adapter's variants, beyond rank rows."""

    linears: dict[str, Affine]  # by full module name
    modules: dict[str, nn.Module]  # by full module name: norms and routers, with other parameters than the base's
    embedding: EmbeddingExtras | None
    head: HeadExtras | None
    new_tokens: int = 0  # added to the base's vocabulary, or removed if negative: the width of logits changes likewise
    classifier: Classifier | None = None  # instead of logits
    experts: dict[str, list[LowRank]] = dataclasses.field(default_factory=dict)  # by the experts' parameter

    @property
    def in_decoder(self) -> bool:
        """Whether anything between embedding and head is changed."""
        return bool(self.linears or self.modules or self.experts)

    @property
    def in_model(self) -> bool:
        """Whether any of the base's modules is changed."""
        return self.in_decoder or self.embedding is not None or self.head is not None

    def to(self, device: torch.device) -> "Extras":
        """Return the extras on a device."""
        moved: Extras = _to_device(self, device)
        return moved


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, nn.Module):
        return copy_module(
            value, {name: tensor.data.to(device) for name, tensor in value.named_parameters(recurse=False)}
        )
    if isinstance(value, dict):
        return {name: _to_device(part, device) for name, part in value.items()}
    if isinstance(value, list):
        return [_to_device(part, device) for part in value]
    if isinstance(value, LowRank | Affine):
        return type(value)(*(_to_device(part, device) for part in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: _to_device(getattr(value, part.name), device) for part in dataclasses.fields(value)}
        return type(value)(**parts)
    return value


class ExtraUse(NamedTuple):
    """A run of a step's rows with one adapter's extras, among all tokens or among the rows of the head."""

    start: int
    end: int
    extras: Extras
    weight: float


class _AffineDeltas:
    """The deltas of a step with scaled or shifted linears: rank rows first, then gain and shift."""

    def __init__(self, inner: Deltas | None, uses: Sequence[ExtraUse]) -> None:
        self._inner = inner
        self._uses = uses

    def add(self, linear: LoraLinear, x: Tensor, y: Tensor) -> Tensor:
        if self._inner is not None:
            y = self._inner.add(linear, x, y)
        for start, end, extras, _ in self._uses:
            affine = extras.linears.get(linear.name)
            if affine is not None:
                affine.apply_(y[start:end])
        return y


class _StepExperts:
    """The adapters' deltas of a step in experts' linears."""

    def __init__(self, uses: Sequence[ExtraUse]) -> None:
        self._uses = uses

    def add(self, name: str, index: int, x: Tensor, y: Tensor, routed: RoutedTokens) -> Tensor:
        for start, end, extras, weight in self._uses:
            runs = routed.runs(start, end)
            for rows in extras.experts.get(name, ()) if runs else ():
                rows.add_runs_(y, x, runs, weight)
        return y


class StepExtras:
    """The extras of one step.

    Args:
        tokens: runs of the step's tokens, in order of application.
        head_rows: the same adapters' runs among the rows of the head.
    """

    def __init__(self, tokens: Sequence[ExtraUse], head_rows: Sequence[ExtraUse]) -> None:
        self.tokens = tokens
        self.head_rows = head_rows

    @property
    def in_decoder(self) -> bool:
        """Whether anything between embedding and head is changed."""
        return any(use.extras.in_decoder for use in self.tokens)

    def wrap_deltas(self, inner: Deltas | None) -> Deltas | None:
        """Return the deltas of linears: `inner` and these."""
        uses = [use for use in self.tokens if use.extras.linears]
        return _AffineDeltas(inner, uses) if uses else inner

    @property
    def experts(self) -> ExpertDeltas | None:
        """The deltas of experts' linears, if any."""
        uses = [use for use in self.tokens if use.extras.experts]
        return _StepExperts(uses) if uses else None

    @contextmanager
    def installed(self, model: Any) -> Iterator[None]:
        """Let these adapters change embedding, norms, routers and head of `model` within the context."""
        with ExitStack() as stack:

            def hook(module: nn.Module, function: Any) -> None:
                stack.callback(module.register_forward_hook(function).remove)

            embedded = [use for use in self.tokens if use.extras.embedding]
            if embedded:
                embedding = model.get_input_embeddings()
                clamped = _ClampedIds(len(embedding.weight))
                if any(use.extras.new_tokens for use in embedded):
                    stack.callback(embedding.register_forward_pre_hook(clamped).remove)
                hook(embedding, _embedding_hook(embedded, clamped))
            headed = [use for use in self.head_rows if use.extras.head]
            if headed:
                hook(model.get_output_embeddings(), _head_hook(headed))
            for name in {name for use in self.tokens for name in use.extras.modules}:
                runs = [(u.start, u.end, u.extras.modules[name]) for u in self.tokens if name in u.extras.modules]
                hook(model.get_submodule(name), replacing_hook(runs))
            yield


class _ClampedIds:
    """A hook before an embedding: it clamps ids to the vocabulary, and keeps the original ids."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.ids: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.ids = args[0]
        return (args[0].clamp(max=self.vocabulary - 1), *args[1:])


def _embedding_hook(uses: Sequence[ExtraUse], clamped: _ClampedIds) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        ids = (args[0] if clamped.ids is None else clamped.ids).view(-1)
        rows = output.view(-1, output.shape[-1])
        scale = float(getattr(module, "embed_scale", 1.0))
        for start, end, extras, weight in uses:
            assert extras.embedding is not None
            extras.embedding.apply_(rows[start:end], ids[start:end], weight, scale, clamped.vocabulary)

    return hook


def _head_hook(uses: Sequence[ExtraUse]) -> Any:
    new = uses[0].extras.new_tokens  # a pass has one vocabulary

    def hook(module: FrozenLinear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = nn.functional.pad(output, (0, new)) if new else output
        x, logits = args[0].reshape(-1, args[0].shape[-1]), output.view(-1, output.shape[-1])
        for start, end, extras, weight in uses:
            assert extras.head is not None
            extras.head.apply_(logits[start:end], x[start:end], weight)
        return output

    return hook
