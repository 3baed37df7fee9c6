"""The int8 tier of a 4-bit linear: the defined integers, rows independent of each other, an error of one percent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters import kernels as dispatched
from adapters.kernels import QuantizedWeight, native, reference
from tests.adapters.kernels.test_linear import assert_threads_change_nothing, make_weight

KINDS = st.sampled_from(["nf4", "nf4-flat", "fp4"])
BLOCKSIZES = st.sampled_from([64, 128, 256, 512])


def make_input(rows: int, in_features: int) -> Tensor:
    """Blocks of very different magnitudes, some zero or nearly zero."""
    size = torch.randint(-8, 4, (rows, in_features // 64, 1)).float().exp2()
    size[torch.rand(rows, in_features // 64) < 0.1] = 0.0
    size[torch.rand(rows, in_features // 64) < 0.1] = 1e-38
    return (torch.randn(rows, in_features // 64, 64) * size).view(rows, in_features)


def assert_same(kernels: native.Kernels, actual: Tensor, expected: Tensor) -> None:
    if kernels.instruction_set == "portable":  # it has no fused multiply-add
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    else:
        assert torch.equal(actual, expected)


@given(
    kind=KINDS, blocksize=BLOCKSIZES, out=st.integers(1, 70), wide=st.integers(1, 9), rows=st.integers(1, 40)
)  # fmt: skip
@settings(max_examples=30)
def test_the_integers_of_the_definition(
    either: native.Kernels, kind: str, blocksize: int, out: int, wide: int, rows: int
) -> None:
    in_features = -(-64 * wide // blocksize) * blocksize
    weight = make_weight(kind, out, in_features, blocksize).with_int8_inputs()
    x, bias = make_input(rows, in_features), torch.randn(out)
    assert_same(either, either.linear_forward(x, weight, bias), reference.linear_forward(x, weight, bias))


@given(kind=KINDS, blocksize=BLOCKSIZES, out=st.integers(1, 70), wide=st.integers(1, 9))
@settings(max_examples=30)
def test_the_library_lays_out_the_same_copy(
    either: native.Kernels, kind: str, blocksize: int, out: int, wide: int
) -> None:
    weight = make_weight(kind, out, -(-64 * wide // blocksize) * blocksize, blocksize)
    expected, copy = weight.with_int8_inputs().int8, either.with_int8_inputs(weight).int8
    assert expected is not None
    assert copy is not None
    assert torch.equal(copy.data, expected.data)
    assert torch.equal(copy.levels, expected.levels)


@given(out=st.integers(1, 70), wide=st.integers(1, 9), rows=st.integers(1, 40), data=st.data())
@settings(max_examples=30)
def test_a_rows_result_does_not_depend_on_other_rows(
    either: native.Kernels, out: int, wide: int, rows: int, data: st.DataObject
) -> None:
    weight = make_weight("nf4", out, 64 * wide).with_int8_inputs()
    x = make_input(rows, 64 * wide)
    together = either.linear_forward(x, weight)
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    assert torch.equal(either.linear_forward(x[first:last], weight), together[first:last])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(compiled: native.Kernels, threads: int) -> None:
    assert_threads_change_nothing(compiled, make_weight("nf4", 500, 192).with_int8_inputs(), threads)


def test_the_error_is_a_percent_and_outliers_stay_in_their_block(compiled: native.Kernels) -> None:
    exact = make_weight("nf4", 96, 576)
    x = torch.randn(40, 576)
    x[:, 100] = 1e4
    weight = exact.with_int8_inputs()
    outlier = torch.zeros_like(x)
    outlier[:, 64:128] = x[:, 64:128]
    y = compiled.linear_forward(x, weight) - compiled.linear_forward(outlier, weight)
    rest = compiled.linear_forward(x - outlier, exact)
    assert (y - rest).norm() < 0.02 * rest.norm()
    assert not torch.equal(compiled.linear_forward(x, weight), compiled.linear_forward(x, exact))


def test_a_row_that_is_not_finite_does_not_affect_others(either: native.Kernels) -> None:
    weight = make_weight("nf4", 32, 128).with_int8_inputs()
    x = torch.randn(9, 128)
    clean = either.linear_forward(x, weight)
    x[3, 5], x[5, 70] = torch.nan, -torch.inf
    spoilt = either.linear_forward(x, weight)
    keep = [0, 1, 2, 4, 6, 7, 8]
    assert torch.equal(spoilt[keep], clean[keep])
    assert spoilt[[3, 5]].isnan().all()
    assert reference.linear_forward(x, weight)[[3, 5]].isnan().all()


def test_everything_else_is_exact_as_before(compiled: native.Kernels) -> None:
    exact = make_weight("nf4", 40, 128)
    weight, dy = exact.with_int8_inputs(), torch.randn(6, 40)
    assert weight.data is exact.data
    assert exact.int8 is None
    assert torch.equal(compiled.dequantize(weight), compiled.dequantize(exact))
    assert torch.equal(compiled.linear_backward(dy, weight), compiled.linear_backward(dy, exact))


@pytest.mark.parametrize(
    ("kind", "shape", "blocksize"),
    [("int8", (8, 64), 64), ("nf4", (8, 96), 32), ("nf4", (8, 192), 128), ("bf16", (8, 64), 0)],
)
def test_only_for_whole_4_bit_blocks(kind: str, shape: tuple[int, int], blocksize: int) -> None:
    with pytest.raises(ValueError, match="blocks"):
        make_weight(kind, *shape, blocksize).with_int8_inputs()


def test_the_twin_stands_in() -> None:
    weight: QuantizedWeight = make_weight("nf4", 40, 128).with_int8_inputs()
    x = torch.randn(5, 128)
    assert weight.int8 is not None
    with native.switched_off():
        torch.testing.assert_close(dispatched.base_linear(x, weight), reference.int8_linear(x, weight, weight.int8))
