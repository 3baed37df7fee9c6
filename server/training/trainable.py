"""An adapter being trained: fp32 parameters, their gradients, and its part in a training pass.

All of a job's parameters are in one flat tensor and all gradients in another, so that clipping, optimiser, checkpoint
and restore are a few operations on flat memory; A and B are views.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapters.device.experts import ExpertLinear
from adapters.device.lora import LoraLinear, RoutedTokens
from adapters.peft_format.modules import peft_module_of
from adapters.peft_format.sizes import ExpertsSize, LinearSize
from server.messages.training import Init, ModuleShape


def stream(device: torch.device, *key: object) -> torch.Generator:
    """Return a random generator seeded by `key` alone, independent of all other draws."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest) >> 1)


@dataclass(frozen=True, eq=False)
class _Module:
    """The trained part of one linear: y += scaling * scale_vector * (B (A x)), and its derivative.

    On a GPU activations are bf16: the fp32 parameters are rounded for the products, and updated in full.
    """

    a: nn.Parameter  # [rank, in]
    b: nn.Parameter  # [out, rank]
    scale_vector: nn.Parameter | None  # [out]
    scaling: float
    first: int  # index of its first output in the linear

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Add to y [rows, all outputs] in place; return A x [rows, rank], which `backward` needs."""
        down = x @ self.a.to(x.dtype).T
        b = self.b.to(x.dtype)
        y = self._own(y)
        if self.scale_vector is None:
            y.addmm_(down, b.T, alpha=self.scaling)
        else:
            y.addcmul_(down @ b.T, (self.scaling * self.scale_vector).to(x.dtype))
        return down

    def _own(self, y: Tensor) -> Tensor:
        return y[:, self.first : self.first + len(self.b)]

    def folded(self) -> Tensor:
        """Return B with the scale vector multiplied in, detached."""
        return (self.b if self.scale_vector is None else self.scale_vector[:, None] * self.b).detach()

    def backward(self, x: Tensor, down: Tensor, dy: Tensor) -> Tensor:
        """Return dx [rows, in] for dy [rows, all outputs], and accumulate the parameters' gradients."""
        dy = self._own(dy)
        if self.scale_vector is not None:
            _accumulate(self.scale_vector, ((down @ self.b.to(x.dtype).T) * dy).sum(0), self.scaling)
            dy = dy * self.scale_vector.to(dy.dtype)
        up = (dy @ self.b.to(dy.dtype)).mul_(self.scaling)  # [rows, rank]
        _accumulate_product(self.b, dy.T, down, self.scaling)
        _accumulate_product(self.a, up.T, x, 1.0)
        return up @ self.a.to(up.dtype)


def _accumulate(parameter: nn.Parameter, gradient: Tensor, factor: float) -> None:
    assert parameter.grad is not None
    parameter.grad.add_(gradient, alpha=factor)


def _accumulate_product(parameter: nn.Parameter, left: Tensor, right: Tensor, factor: float) -> None:
    if left.dtype == parameter.dtype:
        assert parameter.grad is not None
        parameter.grad.addmm_(left, right, alpha=factor)
    else:
        _accumulate(parameter, left @ right, factor)


def parameters(
    sizes: Mapping[str, LinearSize | ExpertsSize], shapes: Mapping[str, ModuleShape], scale_vector: bool
) -> tuple[int, int]:
    """Return the number of parameters in A and B, and in scale vectors."""
    here = {name: shape for name, shape in shapes.items() if shape.of(name) in sizes}
    adapted = [(shape.size(name, sizes), shape.rank) for name, shape in here.items()]
    matrices = sum(size.pairs * rank * (size.in_features + size.out_features) for size, rank in adapted)
    return matrices, sum(size.pairs * size.out_features for size, _ in adapted) if scale_vector else 0


class _AdaptedModule(NamedTuple):
    """The trained part under one name of `shapes`: a pair of A and B, or one for each expert."""

    name: str
    place: str  # module name in the adapter's file; with a * where each expert has a name of its own
    pairs: list[_Module]


