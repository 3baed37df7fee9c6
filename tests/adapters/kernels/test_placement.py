"""Weights on huge pages: the same numbers, aligned to a page; small weights are not moved."""

import pytest
import torch

from adapters.kernels import ExpertWeights
from adapters.kernels.placement import HUGE_PAGE, on_huge_pages


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_large_tensors_begin_on_a_huge_page(dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 100, (3, HUGE_PAGE // dtype.itemsize + 5)).to(dtype)[1:]
    to_huge_pages = on_huge_pages(tensor)
    assert to_huge_pages.data_ptr() % HUGE_PAGE == 0
    assert to_huge_pages.is_contiguous()
    assert torch.equal(to_huge_pages, tensor)


def test_small_tensors_stay() -> None:
    tensor = torch.zeros(1000)
    assert on_huge_pages(tensor) is tensor


def test_experts_placed_are_the_same() -> None:
    weights = ExpertWeights.quantize((torch.randn(512, 1024) for _ in range(9)), "nf4", torch.float32)
    to_huge_pages = weights.to_huge_pages()
    assert to_huge_pages.data.data_ptr() % HUGE_PAGE == 0
    assert all(torch.equal(tensor, to_huge_pages.tensors()[name]) for name, tensor in weights.tensors().items())
