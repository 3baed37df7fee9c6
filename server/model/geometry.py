"""The KV geometry of each layer: heads, their size, the window, and the source layer of its keys and values.

It is recorded from one step of the model, since configs describe it in too many ways.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapters.device.lora import Attention, StepSlot
from server.model import UnservableModel
from server.model.probe import TOKEN, TOKENS, NoStates


@dataclass(frozen=True)
class LayerKV:
    """One layer's keys and values; zero heads if it does not attend."""

    kv_heads: int
    head_dim: int  # the larger of the sizes of keys and values
    window: int  # number of last keys that a token sees; 0 for all
    source: int  # the layer that makes the keys and values: itself or an earlier one


def key_windows(layers: Sequence[LayerKV]) -> list[int]:
    """Return, per layer, the widest window of the layers that read the same keys; 0 for all."""
    windows = [[other.window for other in layers if other.source == layer.source] for layer in layers]
    return [0 if 0 in seen else max(seen) for seen in windows]


@dataclass
class _Recorder:
    """Attention that computes nothing and records its calls."""

    calls: list[tuple[int, int, Tensor, Tensor]] = field(default_factory=list)  # layer, window, keys, values

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int, *_: Any) -> Tensor:
        self.calls.append((layer, window, k, v))
        return q.new_zeros(*q.shape[:2], v.shape[2])


@torch.no_grad()
def probe(
    model: nn.Module, slot: StepSlot, layers: int, device: torch.device, exempt: Collection[int] = ()
) -> list[LayerKV]:
    """Run a few tokens through a model attached to `slot`, and return each layer's geometry.

    Raises UnservableModel unless every layer attends exactly once; layers of `exempt` need not.
    """
    recorder = _Recorder()
    slot.attention, slot.states = recorder, NoStates()
    try:
        ids = torch.full((1, TOKENS), TOKEN, device=device)
        model(input_ids=ids, position_ids=torch.zeros_like(ids), use_cache=False)
    finally:
        slot.attention = slot.states = None
    order = [layer for layer, *_ in recorder.calls]
    needed = set(range(layers)) - set(exempt)
    if not order or len(set(order)) != len(order) or not needed <= set(order) <= set(range(layers)):
        raise _irregular_attention(model, len(order), len(needed))
    found: dict[int, LayerKV] = {}
    owners: dict[tuple[int, int], int] = {}  # addresses of keys and values -> their layer
    for layer, window, k, v in recorder.calls:
        source = owners.setdefault((k.data_ptr(), v.data_ptr()), layer)
        found[layer] = LayerKV(k.shape[1], max(k.shape[2], v.shape[2]), window, source)
    # A layer without keys must not form a group of its own.
    windows = [kept.window for kept in found.values()]
    reach = 0 if 0 in windows else max(windows)
    return [found.get(layer) or LayerKV(0, 0, reach, layer) for layer in range(layers)]


class _CountingAttention:
    """Attention that counts its calls by layer."""

    def __init__(self, inner: Attention) -> None:
        self.inner = inner
        self.calls: Counter[int] = Counter()

    def attend(self, layer: int, *arguments: Any) -> Tensor:
        self.calls[layer] += 1
        return self.inner.attend(layer, *arguments)


@contextmanager
def checked_attention(decoder: nn.Module, slot: StepSlot, layers: Sequence[LayerKV]) -> Iterator[None]:
    """Raise UnservableModel if a step within the context attends otherwise than `probe` recorded.

    Comparing numbers is not enough: a layer that attends twice, or more often in larger steps, may still be right.
    """
    expected = {layer: 1 for layer, kept in enumerate(layers) if kept.kv_heads}

    def begin(*_: Any) -> None:
        assert slot.attention is not None
        slot.attention = _CountingAttention(slot.attention)

    def end(*_: Any) -> None:
        counted = slot.attention
        assert isinstance(counted, _CountingAttention)
        slot.attention = counted.inner
        if counted.calls != expected:
            raise _irregular_attention(decoder, counted.calls.total(), len(expected))

    with decoder.register_forward_pre_hook(begin), decoder.register_forward_hook(end):
        yield


def _irregular_attention(model: nn.Module, calls: int, expected: int) -> UnservableModel:
    return UnservableModel(
        f"a step of this {type(model).__name__} attends {calls} times through the server's cache, "
        f"{expected} expected, once in each layer: its attention cannot be served"
    )