class TrainableAdapter:
    """LoRA parameters over some linears of a base, with a pair of A and B for each expert.

    Args:
        linears: every linear of the base, experts' included.
        shapes: by full name of each linear to adapt, or of experts' own.
        scale_vector: train a factor per output as well, initially 1.
        seed: of A; B starts at zero.

    Attributes:
        values, grads: fp32 [parameters], trained parameters and their accumulated gradient; scale vectors come last.
        decayed: number of leading parameters with weight decay (not the scale vectors, which belong near 1).
    """

    def __init__(
        self,
        linears: Iterable[LoraLinear | ExpertLinear],
        shapes: Mapping[str, ModuleShape],
        *,
        device: torch.device,
        seed: int,
        init: Init = "kaiming",
        scale_vector: bool = False,
    ) -> None:
        named: dict[str, list[str]] = {}  # linear -> names in `shapes`
        for name, shape in shapes.items():
            named.setdefault(shape.of(name), []).append(name)
        adapted = [linear for linear in linears if linear.name in named]
        sizes = {linear.name: linear.size for linear in adapted}
        matrices, vectors = parameters(sizes, shapes, scale_vector)
        self.decayed = matrices
        self.values = torch.zeros(matrices + vectors, device=device)
        self.grads = torch.zeros_like(self.values)
        whole = [linear.name for linear in adapted if isinstance(linear, ExpertLinear) and linear.name in shapes]
        self._experts = {linear.index for linear in adapted if isinstance(linear, ExpertLinear)}
        self._adapted: dict[int, list[_AdaptedModule]] = {linear.index: [] for linear in adapted}
        first, first_vector = 0, matrices
        for index, name in [(linear.index, name) for linear in adapted for name in named[linear.name]]:
            shape, size = shapes[name], shapes[name].size(name, sizes)
            rank, inputs, outputs = shape.rank, size.in_features, size.out_features
            generator = stream(device, seed, "init", name)
            pairs: list[_Module] = []
            self._adapted[index].append(
                _AdaptedModule(name, peft_module_of(name, whole) if name in whole else name, pairs)
            )
            for _ in range(size.pairs):
                a = self._parameter(first, rank, inputs)
                b = self._parameter(first + a.numel(), outputs, rank)
                first += a.numel() + b.numel()
                vector = None
                if scale_vector:
                    vector = self._parameter(first_vector, outputs)
                    first_vector += outputs
                pairs.append(_Module(a, b, vector, shape.scaling, shape.part * outputs))
                with torch.no_grad():
                    if init == "gaussian":
                        a.normal_(0.0, 1.0 / rank, generator=generator)
                    else:  # PEFT's default: Kaiming uniform with a = sqrt(5), that is 1 / sqrt(in)
                        bound = 1.0 / math.sqrt(inputs)
                        a.uniform_(-bound, bound, generator=generator)
        self.values[matrices:].fill_(1.0)

    def _parameter(self, first: int, *shape: int) -> nn.Parameter:
        """Return a view of the flat tensors as a leaf, with its gradient accumulated in place."""
        part = slice(first, first + math.prod(shape))
        parameter = nn.Parameter(self.values[part].view(shape))
        parameter.grad = self.grads[part].view(shape)
        return parameter

    @property
    def linears(self) -> set[int]:
        """The indices of the adapted linears."""
        return set(self._adapted)

    def __contains__(self, linear_index: int) -> bool:
        return linear_index in self._adapted

    def tensors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the adapter in PEFT's form, detached: module -> (A [rank, in], B [out, rank]), scale vector folded in.

        A layer's experts are one pair, A ordered by expert and B by rank, or a pair for each expert's own module.
        """
        found = {}
        for index, modules in self._adapted.items():
            for _, place, pairs in modules:
                a, b = [pair.a.detach() for pair in pairs], [pair.folded() for pair in pairs]
                if index not in self._experts:
                    found[place] = a[0], b[0]
                elif "*" in place:
                    found |= {place.replace("*", str(n)): pair for n, pair in enumerate(zip(a, b, strict=True))}
                else:
                    found[place] = torch.cat(a), torch.stack(b, dim=-1).flatten(1)
        return found

    def load(self, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Continue from an adapter of the same linears and ranks (a scale vector starts at 1 again).

        Args:
            tensors: by the names of `shapes`; those of experts with A ordered by expert and B by rank.
        """
        with torch.no_grad():
            for name, _, pairs in (module for modules in self._adapted.values() for module in modules):
                a, b = tensors[name]
                ranks = b.view(len(b), -1, len(pairs))  # [out, rank, experts]
                for expert, (pair, of_expert) in enumerate(zip(pairs, a.chunk(len(pairs)), strict=True)):
                    pair.a.copy_(of_expert)
                    pair.b.copy_(ranks[..., expert])

    def modules(self, linear_index: int, expert: int = 0) -> list[_Module]:
        """Return the trained parts of one linear."""
        return [module.pairs[expert] for module in self._adapted[linear_index]]


