"""The paged KV cache, and the attention function that transformers' models call.

`register()` makes the function known under the name `ATTENTION`; a model loaded with that name asks its `StepSlot` how
the step's tokens attend. `PagedAttention` is the serving answer. Knows block tables, not who owns the blocks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from adapters import kernels
from adapters.device.lora import StepSlot
from adapters.device.memory import zeros

ATTENTION = "lorakeet"

# Keywords that models pass along and that change nothing here: the step already knows positions and has no mask.
_IGNORED = {
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "is_causal",
    "output_router_logits",
}


def register() -> None:
    """Make `ATTENTION` an attention implementation of transformers. Must precede `from_pretrained`."""
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
    """Keys and values of every layer in blocks. Block 0 is scratch for padding rows.

    k, v: one `[1 + num_blocks, Hkv, block_size, D]` tensor per layer.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        shape = (1 + num_blocks, kv_heads, block_size, head_dim)
        # Zeros: a fresh block read beyond its filled part must not hold NaN.
        self.k = [zeros(shape, dtype, device) for _ in range(layers)]
        self.v = [zeros(shape, dtype, device) for _ in range(layers)]

    @staticmethod
    def block_bytes(layers: int, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes over all layers."""
        return 2 * layers * kv_heads * head_dim * block_size * dtype.itemsize


class PagedAttention:
    """One serving step: write the new keys and values, then attend over each request's blocks.

    Args:
        slots: int64 [T], where each token's key goes (block * block_size + offset).
        seqs: int32 [R, 3], columns q_start, q_end, kv_len after this step.
        block_tables: int32 [R, max_blocks].
    """

    def __init__(self, cache: KVCache, slots: Tensor, seqs: Tensor, block_tables: Tensor) -> None:
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
        keys, values = self.cache.k[layer], self.cache.v[layer]
        # fp32 norms can upcast q and k: store in the cache's dtype, answer in the query's.
        kernels.write_kv(k.to(keys.dtype), v.to(values.dtype), keys, values, self.slots)
        out = kernels.paged_attention(
            q.to(keys.dtype), keys, values, self.seqs, self.block_tables, scaling, window, softcap, sinks
        )
        return out.to(q.dtype)
