"""All decoder layers of a step as a plain sequence of kernels, for models shaped like Llama.

The counterpart of `plan.DecoderPlan` on a GPU: same models, same arguments. The launches of a step depend only on
tensor shapes, so a CUDA graph may hold them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapters.kernels.plan import PlannedLinear, is_supported
from adapters.kernels.reference import head_size
from adapters.kernels.triton import functions as kernels


@dataclass(frozen=True)
class _Layer:
    """One layer's modules and caches."""

    attention: Any
    mlp: Any
    input_norm: Any
    post_norm: Any
    k_cache: Tensor  # [blocks, Hkv, block_size, D]
    v_cache: Tensor
    window: int


class TritonDecoder:
    """The decoder layers and the last norm of one model, ready to run. Made by `build`."""

    def __init__(self, decoder: nn.Module, layers: list[_Layer], pools: tuple[Sequence[Tensor], ...]) -> None:
        self._decoder: Any = decoder
        self._layers = layers
        self._pools = pools

    @classmethod
    def build(
        cls,
        decoder: nn.Module,
        pool_a: Sequence[Tensor],
        pool_b: Sequence[Tensor],
        k_caches: Sequence[Tensor],
        v_caches: Sequence[Tensor],
        windows: Sequence[int],
    ) -> "TritonDecoder | None":
        """See `plan.DecoderPlan.build`; None for architectures that are not shaped like Llama."""
        if not is_supported(decoder):
            return None
        modules: Any = decoder
        layers = [
            _Layer(layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm, k, v, window)
            for layer, k, v, window in zip(modules.layers, k_caches, v_caches, windows, strict=True)
        ]
        return cls(decoder, layers, (pool_a, pool_b)) if all(map(_has_consecutive_indices, layers)) else None

    @torch.no_grad()
    def run(
        self,
        hidden: Tensor,
        positions: Tensor,
        slots: Tensor,
        seqs: Tensor,
        block_tables: Tensor,
        table: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """See `plan.DecoderPlan.run`."""
        hidden = hidden.contiguous()
        cos, sin = (part[0] for part in self._decoder.rotary_emb(hidden[None], positions[None]))  # [T, rotary]

        def linears(x: Tensor, *modules: PlannedLinear) -> list[Tensor]:
            """Return the outputs of linears with one input and consecutive indices, adapters included."""
            ys = [kernels.linear_forward(x, module.weight, module.bias) for module in modules]
            if table is not None and scale is not None:
                first, end = modules[0].index, modules[-1].index + 1
                pool_a, pool_b = (pool[first:end] for pool in self._pools)
                kernels.lora_add_several_(ys, x, pool_a, pool_b, table[first:end], scale[first:end])
            return ys

        first_norm = self._layers[0].input_norm
        x = kernels.rms_norm(hidden, first_norm.weight, first_norm.variance_epsilon)
        following = [layer.input_norm for layer in self._layers[1:]] + [self._decoder.norm]
        for layer, next_norm in zip(self._layers, following, strict=True):
            attention, mlp, norm = layer.attention, layer.mlp, layer.post_norm
            head_dim = head_size(layer.k_cache)
            projected = linears(x, attention.q_proj, attention.k_proj, attention.v_proj)
            q, k, v = (y.view(len(x), -1, head_dim) for y in projected)
            if hasattr(attention, "q_norm"):
                q = kernels.rms_norm(q, attention.q_norm.weight, attention.q_norm.variance_epsilon)
                k = kernels.rms_norm(k, attention.k_norm.weight, attention.k_norm.variance_epsilon)
            kernels.rope_(q, k, cos, sin)
            kernels.write_kv(k, v, layer.k_cache, layer.v_cache, slots)
            mixed = kernels.paged_attention(
                q, layer.k_cache, layer.v_cache, seqs, block_tables, attention.scaling, layer.window
            )
            (delta,) = linears(mixed.flatten(1), attention.o_proj)
            x = kernels.add_rms_norm_(hidden, delta, norm.weight, norm.variance_epsilon)
            gated = kernels.silu_mul(*linears(x, mlp.gate_proj, mlp.up_proj))
            (delta,) = linears(gated, mlp.down_proj)
            x = kernels.add_rms_norm_(hidden, delta, next_norm.weight, next_norm.variance_epsilon)
        return x


def _has_consecutive_indices(layer: _Layer) -> bool:
    """Whether linears of one input have consecutive indices, as the modules of these models do."""
    attention, mlp = layer.attention, layer.mlp
    q, k, v = (projection.index for projection in (attention.q_proj, attention.k_proj, attention.v_proj))
    return (q + 1, k + 1, mlp.gate_proj.index + 1) == (k, v, mlp.up_proj.index)
