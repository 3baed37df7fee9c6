"""Linears over frozen weights: compared with float64 and with bitsandbytes' decoding, and independent per row."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adapters import kernels as dispatched
from adapters.kernels import QuantizedWeight, native, reference

KINDS = ["nf4", "nf4-flat", "fp4", "int8", "fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_weight(kind: str, out_features: int, in_features: int, blocksize: int = 64) -> QuantizedWeight:
    dense = torch.randn(out_features, in_features) * in_features**-0.5
    if kind in DTYPES:
        linear = nn.Linear(in_features, out_features, bias=False)
        linear.weight.data = dense.to(DTYPES[kind])
        return QuantizedWeight.from_linear(linear)
    if kind == "int8":
        linear = Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False)
        linear.weight.data = dense
        return QuantizedWeight.from_linear(linear.to("cpu"))
    linear = Linear4bit(in_features, out_features, bias=False)
    linear.weight = Params4bit(
        dense,
        requires_grad=False,
        quant_type=kind.removesuffix("-flat"),
        compress_statistics=not kind.endswith("flat"),
        blocksize=blocksize,
        module=linear,
    )
    return QuantizedWeight.from_linear(linear.to("cpu"))


def expected(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ weight.dequantize(torch.float32).double().T
    return y if bias is None else y + bias


def assert_near(actual: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *itertools.product(KINDS, [(96, 576), (33, 64)]),
        *itertools.product(["int8", *DTYPES], [(24, 96), (7, 50), (1, 1)]),
    ],
)
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 13, 20, 70])
def test_against_float64(kernels: Any, kind: str, shape: tuple[int, int], rows: int) -> None:
    weight = make_weight(kind, *shape)
    x, bias = torch.randn(rows, shape[1]), torch.randn(shape[0])
    assert_near(kernels.linear_forward(x, weight, bias), expected(x, weight, bias))
    dy = torch.randn(rows, shape[0])
    assert_near(kernels.linear_backward(dy, weight), dy.double() @ weight.dequantize(torch.float32).double())


@pytest.mark.parametrize("kind", ["nf4", "nf4-flat", "fp4"])
@pytest.mark.parametrize(("shape", "blocksize"), [((48, 320), 64), ((24, 96), 32), ((9, 1024), 128), ((9, 1024), 512)])
def test_decodes_the_very_numbers_of_bitsandbytes(
    compiled: native.Kernels, kind: str, shape: tuple[int, int], blocksize: int
) -> None:
    weight = make_weight(kind, *shape, blocksize)
    assert torch.equal(compiled.dequantize(weight), weight.dequantize(torch.float32))


@given(
    kind=st.sampled_from(KINDS),
    out_features=st.integers(1, 70),
    blocks=st.integers(1, 9),
    rows=st.integers(1, 40),
    data=st.data(),
)
@settings(max_examples=40, deadline=None)
def test_a_rows_result_does_not_depend_on_other_rows(
    compiled: native.Kernels, kind: str, out_features: int, blocks: int, rows: int, data: st.DataObject
) -> None:
    weight = make_weight(kind, out_features, 64 * blocks)
    x = torch.randn(rows, 64 * blocks)
    together = compiled.linear_forward(x, weight)
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    assert torch.equal(compiled.linear_forward(x[first:last], weight), together[first:last])


def test_the_row_multiple_makes_the_twin_invariant() -> None:
    weight = make_weight("nf4", 192, 576)
    multiple = reference.row_multiple(*weight.shape, torch.float32, torch.get_num_threads())
    assert multiple in {1, 2, 4, 8, 16, 32, 64}
    x = torch.randn(37, 576)
    together = reference.linear_forward(x, weight)
    for rows in (*range(1, 18), 31):
        assert torch.equal(reference.linear_forward(x[:rows], weight), together[:rows])


def test_a_padded_product_can_be_changed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training adds an adapter's update to it."""
    monkeypatch.setattr(reference, "row_multiple", lambda *_: 64)
    x, weight = torch.randn(5, 64, requires_grad=True), make_weight("nf4", 32, 64)
    y = reference.base_linear(x, weight)
    assert not y._is_view()
    y.add_(1.0).sum().backward()
    assert x.grad is not None


