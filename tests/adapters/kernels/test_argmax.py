"""The argmax kernel, compared with a plain search."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

NUMBERS = st.sampled_from([-math.inf, -3.5, -0.0, 0.0, 1.0, 1.0000001, 3e38, math.inf, math.nan])


def plain(row: list[float], masked: bool) -> int:
    infinities = math.isinf(max(row)) if masked else any(map(math.isinf, row))
    if any(map(math.isnan, row)) or infinities:
        return -1
    return row.index(max(row))


@given(rows=st.integers(1, 70).flatmap(lambda n: st.lists(st.lists(NUMBERS, min_size=n, max_size=n), min_size=1)))
@pytest.mark.parametrize("masked", [False, True])
def test_odd_numbers(kernels: Any, masked: bool, rows: list[list[float]]) -> None:
    found = kernels.argmax(torch.tensor(rows), masked=masked)
    assert found.tolist() == [plain(row, masked) for row in torch.tensor(rows).tolist()]


@pytest.mark.parametrize("width", [1, 15, 1024, 1025, 49152])
def test_wide_rows(kernels: Any, width: int) -> None:
    scores = torch.randn(9, width)
    assert torch.equal(kernels.argmax(scores), torch.from_numpy(scores.numpy().argmax(-1)))
    for place in {0, width // 2, width - 1}:
        scores[:, place] = 50.0
        assert kernels.argmax(scores).tolist() == [place] * 9
        scores[:, place] = -1.0


def test_of_equals_the_first(kernels: Any) -> None:
    scores = torch.zeros(2, 5000)
    scores[0, [2100, 4000]] = scores[1, [1023, 1024]] = 7.0
    assert kernels.argmax(scores).tolist() == [2100, 1023]


def test_no_rows(kernels: Any) -> None:
    assert kernels.argmax(torch.empty(0, 50)).tolist() == []
