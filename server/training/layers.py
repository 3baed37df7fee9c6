"""A transformers decoder run one layer at a time, and the attention and states of a training pass.

A layer's arguments are captured rather than constructed: the decoder runs once with each layer's `forward` replaced by
a recorder that returns its input. The head runs through the model in the same way, so a family's operations after its
last layer (norms, scaling, soft caps) are included.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import KVSharingDict

from adapters import kernels
from server.model.base import Base

_SCANNED = 64  # chunk of Mamba2's scan, in tokens


class Untrainable(ValueError):
    """A base that serves, but cannot be trained layer by layer; the message gives the reason."""


class SharedStates(KVSharingDict):
    """Keys and values that layers pass to later layers, while layers are differentiated one by one.

    A layer reads them as inputs of its own; the gradients of all readers are summed for the layer that wrote them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = 0  # the running layer
        self._read: dict[int, list[tuple[str, tuple[Tensor, ...]]]] = defaultdict(list)  # by layer
        self._written: dict[int, list[tuple[str, tuple[Tensor, ...]]]] = defaultdict(list)
        self._gradients: dict[str, list[Tensor]] = {}

    def __setitem__(self, kind: str, states: tuple[Tensor, ...]) -> None:
        super().__setitem__(kind, tuple(state.detach() for state in states))
        if torch.is_grad_enabled():
            self._written[self.layer].append((kind, states))

    def __getitem__(self, kind: str) -> tuple[Tensor, ...]:
        states: tuple[Tensor, ...] = super().__getitem__(kind)
        if torch.is_grad_enabled():
            states = tuple(state.detach().requires_grad_() for state in states)
            self._read[self.layer].append((kind, states))
        return states

    def backward(self, layer: int, above: Tensor, gradient: Tensor | None) -> None:
        """Propagate the gradient of a layer's output to its inputs, shared states included."""
        roots, gradients = [above], [gradient]
        for kind, states in self._written.pop(layer, ()):
            for state, summed in zip(states, self._gradients.pop(kind, ()), strict=False):
                if state.requires_grad:
                    roots.append(state)
                    gradients.append(summed)
        torch.autograd.backward(roots, gradients)
        for kind, states in self._read.pop(layer, ()):
            own = [torch.zeros_like(state) if state.grad is None else state.grad for state in states]
            before = self._gradients.get(kind)
            self._gradients[kind] = own if before is None else [a + b for a, b in zip(before, own, strict=True)]


@dataclass(frozen=True)
class LayerCalls:
    """The inputs of the decoder's layers: the first layer's hidden [..., T, H], and each layer's other arguments."""

    hidden: Tensor
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    shared: SharedStates


