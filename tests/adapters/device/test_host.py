"""Adapters laid out in host memory."""

import pytest
import torch

from adapters.device.host import DTYPE_CODES, as_units, from_units


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_one_number_are_units_too(dtype: torch.dtype) -> None:
    rows = torch.randn(1, 6).to(dtype).T  # B of a linear with one output
    assert torch.equal(from_units(as_units(rows), 0, 6, DTYPE_CODES[dtype]), rows)
