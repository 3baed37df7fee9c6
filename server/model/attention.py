"""The paged KV cache, and the attention function that transformers' models call.

`register()` registers the function under the name `ATTENTION`; a model loaded with that name takes the step's attention
from its `StepSlot`. In serving, that is a `PagedAttention`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from adapters import kernels
from adapters.device.lora import StepSlot
from adapters.device.memory import zeros
from server.model.geometry import LayerKV, key_windows

ATTENTION = "lorakeet"
KV_DTYPES = {  # by setting
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}

# Keywords that models pass and that have no effect here: the step has its own positions and no mask.
_IGNORED = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "is_causal",
    "output_router_logits",
    "logits_to_keep",
}


def register() -> None:
    """Register `ATTENTION` as an attention implementation of transformers. Must precede `from_pretrained`."""
    AttentionInterface.register(ATTENTION, _attention)


def attach(model: nn.Module, slot: StepSlot) -> None:
    """Give every attention layer of `model` the slot that holds the current step."""
    for module in model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "scaling"):
            module.step_slot = slot  # type: ignore[assignment]


def _attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, Hkv, T, D]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    unknown = [name for name, value in kwargs.items() if value is not None and name not in _IGNORED]
    if unknown or dropout:
        raise ValueError(f"{type(module).__name__} asks for attention features that are not served: {unknown}")
    slot: StepSlot = module.step_slot  # type: ignore[assignment]
    assert slot.attention is not None, "no step is installed"
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [T, heads, D]
    layer: int = module.layer_idx  # type: ignore[assignment]
    sinks = None if s_aux is None else s_aux.float()
    out = slot.attention.attend(layer, q, k, v, scaling, sliding_window or 0, softcap or 0.0, sinks)
    return out.unsqueeze(0), None


class KVCache:
    """Keys and values of every layer in blocks. Block 0 of each group is scratch for padding rows.

    Layers that need the same keys of a sequence form a group, with blocks of its own: the layers with full attention,
    and those of each window. Shapes are per layer; a layer that reads another's keys and values shares its tensors.

    Args:
        blocks: per group of `windows`.
        dtype: of the stored numbers, one of `KV_DTYPES`.
        compute: dtype in which attention computes.

    Attributes:
        windows: per group, the number of last keys that its layers see; 0, for all, comes first.
        k, v: per layer `[1 + blocks, Hkv, block_size, D]`.
    """

    def __init__(
        self,
        layers: Sequence[LayerKV],
        blocks: Sequence[int],
        block_size: int,
        dtype: torch.dtype,
        compute: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.dtype = dtype
        self.compute = compute
        self.windows = windows(layers)
        self.layers = layers
        self.group_of = [self.windows.index(reach) for reach in key_windows(layers)]
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []
        for index, layer in enumerate(layers):
            for tensors in (self.k, self.v):
                if layer.source < index or not layer.kv_heads:
                    tensors.append(tensors[layer.source] if layer.kv_heads else torch.empty(0))
                    continue
                shape = (1 + blocks[self.group_of[index]], layer.kv_heads, block_size, _row_bytes(layer, dtype))
                # Zeros, since kernels may read a block beyond its filled part, which must not hold NaN.
                tensors.append(zeros(shape, torch.int8, device).view(dtype))


def windows(layers: Sequence[LayerKV]) -> list[int]:
    """Return the windows of a cache's groups for these layers, ascending."""
    return sorted(set(key_windows(layers)))


def block_bytes(layers: Sequence[LayerKV], block_size: int, dtype: torch.dtype) -> list[int]:
    """Return the bytes of one block of each group, over all of its layers."""
    sizes = dict.fromkeys(windows(layers), 0)
    for index, (layer, reach) in enumerate(zip(layers, key_windows(layers), strict=True)):
        if layer.source == index:
            sizes[reach] += 2 * layer.kv_heads * block_size * _row_bytes(layer, dtype)
    return list(sizes.values())


def _row_bytes(layer: LayerKV, dtype: torch.dtype) -> int:
    return layer.head_dim * dtype.itemsize + (kernels.SCALE_BYTES if dtype == torch.int8 else 0)


class PagedAttention:
    """One serving step: write the new keys and values, then attend over each request's blocks.

    Args:
        slots: per group int64 [T], the place of each token's key (block * block_size + offset).
        seqs: int32 [R, 3], columns q_start, q_end, kv_len after this step.
        block_tables: per group int32 [R, max_blocks].
    """

    def __init__(self, cache: KVCache, slots: Sequence[Tensor], seqs: Tensor, block_tables: Sequence[Tensor]) -> None:
        self.cache = cache
        self.slots = slots
        self.seqs = seqs
        self.block_tables = block_tables

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scaling: float,
        window: int,
        softcap: float,
        sinks: Tensor | None,
    ) -> Tensor:
        cache, group = self.cache, self.cache.group_of[layer]
        keys, values = cache.k[layer], cache.v[layer]

        def fit(states: Tensor) -> Tensor:
            # Heads of keys and of values may differ in size: padding the narrower ones adds nothing to a score.
            missing = cache.layers[layer].head_dim - states.shape[2]
            return (nn.functional.pad(states, (0, missing)) if missing else states).to(cache.compute)

        # fp32 norms can upcast q and k: compute in one dtype, return the query's.
        if cache.layers[layer].source == layer:
            kernels.write_kv(fit(k), fit(v), keys, values, self.slots[group])
        out = kernels.paged_attention(
            fit(q),
            keys,
            values,
            self.seqs,
            self.block_tables[group],
            scaling,
            window,
            softcap,
            sinks,
        )
        return out[..., : v.shape[2]].to(q.dtype)
