"""What an adapter does on the device besides its rank rows: DoRA, biases, norms, embeddings, heads, single tokens.

`build` makes an adapter's `Extras` from its tensors and the base; `StepExtras` applies those of one step, by hooks on
the base's modules that exist only while the step runs, so that a step without extras runs exactly what it ran before.
Knows neither files nor where rank rows live; every row's result is independent of the rows beside it.
"""

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapters import kernels
from adapters.device.lora import Deltas, FrozenLinear, LoraLinear
from adapters.device.units import DTYPE_CODES, as_units
from adapters.peft_format.layout import LoraModule, Variants


class Affine(NamedTuple):
    """`y * gain + shift`, per output; a missing part does nothing. fp32 [out] each."""

    gain: Tensor | None
    shift: Tensor | None

    def apply_(self, y: Tensor) -> None:  # [n, out]
        if self.gain is not None:
            y.mul_(self.gain)
        if self.shift is not None:
            y.add_(self.shift)


class LowRank(NamedTuple):
    """A pair of A and B with storage of its own: row units as in the pool, `[units, in]` and `[units, out]`."""

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


@dataclass(frozen=True, eq=False)
class TrainedRows:
    """Rows that take the place of some of an embedding's or a head's. ids int64 [n], ascending; rows [n, width]."""

    ids: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class EmbeddingExtras:
    """A changed input embedding.

    `new`: rows [n, width] of the tokens beyond the base's vocabulary. `lora`: A's columns by token [vocabulary, rank],
    and B behind an identity for A.
    """

    new: Tensor | None = None
    weight: Tensor | None = None  # [vocabulary, width]
    trained: TrainedRows | None = None
    columns: Tensor | None = None
    lora: LowRank | None = None
    affine: Affine | None = None

    def apply_(self, y: Tensor, ids: Tensor, weight: float, scale: float, vocabulary: int) -> None:
        """Change the embedded tokens y [n, width] of ids [n]; `scale` is what the base multiplies its rows with.

        `vocabulary` is the base's: tokens from there on have nothing embedded yet.
        """
        if self.new is not None:
            beyond = ids >= vocabulary
            y[beyond] = self.new[ids[beyond] - vocabulary].to(y.dtype) * scale
        if self.weight is not None:
            y.copy_(self.weight[ids]).mul_(scale)
        if self.trained is not None:
            at = torch.searchsorted(self.trained.ids, ids).clamp_(max=len(self.trained.ids) - 1)
            found = self.trained.ids[at] == ids
            y[found] = self.trained.rows[at[found]].to(y.dtype) * scale
        if self.lora is not None and self.columns is not None:
            self.lora.add_(y, self.columns[ids].to(y.dtype), weight * scale)
        if self.affine is not None:
            self.affine.apply_(y)


@dataclass(frozen=True, eq=False)
class HeadExtras:
    """A changed output head; all weights [out, width]. `new`: of the tokens beyond the base's vocabulary."""

    new: kernels.QuantizedWeight | None = None
    weight: kernels.QuantizedWeight | None = None
    trained_ids: Tensor | None = None
    trained: kernels.QuantizedWeight | None = None
    lora: LowRank | None = None
    affine: Affine | None = None

    def apply_(self, y: Tensor, x: Tensor, weight: float, bias: Tensor | None) -> None:
        """Change the logits y [n, vocabulary] of normed states x [n, width]; `bias` is the base's."""
        if self.new is not None:
            y[:, -self.new.shape[0] :] = kernels.base_linear(x, self.new, None)
        if self.weight is not None:
            y.copy_(kernels.base_linear(x, self.weight, bias))
        if self.trained is not None and self.trained_ids is not None:
            y[:, self.trained_ids] = kernels.base_linear(x, self.trained, None)
        if self.lora is not None:
            self.lora.add_(y, x, weight)
        if self.affine is not None:
            self.affine.apply_(y)


