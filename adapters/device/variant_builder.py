"""Building an adapter's `Extras` from its tensors and the base: DoRA, biases, norms, tables and new tokens."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adapters import kernels
from adapters.device.host import DTYPE_CODES, as_units
from adapters.device.lora import LoraLinear
from adapters.device.variants import (
    Affine,
    Classifier,
    EmbeddingExtras,
    Extras,
    HeadExtras,
    LowRank,
    TrainedRows,
)
from adapters.device.whole_modules import copy_module
from adapters.peft_format.modules import LoraModule, Variants


def build(
    variants: Variants,
    tensors: Mapping[str, Tensor],
    pairs: Mapping[str, tuple[Tensor, Tensor, float]],
    linears: Mapping[str, LoraLinear],
    model: nn.Module,
) -> Extras | None:
    """Return an adapter's extras, in host memory, or None if it has none.

    Args:
        variants: of its spec.
        tensors: as read by `adapters.peft_format.directory.load_variants`.
        pairs: linear -> (A [rank, in], B [out, rank], scaling).
        linears: the base's, by full name.
        model: the base, as transformers' model; computations with its weights run on its device.
    """
    builder = _Builder(variants, tensors, pairs, linears, model)
    extras = Extras(
        linears={name: affine for name in linears if (affine := builder.linear(name)) is not None},
        modules=builder.modules(),
        embedding=builder.embedding(),
        head=None if variants.classifier else builder.head(),
        new_tokens=variants.new_tokens,
        classifier=builder.classifier() if variants.classifier else None,
        experts=builder.experts(),
    )
    return extras.to(torch.device("cpu")) if extras.in_model or extras.classifier else None


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
        """Return a matrix on the device: fp16 as fp32, other dtypes as in the file, since kernels read them."""
        matrix = self._tensors[name]
        return (matrix.float() if matrix.dtype == torch.float16 else matrix).to(self._device)

    def linear(self, name: str) -> Affine | None:
        linear = self._linears[name]
        pair = self._pairs.get(name)
        return self._affine(name, linear.bias, pair, lambda: linear.weight.dequantize())

    def _affine(self, name: str, bias: Tensor | None, pair: Any, weight: Any) -> Affine | None:
        """Express `gain * (W x + s (B A x + b)) + bias'` as a gain and a shift of `W x + bias + s B A x`."""
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
        """Return DoRA's m / ||W + s B A||, the norm over each output's inputs."""
        magnitude = self._vector(self._variants.magnitudes.get(name))
        if magnitude is None:
            return None
        a, b, scaling = (part.float().to(self._device) if isinstance(part, Tensor) else part for part in pair)
        directed: Tensor = weight().addmm(b, a, alpha=scaling)
        return magnitude / torch.linalg.norm(directed, dim=1)

    def modules(self) -> dict[str, nn.Module]:
        changed: dict[str, dict[str, Tensor]] = {}
        for parameter, tensor in self._variants.parameters.items():
            module, _, kind = parameter.rpartition(".")
            if module not in self._linears and module not in (self._embedding_name, self._head_name):
                changed.setdefault(module, {})[kind] = self._tensors[tensor]
        for parameter, pair in self._variants.routers.items():
            module, _, kind = parameter.rpartition(".")
            a, b = (self._tensors[name].float().to(self._device) for name in pair.tensors)
            weight = getattr(self._model.get_submodule(module), kind).float()
            changed.setdefault(module, {})[kind] = weight.addmm(b, a, alpha=pair.scaling)
        return {name: copy_module(self._model.get_submodule(name), parameters) for name, parameters in changed.items()}

    def _new_rows(self, name: str) -> Tensor | None:
        """Return the rows of embedding or head beyond the base's vocabulary, if any."""
        grown = self._variants.grown.get(name)
        return None if grown is None else self._matrix(grown)[-self._variants.new_tokens :].contiguous()

    def _full_table(self, name: str, base: Tensor) -> Tensor:
        """Return a table of the base, or its bias, in the adapter's vocabulary; fp32."""
        if self._variants.new_tokens < 0:
            return base[: self._variants.new_tokens].float()
        new = self._new_rows(name)
        if new is None:  # the adapter replaces these rows, so zeros are enough
            new = base.new_zeros(self._variants.new_tokens, *base.shape[1:])
        return torch.cat([base.float(), new.float()])

    def embedding(self) -> EmbeddingExtras | None:
        name, variants = self._embedding_name, self._variants
        new = self._new_rows(name)
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
        # DoRA's norm is over the vocabulary, one per column of the table.
        weight = partial(self._full_table, name, self._embedding.weight)
        affine = self._affine(name, None, (a, b, module.scaling), lambda: weight().T)
        identity = torch.eye(module.rank, dtype=b.dtype)
        lora = self._low_rank(LoraModule(module.rank, module.scaling, "", ""), identity, b)
        return EmbeddingExtras(new=new, columns=a.T.contiguous().to(self._device), lora=lora, affine=affine)

    def head(self) -> HeadExtras | None:
        name, variants, bias = self._head_name, self._variants, self._head.bias
        bias = None if bias is None else self._full_table(f"{name}.bias", bias)
        whole, rows = variants.parameters.get(f"{name}.weight"), variants.tokens.get(name)
        module = variants.tables.get(name)
        pair = None if module is None else (self._tensors[module.a], self._tensors[module.b], module.scaling)
        affine = self._affine(name, bias, pair, lambda: self._full_table(name, self._head.weight.dequantize()))
        if rows is not None and bias is not None:
            affine = Affine(None, -bias)  # PEFT omits the bias if single tokens are trained
        new = self._new_rows(name)
        lora = None if module is None or pair is None else self._low_rank(module, pair[0], pair[1])
        if variants.new_tokens == 0 and all(part is None for part in (whole, rows, lora, affine)):
            return None
        return HeadExtras(
            new=None if new is None else _dense(new),
            weight=None if whole is None else _dense(self._matrix(whole)),
            trained_ids=None if rows is None else torch.tensor(variants.token_ids[name], device=self._device),
            trained=None if rows is None else _dense(self._matrix(rows)),
            lora=lora,
            affine=affine,
            bias=bias,
        )

    def classifier(self) -> Classifier:
        tensors = self._variants.classifier
        return Classifier(_dense(self._tensors[tensors["weight"]].float()), self._vector(tensors.get("bias")))

    def experts(self) -> dict[str, list[LowRank]]:
        found: dict[str, list[LowRank]] = {}
        for module in self._variants.experts.values():
            size, rank = self._model.get_submodule(module.parameter).size, module.rank
            tensors = [self._tensors[name] for name in module.tensors]
            if len(tensors) == 2:
                a, b = tensors[0], tensors[1].view(-1, rank, module.experts).transpose(1, 2).flatten(1)
            else:
                a = torch.cat(tensors[: module.experts])
                b = torch.cat(tensors[module.experts :], dim=1)  # [outputs of the part, experts * rank]
            whole = b.new_zeros(size.out_features, b.shape[1])
            whole[module.part * len(b) : (module.part + 1) * len(b)] = b
            pair = LoraModule(rank, module.scaling, module.a, module.b)
            found.setdefault(module.parameter, []).append(self._low_rank(pair, a, whole))
        return found

    def _low_rank(self, module: LoraModule, a: Tensor, b: Tensor) -> LowRank:
        if a.dtype != b.dtype:
            a, b = a.float(), b.float()
        units = (as_units(a).to(self._device), as_units(b.T).to(self._device))
        return LowRank(*units, module.rank, module.scaling, DTYPE_CODES[a.dtype])


def _dense(matrix: Tensor) -> kernels.QuantizedWeight:
    out_features, in_features = matrix.shape
    return kernels.QuantizedWeight(kind="dense", data=matrix.contiguous(), shape=(out_features, in_features))
