"""Large zeroed tensors: alignment and memory use."""

import mmap

import psutil
import pytest
import torch

from adapters.device.memory import zeros

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (100, 3, 16, 64), (0, 8)])
def test_they_are_zeros_of_that_shape_from_a_page_on(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = zeros(shape, dtype, CPU)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.data_ptr() % mmap.PAGESIZE == 0
    assert not tensor.any()
    tensor += 1
    assert tensor.all()
    assert not zeros(shape, dtype, CPU).any()


def test_untouched_they_take_no_memory() -> None:
    before = psutil.Process().memory_info().rss
    tensor = zeros((1 << 30,), torch.float32, CPU)
    tensor[1 << 29] = 1
    assert psutil.Process().memory_info().rss - before < 64 << 20