@dataclass(frozen=True, eq=False)
class Extras:
    """Everything that one adapter does besides its rank rows."""

    linears: dict[str, Affine]  # by full module name
    norms: dict[str, nn.Module]  # by full module name; as the base's, with other parameters
    embedding: EmbeddingExtras | None
    head: HeadExtras | None
    new_tokens: int = 0  # beyond the base's vocabulary: logits are as much wider

    @property
    def in_decoder(self) -> bool:
        """Whether anything between embedding and head is changed."""
        return bool(self.linears or self.norms)

    def to(self, device: torch.device) -> "Extras":
        """The same on a device."""
        moved: Extras = _moved(self, device)
        return moved


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, nn.Module):
        return _like(value, {name: tensor.data.to(device) for name, tensor in value.named_parameters(recurse=False)})
    if isinstance(value, dict):
        return {name: _moved(part, device) for name, part in value.items()}
    if isinstance(value, LowRank | Affine):
        return type(value)(*(_moved(part, device) for part in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: _moved(getattr(value, part.name), device) for part in dataclasses.fields(value)}
        return type(value)(**parts)
    return value


# --- making them ----------------------------------------------------------------------------------------


def build(
    variants: Variants,
    tensors: Mapping[str, Tensor],
    pairs: Mapping[str, tuple[Tensor, Tensor, float]],
    linears: Mapping[str, LoraLinear],
    model: nn.Module,
) -> Extras | None:
    """An adapter's extras, in host memory, or None when it has none.

    Args:
        variants: of its spec.
        tensors: what `adapters.peft_format.directory.load_variants` read.
        pairs: linear -> (A [rank, in], B [out, rank], scaling).
        linears: the base's, by full name.
        model: the base, in transformers' shape; what needs its weights is computed where they are.
    """
    builder = _Builder(variants, tensors, pairs, linears, model)
    extras = Extras(
        linears={name: affine for name in linears if (affine := builder.linear(name)) is not None},
        norms=builder.norms(),
        embedding=builder.embedding(),
        head=builder.head(),
        new_tokens=variants.new_tokens,
    )
    return extras.to(torch.device("cpu")) if extras.in_decoder or extras.embedding or extras.head else None


class _Builder:
    def __init__(
        self,
        variants: Variants,
        tensors: Mapping[str, Tensor],
        pairs: Mapping[str, tuple[Tensor, Tensor, float]],
        linears: Mapping[str, LoraLinear],
        model: Any,
    ) -> None:
        self._variants = variants
        self._tensors = tensors
        self._pairs = pairs
        self._linears = linears
        self._model = model
        self._embedding, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        self._device = self._embedding.weight.device
        names = {id(module): name for name, module in model.named_modules()}
        self._embedding_name, self._head_name = names[id(self._embedding)], names[id(self._head)]

    def _vector(self, name: str | None) -> Tensor | None:
        return None if name is None else self._tensors[name].float().to(self._device)

    def _matrix(self, name: str) -> Tensor:
        """In the file's dtype if that is one that the kernels read in place."""
        matrix = self._tensors[name]
        return (matrix.float() if matrix.dtype == torch.float16 else matrix).to(self._device)

    def linear(self, name: str) -> Affine | None:
        linear = self._linears[name]
        pair = self._pairs.get(name)
        return self._affine(name, linear.bias, pair, lambda: linear.weight.dequantize())

    def _affine(self, name: str, bias: Tensor | None, pair: Any, weight: Any) -> Affine | None:
        """`gain * (W x + s (B A x + b)) + bias'` as a gain and a shift of `W x + bias + s B A x`."""
        gain = self._gain(name, pair, weight)
        added = self._vector(self._variants.delta_biases.get(name))
        new = self._vector(self._variants.parameters.get(f"{name}.bias"))
        shift = None if added is None else added * pair[2]  # PEFT has no DoRA with a bias of lora_B
        if bias is not None and (gain is not None or new is not None):
            old = bias.float()
            change = (old if new is None else new) - (old if gain is None else gain * old)
            shift = change if shift is None else shift + change
        return None if gain is None and shift is None else Affine(gain, shift)

    def _gain(self, name: str, pair: Any, weight: Any) -> Tensor | None:
        """DoRA's m / ||W + s B A||, the norm over each output's inputs."""
        magnitude = self._vector(self._variants.magnitudes.get(name))
        if magnitude is None:
            return None
        a, b, scaling = (part.float().to(self._device) if isinstance(part, Tensor) else part for part in pair)
        directed: Tensor = weight().addmm(b, a, alpha=scaling)
        return magnitude / torch.linalg.norm(directed, dim=1)

    def norms(self) -> dict[str, nn.Module]:
        changed: dict[str, dict[str, Tensor]] = {}
        for parameter, tensor in self._variants.parameters.items():
            module, _, kind = parameter.rpartition(".")
            if module not in self._linears and module not in (self._embedding_name, self._head_name):
                changed.setdefault(module, {})[kind] = self._tensors[tensor]
        return {name: _like(self._model.get_submodule(name), parameters) for name, parameters in changed.items()}

    def _new(self, name: str) -> Tensor | None:
        """Rows of embedding or head beyond the base's."""
        grown = self._variants.grown.get(name)
        return None if grown is None else self._matrix(grown)[-self._variants.new_tokens :].contiguous()

    def _whole(self, name: str, base: Tensor) -> Tensor:
        """fp32 [vocabulary, width] with the new rows."""
        new = self._new(name)
        return base.float() if new is None else torch.cat([base.float(), new.float()])

    def embedding(self) -> EmbeddingExtras | None:
        name, variants = self._embedding_name, self._variants
        new = self._new(name)
        whole, rows = variants.parameters.get(f"{name}.weight"), variants.tokens.get(name)
        module = variants.tables.get(name)
        if module is None:
            if whole is not None:
                return EmbeddingExtras(weight=self._matrix(whole))
            if rows is None:
                return None if new is None else EmbeddingExtras(new=new)
            ids, order = torch.tensor(variants.token_ids[name], device=self._device).sort()
            return EmbeddingExtras(new=new, trained=TrainedRows(ids, self._matrix(rows)[order]))
        a, b = self._tensors[module.a], self._tensors[module.b]  # [rank, vocabulary], [width, rank]
        # DoRA's norm is over the vocabulary, one for each column of the table.
        weight = partial(self._whole, name, self._embedding.weight)
        affine = self._affine(name, None, (a, b, module.scaling), lambda: weight().T)
        identity = torch.eye(module.rank, dtype=b.dtype)
        lora = self._low_rank(LoraModule(module.rank, module.scaling, "", ""), identity, b)
        return EmbeddingExtras(new=new, columns=a.T.contiguous().to(self._device), lora=lora, affine=affine)

    def head(self) -> HeadExtras | None:
        name, variants = self._head_name, self._variants
        whole, rows = variants.parameters.get(f"{name}.weight"), variants.tokens.get(name)
        module = variants.tables.get(name)
        pair = None if module is None else (self._tensors[module.a], self._tensors[module.b], module.scaling)
        affine = self._affine(name, self._head.bias, pair, lambda: self._whole(name, self._head.weight.dequantize()))
        new = self._new(name)
        lora = None if module is None or pair is None else self._low_rank(module, pair[0], pair[1])
        if all(part is None for part in (whole, rows, lora, affine, new)):
            return None
        return HeadExtras(
            new=None if new is None else _dense(new),
            weight=None if whole is None else _dense(self._matrix(whole)),
            trained_ids=None if rows is None else torch.tensor(variants.token_ids[name], device=self._device),
            trained=None if rows is None else _dense(self._matrix(rows)),
            lora=lora,
            affine=affine,
        )

    def _low_rank(self, module: LoraModule, a: Tensor, b: Tensor) -> LowRank:
        if a.dtype != b.dtype:
            a, b = a.float(), b.float()
        units = (as_units(a).to(self._device), as_units(b.T).to(self._device))
        return LowRank(*units, module.rank, module.scaling, DTYPE_CODES[a.dtype])


def _like(norm: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """The same norm with some other parameters, and without the hooks that a step may have on it."""
    other = copy.copy(norm)
    replaced = {
        name: nn.Parameter(parameters.get(name, old.data).to(old.dtype), requires_grad=False)
        for name, old in norm.named_parameters(recurse=False)
    }
    other._parameters, other._forward_hooks = dict(replaced), OrderedDict()
    return other


def _dense(matrix: Tensor) -> kernels.QuantizedWeight:
    out_features, in_features = matrix.shape
    return kernels.QuantizedWeight(kind="dense", data=matrix.contiguous(), shape=(out_features, in_features))


# --- using them -----------------------------------------------------------------------------------------


class ExtraUse(NamedTuple):
    """A run of a step's rows with one adapter's extras: tokens, or those of them whose logits are wanted."""

    start: int
    end: int
    extras: Extras
    weight: float


class _AffineDeltas:
    """The adapters' part of a step in which linears are scaled or shifted: rank rows first, then that."""

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


class StepExtras:
    """The extras of one step.

    Args:
        tokens: runs of the step's tokens, in order of application.
        kept: the same adapters' runs of the rows that the head sees.
    """

    def __init__(self, tokens: Sequence[ExtraUse], kept: Sequence[ExtraUse]) -> None:
        self.tokens = tokens
        self.kept = kept

    @property
    def in_decoder(self) -> bool:
        """Whether anything between embedding and head is changed."""
        return any(use.extras.in_decoder for use in self.tokens)

    def over(self, inner: Deltas | None) -> Deltas | None:
        """What the linears are to add: `inner` and these."""
        uses = [use for use in self.tokens if use.extras.linears]
        return _AffineDeltas(inner, uses) if uses else inner

    @contextmanager
    def installed(self, model: Any) -> Iterator[None]:
        """Embedding, norms and head of `model` give what these adapters make of them."""
        with ExitStack() as stack:

            def hook(module: nn.Module, function: Any) -> None:
                stack.callback(module.register_forward_hook(function).remove)

            embedded = [use for use in self.tokens if use.extras.embedding]
            if embedded:
                embedding = model.get_input_embeddings()
                asked = _Asked(len(embedding.weight))
                if any(use.extras.new_tokens for use in embedded):
                    stack.callback(embedding.register_forward_pre_hook(asked).remove)
                hook(embedding, _embedding_hook(embedded, asked))
            headed = [use for use in self.kept if use.extras.head]
            if headed:
                hook(model.get_output_embeddings(), _head_hook(headed))
            for name in {name for use in self.tokens for name in use.extras.norms}:
                hook(model.get_submodule(name), _norm_hook([u for u in self.tokens if name in u.extras.norms], name))
            yield


class _Asked:
    """A hook before an embedding: it is asked for tokens that it has, and who comes after it knows which were meant."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.ids: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.ids = args[0]
        return (args[0].clamp(max=self.vocabulary - 1), *args[1:])


def _embedding_hook(uses: Sequence[ExtraUse], asked: _Asked) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        ids = (args[0] if asked.ids is None else asked.ids).view(-1)
        rows = output.view(-1, output.shape[-1])
        scale = float(getattr(module, "embed_scale", 1.0))
        for start, end, extras, weight in uses:
            assert extras.embedding is not None
            extras.embedding.apply_(rows[start:end], ids[start:end], weight, scale, asked.vocabulary)

    return hook


def _head_hook(uses: Sequence[ExtraUse]) -> Any:
    new = uses[0].extras.new_tokens  # a pass has one vocabulary

    def hook(module: FrozenLinear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = nn.functional.pad(output, (0, new)) if new else output
        x, logits = args[0].reshape(-1, args[0].shape[-1]), output.view(-1, output.shape[-1])
        for start, end, extras, weight in uses:
            assert extras.head is not None
            extras.head.apply_(logits[start:end], x[start:end], weight, module.bias)
        return output

    return hook


def _norm_hook(uses: Sequence[ExtraUse], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        for start, end, extras, _ in uses:  # [1, tokens, ...]
            output[:, start:end] = extras.norms[name](args[0][:, start:end])

    return hook