class LayeredModel:
    """The base's decoder layers and head, callable one by one. The model is unchanged after every call.

    Raises Untrainable.
    """

    def __init__(self, base: Base) -> None:
        self._model = base.model
        self._decoder = base.decoder
        lists = [module for module in base.decoder.children() if isinstance(module, nn.ModuleList)]
        layers = next((layers for layers in lists if len(layers) == base.num_layers), None)
        if layers is None:
            raise Untrainable(f"{type(base.model).__name__} has no list of its {base.num_layers} layers")
        self.layers = layers
        if any("forward" in layer.__dict__ for layer in self.layers):
            raise Untrainable("a hook has replaced the layers' forward: the base must lie on one device")
        named = {module: name for name, module in base.model.named_modules()}
        prefixes = [f"{named[layer]}." for layer in self.layers]
        self.layer_of = {  # index of a linear, or of experts' -> its layer
            linear.index: next(number for number, prefix in enumerate(prefixes) if linear.name.startswith(prefix))
            for linear in base.trainable
            if linear.name.startswith(tuple(prefixes))
        }
        self._placeholders = _output_placeholders(base, self.layers[0])

    def __len__(self) -> int:
        return len(self.layers)

    @torch.no_grad()
    def calls(self, ids: Tensor, positions: Tensor) -> LayerCalls:
        """Embed packed tokens `[T]` and capture the layers' arguments. Raises Untrainable."""
        inputs: list[Tensor] = []
        arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            inputs.append(hidden)
            arguments.append((args, kwargs))
            return self._as_output(hidden)

        with self._replaced([record] * len(self.layers)):
            self._decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False)
        if any(hidden.shape != inputs[0].shape or hidden.shape[-2] != len(ids) for hidden in inputs):
            name = type(self._model).__name__
            raise Untrainable(
                f"the layers of {name} pass on streams within a token, or more than these: it is not trained"
            )
        shared = SharedStates()
        for _, keywords in arguments:
            if isinstance(keywords.get("shared_kv_states"), KVSharingDict):
                keywords["shared_kv_states"] = shared
        return LayerCalls(inputs[0], arguments, shared)

    def run(self, layer: int, hidden: Tensor, calls: LayerCalls) -> Tensor:
        """Run one layer: `[..., T, H] -> [..., T, H]`."""
        calls.shared.layer = layer
        args, kwargs = calls.arguments[layer]
        out: Tensor | tuple[Tensor, ...] = self.layers[layer](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _as_output(self, hidden: Tensor) -> Any:
        """Wrap an output in the form of the layers' return value."""
        return hidden if self._placeholders is None else (hidden, *self._placeholders)

    def logits(self, hidden: Tensor) -> Tensor:
        """Run the part after the last layer, the head included: `[..., n, H] -> [n, V]`; differentiable."""

        def same(hidden: Tensor, *_: Any, **__: Any) -> Any:
            return self._as_output(hidden)

        def give(*_: Any, **__: Any) -> Any:
            return self._as_output(hidden)

        nothing = torch.zeros(1, hidden.shape[-2], dtype=torch.long, device=hidden.device)
        with self._replaced([*[same] * (len(self.layers) - 1), give]):
            logits: Tensor = self._model(input_ids=nothing, position_ids=nothing, use_cache=False).logits
        return logits[0]

    @contextmanager
    def _replaced(self, forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
        """Replace every layer's `forward` within the context."""
        try:
            for layer, forward in zip(self.layers, forwards, strict=True):
                layer.__dict__["forward"] = forward  # shadows the class's method
            yield
        finally:
            for layer in self.layers:
                del layer.__dict__["forward"]


class PackedAttention:
    """`adapters.device.lora.Attention` of a training pass: causal within each sequence, none across sequences.

    Args:
        bounds: `(start, end)` of each packed sequence, covering all tokens.
    """

    def __init__(self, bounds: Sequence[tuple[int, int]]) -> None:
        self._bounds = bounds

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
        groups = q.shape[1] // k.shape[1]
        if groups > 1:  # expanded: with enable_gqa a CPU takes the path that stores all scores
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        parts = [_causal(q[i:j], k[i:j], v[i:j], scaling, window, softcap, sinks) for i, j in self._bounds]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class PackedStates:
    """`adapters.device.lora.States` of a training pass: each sequence begins with an empty state; differentiable.

    Args:
        bounds: as in `PackedAttention`.
    """

    def __init__(self, bounds: Sequence[tuple[int, int]]) -> None:
        self._bounds = bounds

    def convolve(self, layer: int, x: Tensor, taps: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        padding = (0, 0, len(taps) - 1, 0)
        return torch.cat([kernels.convolve_sequence(F.pad(x[i:j], padding), taps, bias, silu) for i, j in self._bounds])

    def recur(self, layer: int, r: kernels.Recurrence) -> Tensor:
        # Imported only for models that need them.
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

        rate = -r.a_log.float().exp()
        parts = []
        for i, j in self._bounds:
            q, k, v, a = (part[None, i:j] for part in (r.q, r.k, r.v, r.a))
            if r.b is None:
                settings = {"dt_bias": r.dt_bias, "dt_softplus": True, "dt_limit": r.limits}
                out = mamba2_chunk_scan(v, a, rate, k, q, _SCANNED, **settings)
            else:
                decay, beta = rate * F.softplus(a.float() + r.dt_bias), r.b[None, i:j].sigmoid() * r.gain
                out, _ = torch_chunk_gated_delta_rule(q, k, v, decay, beta, use_qk_l2norm_in_kernel=True)
            parts.append(out[0])
        return torch.cat(parts)


@torch.no_grad()
def _output_placeholders(base: Base, layer: nn.Module) -> list[None] | None:
    """Return placeholders for a layer's outputs after the first; None if it returns no tuple. Runs one token."""
    returned: list[Any] = []

    def capture(module: nn.Module, args: Any, output: Any) -> None:
        returned.append(output)

    token = torch.zeros(1, 1, dtype=torch.long, device=base.device)
    base.slot.attention, base.slot.states = PackedAttention([(0, 1)]), PackedStates([(0, 1)])
    try:
        with layer.register_forward_hook(capture):
            base.decoder(input_ids=token, position_ids=token, use_cache=False)
    finally:
        base.slot.attention = base.slot.states = None
    return [None] * (len(returned[0]) - 1) if isinstance(returned[0], tuple) else None


def _causal(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Causal self-attention of one sequence: q, k, v [n, H, D] -> [n, H, D]."""
    mask = None
    if 0 < window < len(q) or softcap or sinks is not None:
        position = torch.arange(len(q), device=q.device)
        distance = position[:, None] - position[None, :]
        mask = (distance >= 0) & (distance < (window or len(q)))
    q, k, v = (states.transpose(0, 1)[None] for states in (q, k, v))  # [1, H, n, D]
    if not softcap and sinks is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        return out[0].transpose(0, 1)
    assert mask is not None
    scores = (q @ k.transpose(-1, -2)).float() * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, len(mask), 1)], dim=-1)
    weights = scores.softmax(-1).to(v.dtype)[..., : len(mask)]
    return (weights @ v)[0].transpose(0, 1)
