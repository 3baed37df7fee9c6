"""All decoder layers of a step in one native call, for models shaped like Llama.

A plan is built once from a loaded model: it holds the addresses of all inputs of a step (weights, norms, adapter pools,
KV caches) and calls the same C++ kernels that are also available singly, without Python in between.
"""

from collections.abc import Collection, Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_void_p, pointer
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adapters.kernels import native
from adapters.kernels.native import ExpertsStruct, WeightStruct, address
from adapters.kernels.reference import head_size
from adapters.kernels.weight import QuantizedWeight

ARCHITECTURES = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}  # of transformers, by class name
MIXTURES = {"MixtralModel", "Qwen3MoeModel"}  # the same, with experts in place of MLPs
SITES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


class PlannedLinear(Protocol):
    """A linear as plans read it; implemented by `adapters.device.lora.LoraLinear`."""

    weight: QuantizedWeight
    bias: Tensor | None
    index: int  # its row in the segment tables and index in the pools


class MixtureStruct(Structure):
    """`Mixture` of decoder.cpp."""

    _fields_ = [
        *((name, ExpertsStruct) for name in ("gate_up", "down")),
        *((name, c_int32) for name in ("experts", "chosen", "normalised")),
    ]


class LayerStruct(Structure):
    """`Layer` of decoder.cpp."""

    _fields_ = [
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("weights", WeightStruct * len(SITES)),
        ("a", c_void_p * len(SITES)),
        ("b", c_void_p * len(SITES)),
        ("linear", c_int32 * len(SITES)),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("mixture", POINTER(MixtureStruct)),
        ("window", c_int32),
    ]


