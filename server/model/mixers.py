"""Layers that mix tokens by a state of fixed size: gated DeltaNet, short convolutions, Mamba-2.

transformers computes these for whole sequences, padded to equal lengths. Here the `forward` of each kind is replaced
for packed tokens: the module's own projections and norms run on all tokens, and the `StepSlot` does the convolution
and the recurrence over sequences' states. Without a step, the module runs transformers' own `forward`.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from adapters.device.lora import States, StepSlot
from adapters.kernels import Recurrence
from server.model import UnservableModel
from server.model.states import LayerState


class _Mixer(nn.Module):
    """A mixin placed before a module's class."""

    step_slot: StepSlot
    taps: Tensor
    layer_idx: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.step_slot.states is None:
            return super().forward(hidden_states, *args, **kwargs)
        return self.mix(hidden_states[0], self.step_slot.states)[None]

    @abstractmethod
    def mix(self, x: Tensor, states: States) -> Tensor:
        """[T, hidden] -> [T, hidden]."""

    def memory(self) -> tuple[int, int, int] | None:
        """Return the shape of the linear attention's state, if any."""
        return None


class ShortConvolution(_Mixer):
    """The short convolution of LFM2."""

    def mix(self: Any, x: Tensor, states: States) -> Tensor:
        before, after, x = self.in_proj(x).chunk(3, -1)
        y: Tensor = self.out_proj(after * states.convolve(self.layer_idx, before * x, self.taps, self.conv.bias, False))
        return y


class GatedDeltaNet(_Mixer):
    """The gated DeltaNet of Qwen3.5."""

    gain = 1.0

    def mix(self: Any, x: Tensor, states: States) -> Tensor:
        mixed, gate, a, b = self.project_in(x)
        mixed = states.convolve(self.layer_idx, mixed, self.taps, None, True)
        q, k, v = mixed.split([self.key_dim, self.key_dim, self.value_dim], -1)
        q, k = (part.reshape(len(x), -1, self.head_k_dim) for part in (q, k))
        v = v.reshape(len(x), -1, self.head_v_dim)
        out = states.recur(self.layer_idx, Recurrence(q, k, v, a, b, self.A_log, self.dt_bias, self.gain))
        return self.project_out(out.reshape(-1, self.head_v_dim), gate.reshape(-1, self.head_v_dim), len(x))

    def project_in(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values in one tensor; the gate; a and b of `Recurrence`."""
        return self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_a(x), self.in_proj_b(x)

    def project_out(self: Any, out: Tensor, gate: Tensor, tokens: int) -> Tensor:
        y: Tensor = self.out_proj(self.norm(out, gate).view(tokens, -1))
        return y

    def memory(self: Any) -> tuple[int, int, int]:
        return self.num_v_heads, self.head_k_dim, self.head_v_dim


class Qwen3NextDeltaNet(GatedDeltaNet):
    """The gated DeltaNet of Qwen3-Next, with projections interleaved by key head."""

    def project_in(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        projections = self.in_proj_qkvz(x)[None], self.in_proj_ba(x)[None]
        *qkv, z, b, a = (part[0].flatten(1) for part in self.fix_query_key_value_ordering(*projections))
        return torch.cat(qkv, -1), z, a, b


class OlmoDeltaNet(GatedDeltaNet):
    """The gated DeltaNet of OLMo Hybrid, which may allow negative eigenvalues of the state's transition."""

    @property
    def gain(self: Any) -> float:  # type: ignore[override]
        return 2.0 if self.allow_neg_eigval else 1.0

    def project_in(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1),
            self.g_proj(x),
            self.a_proj(x),
            self.b_proj(x),
        )

    def project_out(self: Any, out: Tensor, gate: Tensor, tokens: int) -> Tensor:
        y: Tensor = self.o_proj(self.o_norm(out, gate).view(tokens, -1))
        return y


