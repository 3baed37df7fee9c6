"""Convolutions and linear attention with a state: C++ equal to torch, and bit-identical for any division into runs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from adapters import kernels
from adapters.kernels import native

TOKENS = 21
WHOLE = [[0, TOKENS, 0, 1]]
CUT = [[0, 1, 0, 2], [1, 1, 2, 3], [1, 9, 3, 1], [9, 11, 1, 1], [11, TOKENS, 1, 4], [TOKENS, TOKENS, 4, 1]]
IMPLEMENTATIONS: list[Callable[[], AbstractContextManager[None]]] = [nullcontext, native.switched_off]

Layer = Callable[[Tensor, Tensor], Tensor]  # states, runs -> outputs


def convolution(channels: int, dtype: torch.dtype, *, silu: bool, biased: bool) -> tuple[Layer, Tensor]:
    """A layer over fixed tokens, and states of which the first is empty."""
    torch.manual_seed(channels)
    x, taps = torch.randn(TOKENS, channels).to(dtype), torch.randn(4, channels).to(dtype)
    bias = torch.randn(channels).to(dtype) if biased else None
    return lambda states, runs: kernels.convolve(x, taps, bias, silu, states, runs), _states(3, channels)


def attention(heads: int, values: int, dtype: torch.dtype, *, delta: bool) -> tuple[Layer, Tensor]:
    """As `convolution`; two heads of 12 keys."""
    torch.manual_seed(heads)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    q, k, v = numbers(TOKENS, 24 + 24 + heads * values).split([24, 24, heads * values], -1)  # as in mixers
    q, k, v = q.view(TOKENS, 2, 12), k.view(TOKENS, 2, 12), v.view(TOKENS, heads, values)
    a, b, rates = numbers(TOKENS, heads), numbers(TOKENS, heads), (numbers(heads), numbers(heads))
    settings = {"gain": 1.5} if delta else {"limits": (0.1, 2.0)}

    def run(states: Tensor, runs: Tensor) -> Tensor:
        recurrence = kernels.Recurrence(q, k, v, a, b if delta else None, *rates, **settings)
        return kernels.recur(recurrence, states, runs)

    return run, _states(heads, 12, values)


def _states(*shape: int) -> Tensor:
    states = torch.full((5, *shape), torch.nan)  # no slot may be read before it was written
    states[0] = 0
    return states


LAYERS = {
    "convolution": lambda dtype=torch.float32: convolution(33, dtype, silu=False, biased=True),
    "wide convolution": lambda dtype=torch.float32: convolution(600, dtype, silu=True, biased=False),
    "delta rule": lambda dtype=torch.float32: attention(4, 40, dtype, delta=True),
    "Mamba-2": lambda dtype=torch.float32: attention(2, 16, dtype, delta=False),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_bit_depends_on_how_tokens_are_cut_into_runs(
    name: str, implementation: Callable[[], AbstractContextManager[None]]
) -> None:
    layer, states = LAYERS[name]()
    cut, empty = states.clone(), states.clone()
    with implementation():
        expected = layer(states, torch.tensor(WHOLE, dtype=torch.int32))
        assert torch.equal(layer(cut, torch.tensor(CUT, dtype=torch.int32)), expected)
    assert torch.equal(cut[1], states[1])
    assert torch.equal(cut[1], cut[4])
    assert torch.equal(cut[2], cut[3])
    assert torch.equal(cut[0], empty[0]), "the state before the first token is unchanged"
    assert expected.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_native_equals_torch(name: str) -> None:
    layer, states = LAYERS[name]()
    theirs = states.clone()
    runs = torch.tensor(CUT, dtype=torch.int32)
    ours = layer(states, runs)
    with native.switched_off():
        torch.testing.assert_close(ours, layer(theirs, runs), atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(states, theirs, atol=2e-5, rtol=1e-5)