def test_neighbouring_rows_do_not_leak(kernels: Any) -> None:
    weight = make_weight("nf4", 32, 128)
    x = torch.randn(9, 128)
    clean = kernels.linear_forward(x, weight)
    x[3], x[5] = torch.nan, torch.inf
    spoilt = kernels.linear_forward(x, weight)
    keep = [0, 1, 2, 4, 6, 7, 8]
    assert torch.equal(spoilt[keep], clean[keep])
    assert spoilt[3].isnan().all()


def assert_threads_change_nothing(compiled: native.Kernels, weight: QuantizedWeight, threads: int) -> None:
    x = torch.randn(19, weight.shape[1])
    before = compiled.linear_forward(x, weight)
    compiled.set_threads(threads)
    try:
        for _ in range(20):
            assert torch.equal(compiled.linear_forward(x, weight), before)
    finally:
        compiled.set_threads(torch.get_num_threads())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(compiled: native.Kernels, threads: int) -> None:
    assert_threads_change_nothing(compiled, make_weight("nf4", 500, 192), threads)


def test_rows_that_are_not_whole_blocks_mean_what_bitsandbytes_says() -> None:
    weight = make_weight("nf4", 24, 96)
    assert not native.supports_weight(weight)
    x = torch.randn(5, 96)
    assert_near(dispatched.base_linear(x, weight), expected(x, weight))


def test_gradient_reaches_x_alone() -> None:
    weight = make_weight("nf4", 40, 128)
    x = torch.randn(6, 128, requires_grad=True)
    bias = torch.randn(40)
    y = dispatched.base_linear(x, weight, bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert_near(y.detach(), expected(x.detach(), weight, bias))
    assert x.grad is not None
    assert_near(x.grad, dy.double() @ weight.dequantize(torch.float32).double())


def test_nothing_but_the_input_gradient_is_kept() -> None:
    weight = make_weight("nf4", 40, 128)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        dispatched.base_linear(torch.randn(6, 128, requires_grad=True), weight)
    assert saved == []


def test_the_weight_stays_as_it_was() -> None:
    linear = Linear4bit(128, 64, bias=True, quant_type="nf4").to("cpu")
    before = linear.weight.data.clone()
    weight = QuantizedWeight.from_linear(linear)
    dispatched.base_linear(torch.randn(3, 128), weight, linear.bias)
    assert torch.equal(linear.weight.data, before)
    assert weight.data.data_ptr() == linear.weight.data_ptr()


def test_threads_that_first_use_a_weight_at_once(compiled: native.Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    made, both = native._weight_struct, threading.Barrier(2)

    def make(weight: QuantizedWeight) -> tuple[native.WeightStruct, Tensor | None]:
        both.wait(10)
        return made(weight)

    monkeypatch.setattr(native, "_weight_struct", make)
    with ThreadPoolExecutor(2) as threads:
        [first, second] = threads.map(compiled.weight, [make_weight("nf4", 40, 128)] * 2)
    assert first is second, "otherwise one thread's scales are freed while it reads them"


def test_unsupported_layers_are_refused() -> None:
    with pytest.raises(TypeError, match="Conv1d"):
        QuantizedWeight.from_linear(nn.Conv1d(2, 2, 1))
    with pytest.raises(ValueError, match="not quantised"):
        QuantizedWeight.from_linear(Linear4bit(64, 64))


def test_the_twin_serves_other_dtypes() -> None:
    weight = make_weight("nf4", 40, 128)
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    y = dispatched.base_linear(x, weight)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected(x, weight), rtol=0.05, atol=0.05)