class DecoderStruct(Structure):
    """`Decoder` of decoder.cpp."""

    _fields_ = [
        ("layers", POINTER(LayerStruct)),
        ("final_norm", c_void_p),
        ("count", c_int32),
        ("hidden", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("block_size", c_int32),
        ("kv_kind", c_int32),
        ("eps", c_float),
        ("scaling", c_float),
    ]


class StepStruct(Structure):
    """`Step` of decoder.cpp."""

    _fields_ = [
        ("hidden", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("seqs", c_void_p),
        ("block_tables", c_void_p),
        ("tables", c_void_p),
        ("scales", c_void_p),
        ("tokens", c_int32),
        ("rotary", c_int32),
        ("requests", c_int32),
        ("max_blocks", c_int32),
        ("segments", c_int32),
    ]


class DecoderPlan:
    """The decoder layers and the last norm of one model, ready to run. Made by `build`."""

    def __init__(self, kernels: native.Kernels, decoder: nn.Module, struct: DecoderStruct, alive: list[Any]) -> None:
        self._kernels = kernels
        self._decoder: Any = decoder
        self._angles = (torch.empty(0, 0), torch.empty(0, 0))
        self._struct = struct
        self._alive = alive  # the objects that the struct points at

    @classmethod
    def build(
        cls,
        decoder: nn.Module,
        pool_a: Sequence[Tensor],
        pool_b: Sequence[Tensor],
        k_caches: Sequence[Tensor],
        v_caches: Sequence[Tensor],
        windows: Sequence[int],
    ) -> "DecoderPlan | None":
        """Plan a decoder with `PlannedLinear`s.

        Args:
            decoder: the transformers model below its head.
            pool_a, pool_b: per linear the adapters' units, as in `lora_add_`; both empty for no adapters.
            k_caches, v_caches: per layer, as in `paged_attention`.
            windows: per layer, 0 for full attention.

        Returns:
            None if the native kernels are missing, the architecture is not in `ARCHITECTURES` or `MIXTURES`, or the
            kernels cannot read a tensor (on the CPU; fp32 except for weights and pools).
        """
        kernels = native.load()
        if kernels is None or not is_supported(decoder, ARCHITECTURES | MIXTURES):
            return None
        builder = _Builder(kernels, pool_a, pool_b)
        modules: Any = decoder
        try:
            parts = zip(modules.layers, k_caches, v_caches, windows, strict=True)
            layers = (LayerStruct * len(k_caches))(*(builder.layer(*part) for part in parts))
            final_norm = builder.fp32(modules.norm.weight)
        except _Unplannable:
            return None
        first = modules.layers[0]
        _, kv_heads, block_size, _ = k_caches[0].shape
        head_dim = head_size(k_caches[0])
        struct = DecoderStruct(
            layers,
            final_norm,
            len(layers),
            len(first.input_layernorm.weight),
            first.self_attn.q_proj.weight.shape[0] // head_dim,
            kv_heads,
            head_dim,
            block_size,
            native.KV_KINDS[k_caches[0].dtype],
            first.input_layernorm.variance_epsilon,
            first.self_attn.scaling,
        )
        return cls(kernels, decoder, struct, [*builder.alive, layers])

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
        """Compute normed hidden states from embedded tokens, and write the tokens' keys and values.

        Args:
            hidden: fp32 `[T, hidden]`, the embedded tokens; overwritten.
            positions: int64 `[T]`.
            slots: int64 `[T]`, as in `write_kv`.
            seqs, block_tables: as in `paged_attention`.
            table, scale: int32 `[L, S, 5]` and fp32 `[L, S]`, one segment table per linear; None without adapters.

        Returns:
            `[T, hidden]`, ready for the head.
        """
        hidden = hidden.contiguous()
        cos, sin = self._angles_until(block_tables.shape[1] * self._struct.block_size)
        positions = positions.contiguous()
        slots, seqs, block_tables = slots.contiguous(), seqs.contiguous(), block_tables.contiguous()
        if table is not None and scale is not None:
            table, scale = table.contiguous(), scale.contiguous()
        step = StepStruct(
            hidden.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            positions.data_ptr(),
            slots.data_ptr(),
            seqs.data_ptr(),
            block_tables.data_ptr(),
            address(table),
            address(scale),
            len(hidden),
            cos.shape[1],
            len(seqs),
            block_tables.shape[1],
            0 if table is None else table.shape[1],
        )
        self._kernels.decode(self._struct, step)
        return hidden

    def _angles_until(self, end: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of at least the positions below `end`, fp32 `[positions, rotary]`."""
        if end > len(self._angles[0]):
            positions = torch.arange(1 << (end - 1).bit_length())
            cos, sin = self._decoder.rotary_emb(torch.empty(0), positions[None])
            self._angles = cos[0].float().contiguous(), sin[0].float().contiguous()
        return self._angles


def is_supported(decoder: nn.Module, architectures: Collection[str] = frozenset(ARCHITECTURES)) -> bool:
    """Whether a decoder is of one of these architectures, with SwiGLU."""
    kind, config = type(decoder), getattr(decoder, "config", None)
    ours = kind.__module__.startswith("transformers.models.") and kind.__name__ in architectures
    return ours and getattr(config, "hidden_act", None) == "silu"


class _Unplannable(Exception):
    """A part of the model is not supported by the native step."""


class _Builder:
    """Collects addresses, and keeps their owners alive."""

    def __init__(self, kernels: native.Kernels, pool_a: Sequence[Tensor], pool_b: Sequence[Tensor]) -> None:
        self._kernels = kernels
        self._pools = (pool_a, pool_b)
        self.alive: list[Any] = []

    def fp32(self, tensor: Tensor) -> int:
        return self._address(tensor.detach(), torch.float32)

    def _address(self, tensor: Tensor, dtype: torch.dtype) -> int:
        if not tensor.is_cpu or tensor.dtype != dtype or not tensor.is_contiguous():
            raise _Unplannable
        self.alive.append(tensor)
        return tensor.data_ptr()

    def layer(self, layer: Any, k_cache: Tensor, v_cache: Tensor, window: int) -> LayerStruct:
        mixture = getattr(layer.mlp, "experts", None)
        # In a mixture's layer, the router is the only single linear besides attention's.
        linears = [layer.get_submodule(site) for site in SITES[: SITES.index("mlp.gate_proj") if mixture else None]]
        weights = [*map(self._weight, linears), *([self._router(layer.mlp.gate)] if mixture else [])]
        attention = layer.self_attn
        return LayerStruct(
            self.fp32(layer.input_layernorm.weight),
            self.fp32(layer.post_attention_layernorm.weight),
            self.fp32(attention.q_norm.weight) if hasattr(attention, "q_norm") else None,
            self.fp32(attention.k_norm.weight) if hasattr(attention, "k_norm") else None,
            (WeightStruct * len(SITES))(*weights),
            *(
                (c_void_p * len(SITES))(*(self._address(pool[linear.index], torch.int16) for linear in linears))
                if pool
                else (c_void_p * len(SITES))()
                for pool in self._pools
            ),
            (c_int32 * len(SITES))(*(linear.index for linear in linears)),
            self._address(k_cache, k_cache.dtype),
            self._address(v_cache, k_cache.dtype),
            pointer(self._mixture(mixture, layer.mlp.gate)) if mixture else None,
            window,
        )

    def _router(self, router: Any) -> WeightStruct:
        weight = QuantizedWeight("dense", router.weight.detach(), tuple(router.weight.shape))
        if not native.supports_weight(weight):
            raise _Unplannable
        self.alive.append(weight)
        return self._kernels.weight(weight)

    def _mixture(self, experts: Any, router: Any) -> MixtureStruct:
        weights = [experts.gate_up_proj.weights, experts.down_proj.weights]
        if not all(map(native.supports_weight, weights)):
            raise _Unplannable
        normalised = getattr(router, "norm_topk_prob", True)
        struct = MixtureStruct(*map(native.experts_struct, weights), router.num_experts, router.top_k, normalised)
        self.alive += [weights, struct]
        return struct

    def _weight(self, linear: PlannedLinear) -> WeightStruct:
        if not native.supports_weight(linear.weight):
            raise _Unplannable
        self.alive.append(linear.weight)
        struct = WeightStruct.from_buffer_copy(self._kernels.weight(linear.weight))
        struct.bias = None if linear.bias is None else self.fp32(linear.bias)
        return struct