class Mamba2(_Mixer):
    """The Mamba-2 layer of Granite 4, Bamba, Nemotron-H and Zamba2."""

    def mix(self: Any, x: Tensor, states: States) -> Tensor:
        gate, mixed, dt = self.project_in(x).split([self.intermediate_size, self.conv_dim, self.num_heads], -1)
        mixed = states.convolve(self.layer_idx, mixed, self.taps, self.conv1d.bias, True)
        v, k, q = mixed.split([self.intermediate_size, *[self.n_groups * self.ssm_state_size] * 2], -1)
        v = v.reshape(len(x), self.num_heads, self.head_dim)
        k, q = (part.reshape(len(x), self.n_groups, self.ssm_state_size) for part in (k, q))
        limits = tuple(self.time_step_limit)
        out = states.recur(self.layer_idx, Recurrence(q, k, v, dt, None, self.A_log, self.dt_bias, limits=limits))
        out = (out + self.D[:, None] * v).flatten(1)
        y: Tensor = self.out_proj(self.gated_norm(out, gate.contiguous()).to(x.dtype))
        return y

    def project_in(self: Any, x: Tensor) -> Tensor:
        """Return, in one tensor: the gate, values, keys, queries, and step sizes."""
        y: Tensor = self.in_proj(x)
        return y

    def gated_norm(self: Any, out: Tensor, gate: Tensor) -> Tensor:
        y: Tensor = self.norm(out[None], gate[None])[0]
        return y

    def memory(self: Any) -> tuple[int, int, int]:
        return self.num_heads, self.ssm_state_size, self.head_dim


class FalconMamba2(Mamba2):
    """The Mamba-2 layer of Falcon-H1, with multipliers and an optional norm."""

    def project_in(self: Any, x: Tensor) -> Tensor:
        y: Tensor = self.in_proj(x * self.ssm_in_multiplier) * self.mup_vector[0, 0]
        return y

    def gated_norm(self: Any, out: Tensor, gate: Tensor) -> Tensor:
        return super().gated_norm(out, gate) if self.mamba_rms_norm else out * nn.functional.silu(gate)


KINDS: dict[str, type[_Mixer]] = {  # by transformers' classes
    "BambaMixer": Mamba2,
    "FalconH1Mixer": FalconMamba2,
    "GraniteMoeHybridMambaLayer": Mamba2,
    "Lfm2MoeShortConv": ShortConvolution,
    "Lfm2ShortConv": ShortConvolution,
    "Lfm3ShortConv": ShortConvolution,
    "NemotronHMamba2Mixer": Mamba2,
    "OlmoHybridGatedDeltaNet": OlmoDeltaNet,
    "Qwen3NextGatedDeltaNet": Qwen3NextDeltaNet,
    "Qwen3_5GatedDeltaNet": GatedDeltaNet,
    "Qwen3_5MoeGatedDeltaNet": GatedDeltaNet,
}
TYPES = {  # text model types tested against transformers
    *("bamba", "falcon_h1", "granitemoehybrid", "lfm2", "lfm2_moe", "lfm3", "nemotron_h", "olmo_hybrid"),
    *("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
}


def attach(model: nn.Module, slot: StepSlot) -> dict[int, LayerState]:
    """Replace every such layer's class in a loaded model. Returns their states, by layer. Raises UnservableModel."""
    found: dict[int, LayerState] = {}
    for module in list(model.modules()):
        stock = type(module)
        kind = KINDS.get(stock.__name__)
        if kind is None:
            continue
        convolution = next(child for child in module.children() if isinstance(child, nn.Conv1d))
        if getattr(module, "activation", "silu") not in {"silu", "swish"}:
            raise UnservableModel(f"{stock.__name__} is not served with the activation {module.activation}")
        # The class is replaced, not the method, so that a copy of the module with other weights uses these.
        module.__class__ = type(stock.__name__, (kind, stock), {"__module__": stock.__module__})
        assert isinstance(module, _Mixer)
        module.step_slot = slot
        module.taps = convolution.weight.detach()[:, 0].T.contiguous()
        found[module.layer_idx] = LayerState((convolution.kernel_size[0] - 1, convolution.in_channels), module.memory())
    return found
