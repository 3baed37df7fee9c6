"""Argmax by means of a sketch: equal to the argmax over all outputs, without reading most of the weight."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters import kernels as dispatched
from adapters.kernels import QuantizedWeight, native, reference
from tests.adapters.kernels.test_linear import make_weight

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def dense(data: Tensor) -> QuantizedWeight:
    return QuantizedWeight("dense", data, (data.shape[0], data.shape[1]))


def sketched(data: Tensor) -> QuantizedWeight:
    return dense(data).with_sketch()


def among_all(kernels: native.Kernels, x: Tensor, weight: QuantizedWeight) -> list[int]:
    return kernels.argmax(kernels.linear_forward(x, weight)).tolist()


def uneven(rows: int, in_features: int) -> Tensor:
    """Inputs with a few values far greater than the others, as in hidden states."""
    x = torch.randn(rows, in_features)
    return torch.where(torch.rand(rows, in_features) < 0.02, 30 * x, x) * torch.randint(-9, 9, (rows, 1)).float().exp2()


@given(dtype=DTYPES, out=st.integers(1, 400), wide=st.integers(1, 9), rows=st.integers(1, 20))
@settings(max_examples=60)
def test_it_is_the_likeliest_of_all(either: native.Kernels, dtype: torch.dtype, out: int, wide: int, rows: int) -> None:
    data = (torch.randn(out, 64 * wide) * torch.randint(-4, 4, (out, 1)).float().exp2()).to(dtype)
    x = uneven(rows, 64 * wide)
    assert either.output_argmax(x, sketched(data)).tolist() == among_all(either, x, dense(data))


@given(rows=st.integers(1, 9), data=st.data())
@settings(max_examples=40)
def test_outputs_that_hardly_differ(either: native.Kernels, rows: int, data: st.DataObject) -> None:
    """Rows of a weight that are equal or differ by one bit of one number, so that sums are equal or adjacent."""
    weight = torch.randn(1, 128).bfloat16().repeat(200, 1)
    for _ in range(data.draw(st.integers(0, 20))):
        o, i = data.draw(st.integers(0, 199)), data.draw(st.integers(0, 127))
        weight.view(torch.int16)[o, i] += data.draw(st.sampled_from([-1, 1]))
    x = uneven(rows, 128)
    assert either.output_argmax(x, sketched(weight)).tolist() == among_all(either, x, dense(weight))


def test_of_equals_the_first(either: native.Kernels) -> None:
    weight = torch.randn(3000, 64).bfloat16()
    weight[[7, 1500, 2999]] = 9.0
    x = torch.ones(1, 64)
    assert either.output_argmax(x, sketched(weight)).tolist() == [7]
    assert either.output_argmax(torch.zeros(2, 64), sketched(weight)).tolist() == [0, 0]


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-20, 1e15, 1e30, 3e38])
@pytest.mark.parametrize("weighing", [1e-40, 1.0, 1e5, 1e30])
def test_numbers_of_any_size(either: native.Kernels, size: float, weighing: float) -> None:
    """Where sums overflow, no token is returned, whether the greatest sum is finite or not."""
    weight = torch.rand(100, 128) * 2 - 1
    weight = weight / weight.abs().amax() * weighing
    x = torch.rand(2, 128) * 2 - 1
    x = x / x.abs().amax() * size
    x[1] /= 1000
    assert either.output_argmax(x, sketched(weight)).tolist() == among_all(either, x, dense(weight))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite_spoil_their_row_alone(either: native.Kernels, bad: float) -> None:
    weight, x = torch.randn(300, 64).bfloat16(), torch.randn(5, 64)
    clean = either.output_argmax(x, sketched(weight)).tolist()
    x[3, 17] = bad
    clean[3] = -1
    assert either.output_argmax(x, sketched(weight)).tolist() == clean == among_all(either, x, dense(weight))


@pytest.mark.parametrize("rows", [1, 2])
def test_most_of_the_weight_is_not_read(either: native.Kernels, rows: int) -> None:
    data, x = torch.randn(5000, 576).bfloat16(), torch.randn(rows, 576)
    weight, scores = sketched(data), x @ data.float().T
    expected = among_all(either, x, weight)
    hopeless = (scores < scores.amax(1, keepdim=True) / 2).all(0)
    assert hopeless.float().mean() > 0.9
    data[hopeless] = math.nan
    assert either.output_argmax(x, weight).tolist() == expected


def test_threads_change_nothing(either: native.Kernels) -> None:
    weight, x = sketched(torch.randn(1000, 128).bfloat16()), torch.randn(11, 128)
    expected = among_all(either, x, weight)
    try:
        for threads in (1, 2, 5):
            either.set_threads(threads)
            assert either.output_argmax(x, weight).tolist() == expected
    finally:
        either.set_threads(torch.get_num_threads())


def test_no_rows(either: native.Kernels) -> None:
    assert either.output_argmax(torch.empty(0, 64), sketched(torch.randn(9, 64))).tolist() == []


def test_its_errors_are_those_of_the_rounding() -> None:
    data = torch.randn(100, 192).bfloat16()
    sketch = sketched(data).sketch
    assert sketch is not None
    codes = sketch.data.transpose(1, 2).reshape(112, 192)[:100].double()
    assert codes.abs().max() == 127
    error = (data.double() - codes * sketch.scale[:100, None]).norm(dim=1)
    assert (sketch.error[:100] > error).all()
    assert (sketch.error[:100] < 1.1 * error).all()
    assert sketch.greatest_norm > data.double().norm(dim=1).max()


def test_without_a_sketch_all_outputs_are_computed(kernels: object) -> None:
    """Plain torch, an unsketched weight, a bias: the same token, from all outputs."""
    weight, x, bias = torch.randn(200, 64).bfloat16(), torch.randn(3, 64), torch.randn(200)
    for offset in (None, bias):
        expected = reference.argmax(reference.linear_forward(x, dense(weight), offset))
        for each in (dense(weight), sketched(weight)):
            assert torch.equal(kernels.output_argmax(x, each, offset), expected)  # type: ignore[attr-defined]
            assert torch.equal(dispatched.output_argmax(x, each, offset), expected)


@pytest.mark.parametrize(
    "weight",
    [
        make_weight("nf4", 16, 64),
        make_weight("int8", 16, 64),
        dense(torch.randn(16, 96)),
        dense(torch.empty(1, 2**16 + 64)),
        dense(torch.full((16, 64), math.inf)),
    ],
    ids=["four bits", "int8", "half a block", "too wide", "not finite"],
)
def test_weights_that_are_not_sketched(weight: QuantizedWeight) -> None:
    with pytest.raises(ValueError, match="weight"):
        weight.with_sketch()
