"""Linears of experts: compact, close to float64 under any routing, independent per row, differentiable."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from adapters import kernels
from adapters.kernels import ExpertWeights, native, reference

KINDS = ["nf4", "fp4", "int8", "none"]
ROUNDED = ["nf4 with int8 inputs", "fp4 with int8 inputs"]
SHAPE = (96, 128)
COUNTS = torch.tensor([3, 0, 1, 9, 40])


def make(kind: str, shape: tuple[int, int] = SHAPE) -> ExpertWeights:
    kind, _, rounded = kind.partition(" ")
    dense = (torch.randn(shape) * shape[1] ** -0.5 for _ in COUNTS)
    weights = ExpertWeights.quantize(dense, kind, torch.float32)
    return weights.with_int8_inputs() if rounded else weights


def expected(x: Tensor, weights: ExpertWeights) -> Tensor:
    parts = enumerate(x.split(COUNTS.tolist()))
    return torch.cat([part.double() @ weights[expert].dequantize().double().T for expert, part in parts])


def test_experts_take_few_bits() -> None:
    weights = ExpertWeights.quantize((torch.randn(1536, 512) for _ in range(8)), "nf4", torch.float32)
    held = sum(tensor.nbytes for name, tensor in weights.tensors().items() if name not in ("code", "nested_code"))
    assert held * 8 / (8 * 1536 * 512) <= 4.2


def test_an_expert_is_the_linear_that_bitsandbytes_makes() -> None:
    from tests.adapters.kernels.test_linear import make_weight

    torch.manual_seed(0)
    single = make_weight("nf4", *SHAPE)
    torch.manual_seed(0)
    assert torch.equal(make("nf4")[0].dequantize(), single.dequantize())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [SHAPE, (33, 96), (64, 32)])
@pytest.mark.parametrize("compiled", [True, False])
def test_against_float64(kind: str, shape: tuple[int, int], compiled: bool) -> None:
    weights = make(kind, shape)
    x = torch.randn(int(COUNTS.sum()), shape[1])
    y = (kernels if compiled else reference).grouped_linear(x, weights, COUNTS)
    torch.testing.assert_close(y.double(), expected(x, weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, *ROUNDED])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_rows_result_does_not_depend_on_other_rows(kind: str, compiled: bool) -> None:
    product = (kernels if compiled else reference).grouped_linear
    weights = make(kind)
    x = torch.randn(int(COUNTS.sum()), SHAPE[1])
    y = product(x, weights, COUNTS)
    owner = torch.repeat_interleave(torch.arange(len(COUNTS)), COUNTS)
    for row, expert in enumerate(owner.tolist()):
        alone = torch.nn.functional.one_hot(torch.tensor(expert), len(COUNTS))
        assert torch.equal(product(x[row : row + 1], weights, alone), y[row : row + 1])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    weights = make(kind)
    x = torch.randn(int(COUNTS.sum()), SHAPE[1], requires_grad=True)
    dy = torch.randn(len(x), SHAPE[0])
    kernels.grouped_linear(x, weights, COUNTS).backward(dy)
    exact = x.detach().double().requires_grad_()
    expected(exact, weights).backward(dy.double())
    assert x.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, *ROUNDED])
@pytest.mark.parametrize("shape", [SHAPE, (200, 320), (33, 64)])
def test_the_grouped_product_is_that_of_each_experts_linear(
    compiled: native.Kernels, kind: str, shape: tuple[int, int]
) -> None:
    weights = make(kind, shape)
    x = torch.randn(int(COUNTS.sum()), shape[1])
    each = reference.map_experts(x, weights, COUNTS, compiled.linear_forward)
    assert torch.equal(compiled.grouped_forward(x, weights, COUNTS), each)


@pytest.mark.parametrize("kind", ROUNDED)
def test_rounded_inputs_change_results_by_a_percent_and_gradients_not_at_all(
    compiled: native.Kernels, kind: str
) -> None:
    weights = make(kind)
    x = torch.randn(int(COUNTS.sum()), SHAPE[1], requires_grad=True)
    y = kernels.grouped_linear(x, weights, COUNTS)
    exact = expected(x.detach(), weights)
    assert 0 < (y.detach() - exact).norm() < 0.02 * exact.norm()
    dy = torch.randn_like(y)
    y.backward(dy)
    parts = enumerate(dy.split(COUNTS.tolist()))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.cat([part @ weights[expert].dequantize() for expert, part in parts]))


def test_odd_shapes_have_no_int8_copy() -> None:
    with pytest.raises(ValueError, match="nf4 weight of shape"):
        make("nf4 with int8 inputs", (64, 32))


@pytest.mark.parametrize("kind", ROUNDED)
@pytest.mark.parametrize("shape", [SHAPE, (200, 320), (33, 64)])
def test_the_library_lays_out_the_same_int8_copy(either: native.Kernels, kind: str, shape: tuple[int, int]) -> None:
    weights = make(kind, shape)
    copy = either.with_int8_inputs(replace(weights, int8=None)).int8
    assert weights.int8 is not None
    assert copy is not None
    assert torch.equal(copy.data, weights.int8.data)
    assert torch.equal(copy.levels, weights.int8.levels)