@dataclass(frozen=True)
class Dropout:
    """Dropout of LoRA inputs, seeded by the job, step and micro-batch: recomputing drops the same elements."""

    probability: float
    key: tuple[object, ...]

    def mask(self, linear_index: int, x: Tensor) -> Tensor:
        """Return 0 or 1 / (1 - p) for each element of `x`."""
        keep = 1.0 - self.probability
        mask = torch.empty_like(x, requires_grad=False)
        return mask.bernoulli_(keep, generator=stream(x.device, *self.key, linear_index)).div_(keep)


class TrainingSegment(NamedTuple):
    """Consecutive tokens of a pass that belong to one job."""

    start: int
    end: int
    adapter: TrainableAdapter
    dropout: Dropout | None


class _Part(NamedTuple):
    """Consecutive rows of a linear's input, and the module trained on them."""

    start: int
    end: int
    module: _Module
    dropout: Dropout | None


class TrainingDeltas:
    """`adapters.device.lora.Deltas` of a training pass: segments do not overlap."""

    def __init__(self, segments: Sequence[TrainingSegment]) -> None:
        self._segments = segments

    def add(self, linear: LoraLinear, x: Tensor, y: Tensor) -> Tensor:
        index = linear.index
        return _added(
            x,
            y,
            index,
            [
                _Part(start, end, module, dropout)
                for start, end, adapter, dropout in self._segments
                if index in adapter
                for module in adapter.modules(index)
            ],
        )


class TrainingExperts:
    """`adapters.device.lora.ExpertDeltas` of a training pass. Nothing is dropped: PEFT has no dropout there."""

    def __init__(self, segments: Sequence[TrainingSegment]) -> None:
        self._segments = segments

    def add(self, name: str, index: int, x: Tensor, y: Tensor, routed: RoutedTokens) -> Tensor:
        return _added(
            x,
            y,
            index,
            [
                _Part(first, last, module, None)
                for start, end, adapter, _ in self._segments
                if index in adapter
                for expert, first, last in routed.runs(start, end)
                for module in adapter.modules(index, expert)
            ],
        )


def _added(x: Tensor, y: Tensor, index: int, parts: Sequence[_Part]) -> Tensor:
    if not parts:
        return y
    # The anchor, a parameter, makes autograd call `backward` even if x needs no gradient.
    added: Tensor = _Deltas.apply(x, y, parts[0].module.a, index, parts)
    return added


class _Deltas(torch.autograd.Function):
    """`y + delta(x)` for all parts of one linear, in place: one graph node that saves only x and A x.

    Parameters' gradients are added directly to their `grad`; dropout masks are drawn again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, anchor: Tensor, index: int, parts: Sequence[_Part]) -> Tensor:
        ctx.mark_dirty(y)
        ctx.index, ctx.parts = index, parts
        downs = []
        for start, end, module, dropout in parts:
            rows = x[start:end]
            if dropout is not None:
                rows = rows * dropout.mask(index, rows)
            downs.append(module.add(rows, y[start:end]))
        ctx.save_for_backward(x, *downs)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dy = gradients[0]
        x, *downs = ctx.saved_tensors
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        for (start, end, module, dropout), down in zip(ctx.parts, downs, strict=True):
            rows = x[start:end]
            mask = None if dropout is None else dropout.mask(ctx.index, rows)
            below = module.backward(rows if mask is None else rows * mask, down, dy[start:end])
            if dx is not None:
                dx[start:end] += below if mask is None else below.mul_(mask)
        return dx, dy, None, None, None
