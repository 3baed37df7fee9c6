"""What each layer of a model keeps of a token: heads, their size, and whose keys and values it reads; or nothing.

Read off one step of the model itself: configs say it in too many ways.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapters.device.lora import StepSlot


class Irregular(ValueError):
    """The model's attention does not pass through the server's as a cache needs it; the message says how."""


@dataclass(frozen=True)
class LayerKV:
    """One layer's keys and values; of no heads where it does not attend."""

    kv_heads: int
    head_dim: int  # the wider one of keys and values
    window: int  # a token sees so many of the last keys; 0 for all
    source: int  # the layer that they belong to: itself, or an earlier one


def reaches(layers: Sequence[LayerKV]) -> list[int]:
    """Per layer the widest window of the layers that read the same keys; 0 for all."""
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
    model: nn.Module, slot: StepSlot, layers: int, device: torch.device, without: Collection[int] = ()
) -> list[LayerKV]:
    """Run two tokens through a model whose attention asks `slot`, and see what each layer keeps.

    Raises Irregular unless every layer attends exactly once; those of `without` need not.
    """
    recorder = _Recorder()
    slot.attention = recorder
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        model(input_ids=ids, position_ids=ids, use_cache=False)
    finally:
        slot.attention = None
    order = [layer for layer, *_ in recorder.calls]
    needed = set(range(layers)) - set(without)
    if not order or len(set(order)) != len(order) or not needed <= set(order) <= set(range(layers)):
        raise Irregular(
            f"a step of this {type(model).__name__} attends {len(order)} times through the server's cache, "
            f"{len(needed)} expected, once in each layer: its attention cannot be served"
        )
    found: dict[int, LayerKV] = {}
    owners: dict[tuple[int, int], int] = {}  # addresses of keys and values -> the layer that made them
    for layer, window, k, v in recorder.calls:
        source = owners.setdefault((k.data_ptr(), v.data_ptr()), layer)
        found[layer] = LayerKV(k.shape[1], max(k.shape[2], v.shape[2]), window, source)
    # One that keeps no keys must not make a group of its own.
    windows = [kept.window for kept in found.values()]
    reach = 0 if 0 in windows else max(windows)
    return [found.get(layer) or LayerKV(0, 0, reach, layer) for layer in range(layers)]
