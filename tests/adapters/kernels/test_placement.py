"""Weights on huge pages: the same numbers, aligned to a page; small weights are not moved."""

import pytest
import torch

from adapters.kernels import ExpertWeights
from adapters.kernels.placement import HUGE_PAGE, on_huge_pages


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_large_tensors_begin_on_a_huge_page(dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 100, (3, HUGE_PAGE // dtype.itemsize + 5)).to(dtype)[1:]
    placed = on_huge_pages(tensor)
    assert placed.data_ptr() % HUGE_PAGE == 0
    assert placed.is_contiguous()
    assert torch.equal(placed, tensor)


def test_small_tensors_stay() -> None:
    tensor = torch.zeros(1000)
    assert on_huge_pages(tensor) is tensor


def test_experts_placed_are_the_same() -> None:
    weights = ExpertWeights.quantize((torch.randn(512, 1024) for _ in range(9)), "nf4", torch.float32)
    placed = weights.placed()
    assert placed.data.data_ptr() % HUGE_PAGE == 0
    assert all(torch.equal(tensor, placed.tensors()[name]) for name, tensor in weights.tensors().items())
