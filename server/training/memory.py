"""Prediction of a job's memory: arithmetic over the base's shapes, and one measured number.

The measured number is the memory that autograd saves per token of a layer: families differ too much for a formula.
"""

from collections.abc import Sequence
from functools import cached_property

import psutil
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from adapters.device.experts import ExpertLinear
from adapters.device.lora import LoraLinear
from server.messages.training import MemoryMode, MemoryPlan, ModuleShape, PlanMemory
from server.model.base import Base
from server.training.layers import LayerCalls, LayeredModel, PackedAttention, PackedStates
from server.training.trainable import (
    TrainableAdapter,
    TrainingDeltas,
    TrainingExperts,
    TrainingSegment,
    parameters,
)

HEADROOM = 0.9  # share of available memory that a plan may use
KEEP_BELOW = 0.5  # share of available memory up to which mode "keep" is chosen
SAMPLE_TOKENS = 32
OPTIMIZER_BYTES = {"adamw": 8.0, "paged_adamw_32bit": 8.0, "paged_adamw_8bit": 2.0 + 8 / 256}  # per parameter


class MemoryModel:
    """Memory predictions for jobs on one base.

    Args:
        head_rows: rows of the head computed at once.
    """

    def __init__(self, base: Base, model: LayeredModel, head_rows: int) -> None:
        self._base = base
        self._model = model
        self._head_rows = head_rows

    def plan(self, request: PlanMemory) -> MemoryPlan:
        """Return a job's plan, with the memory `available` now."""
        sizes = {linear.name: linear.size for linear in self._base.trainable}
        numbers = sum(parameters(sizes, request.modules, request.scale_vector))
        optimizer = round(numbers * OPTIMIZER_BYTES[request.optimizer])
        activations = self._activations(request)
        plan = MemoryPlan(
            id=request.id,
            base=_bytes_of(self._base.model),
            adapter=4 * numbers,
            gradients=4 * numbers,
            optimizer=optimizer,
            checkpoint=8 * numbers + optimizer,
            activations=activations,
            available=self._available(),
            mode=None,
        )
        modes: list[tuple[MemoryMode, float]] = [("keep", KEEP_BELOW), ("recompute", HEADROOM)]
        mode = next((mode for mode, part in modes if plan.total(mode) <= part * plan.available), None)
        return replace(plan, mode=mode)

    def _activations(self, request: PlanMemory) -> dict[MemoryMode, int]:
        tokens, layers, width = request.tokens, len(self._model), self._base.dtype.itemsize
        hidden = self._sample.hidden.numel() // SAMPLE_TOKENS  # of all streams
        vocabulary = self._base.vocab_size
        adapted = {shape.of(name) for name, shape in request.modules.items()}
        experts = any(linear.name in adapted for linear in self._base.experts)
        per_layer = [self._layer_bytes[experts] * tokens for _ in range(layers)]
        for linear in self._base.linears:  # saved by the adapter itself: A x
            if shape := request.modules.get(linear.name):
                per_layer[self._model.layer_of[linear.index]] += shape.rank * tokens * width
        # Temporary memory: gradients passing through the widest part of a layer, or the logits of a chunk.
        widest = max(linear.out_features for linear in self._base.linears)
        decoded = 4 * max(linear.out_features * linear.in_features for linear in self._base.linears)
        passing = 4 * widest * tokens * width + decoded
        head = min(self._head_rows, tokens) * vocabulary * 4 * 3
        extra = max(passing, head) + 3 * hidden * tokens * width
        return {
            "recompute": layers * hidden * tokens * width + max(per_layer) + extra,
            "keep": sum(per_layer) + extra,
        }

    @cached_property
    def _sample(self) -> LayerCalls:
        return self._model.calls(*(torch.arange(SAMPLE_TOKENS, device=self._base.device),) * 2)

    @cached_property
    def _layer_bytes(self) -> tuple[int, int]:
        """Bytes saved by autograd per token of one layer: with adapters on every linear, and on the experts as well.

        The adapters' parameters are not counted. The largest of the layer types, with and without states or experts.
        """
        routed = {self._model.layer_of[linear.index] for linear in self._base.experts}
        firsts = {(layer in self._base.states, layer in routed): layer for layer in reversed(range(len(self._model)))}
        layers = firsts.values()
        alone = max(self._saved_bytes(layer, self._base.linears) for layer in layers)
        return alone, max(self._saved_bytes(layer, self._base.trainable) for layer in layers) if routed else alone

    def _saved_bytes(self, layer: int, linears: Sequence[LoraLinear | ExpertLinear]) -> int:
        device, calls = self._base.device, self._sample
        shapes = {linear.name: ModuleShape(1, 1.0) for linear in linears}
        adapter = TrainableAdapter(linears, shapes, device=device, seed=0)
        resident = [*self._base.model.parameters(), *self._base.model.buffers(), adapter.values]
        known = {tensor.untyped_storage().data_ptr() for tensor in resident}
        saved: dict[int, int] = {}  # storage -> bytes

        def record(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        slot = self._base.slot
        segments = [TrainingSegment(0, SAMPLE_TOKENS, adapter, None)]
        slot.deltas, slot.experts = TrainingDeltas(segments), TrainingExperts(segments)
        slot.attention, slot.states = PackedAttention([(0, SAMPLE_TOKENS)]), PackedStates([(0, SAMPLE_TOKENS)])
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
                # The graph stays alive until all storages are counted, so no address is reused meanwhile.
                out = self._model.run(layer, calls.hidden.requires_grad_(), calls)
        finally:
            slot.deltas = slot.experts = slot.attention = slot.states = None
        del out
        return sum(saved.values()) // SAMPLE_TOKENS

    def _available(self) -> int:
        if self._base.device.type == "cuda":
            return torch.cuda.mem_get_info(self._base.device)[0]
        return psutil.virtual_memory().available


def _bytes_of(model: nn.Module) -> int:
    """Return the bytes of a model's distinct storages."""
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())
