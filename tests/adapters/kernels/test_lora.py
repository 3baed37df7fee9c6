"""Grouped LoRA over a pool of raw units: mixed ranks, dtypes, overlaps, gaps."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters.kernels import BF16, FP16, FP32, native

DTYPES = {FP32: torch.float32, BF16: torch.bfloat16, FP16: torch.float16}
Segment = tuple[int, int, int, int, float]  # start, end, rank, dtype, scale


class Pool:
    """The matrices of segments laid out in units; every unused unit is NaN in each of the three dtypes."""

    def __init__(self, segments: list[Segment], in_features: int, out_features: int) -> None:
        units = sum(rank * 2 + 2 for _, _, rank, _, _ in segments) + 2
        self.a = torch.full((units, in_features), 0x7FFF, dtype=torch.int16)
        self.b = torch.full((units, out_features), 0x7FFF, dtype=torch.int16)
        self.matrices: list[tuple[Tensor, Tensor]] = []
        rows, first = [], 0
        for start, end, rank, dtype, _ in segments:
            a, b = (torch.randn(rank, width).to(DTYPES[dtype]) for width in (in_features, out_features))
            for pool, matrix in ((self.a, a), (self.b, b)):
                raw = matrix.view(torch.int16).reshape(-1, pool.shape[1])
                pool[first : first + len(raw)] = raw
            self.matrices.append((a, b))
            rows.append((start, end, first, rank, dtype))
            first += 2 * rank + 2
        self.table = torch.tensor(rows, dtype=torch.int32).view(-1, 5)
        self.scale = torch.tensor([segment[4] for segment in segments], dtype=torch.float32)

    def expected(self, y: Tensor, x: Tensor) -> Tensor:
        y, x = y.double(), x.double()
        for (start, end, *_), scale, (a, b) in zip(
            self.table.tolist(), self.scale.tolist(), self.matrices, strict=True
        ):
            y[start:end] += scale * (x[start:end] @ a.double().T) @ b.double()
        return y

    def add(self, kernels: Any, y: Tensor, x: Tensor) -> Tensor:
        y = y.clone()
        kernels.lora_add_(y, x, self.a, self.b, self.table, self.scale)
        return y


@st.composite
def problems(
    draw: st.DrawFn, ranks: tuple[int, ...] = (0, 1, 3, 8, 17), most: int = 5
) -> tuple[int, int, int, list[Segment]]:
    """Tokens, in, out, and up to the given number of segments."""
    tokens, in_features, out_features = (draw(st.integers(1, limit)) for limit in (80, 100, 100))
    segments = []
    for _ in range(draw(st.integers(0, most))):
        start = draw(st.integers(0, tokens))
        end = draw(st.integers(start, tokens))
        rank = draw(st.sampled_from(ranks))
        segments.append((start, end, rank, draw(st.sampled_from(list(DTYPES))), draw(st.sampled_from([0.5, -2.0]))))
    return tokens, in_features, out_features, segments


@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_against_float64(kernels: Any, problem: tuple[int, int, int, list[Segment]]) -> None:
    tokens, in_features, out_features, segments = problem
    pool = Pool(segments, in_features, out_features)
    x, y = torch.randn(tokens, in_features), torch.randn(tokens, out_features)
    torch.testing.assert_close(pool.add(kernels, y, x).double(), pool.expected(y, x), rtol=2e-5, atol=2e-4)


@given(
    rows=st.integers(2, 40), rank=st.sampled_from([1, 4, 16, 19]), dtype=st.sampled_from(list(DTYPES)), data=st.data()
)
@settings(max_examples=30, deadline=None)
def test_a_rows_result_does_not_depend_on_other_rows(
    compiled: native.Kernels, rows: int, rank: int, dtype: int, data: st.DataObject
) -> None:
    pool = Pool([(0, rows, rank, dtype, 1.5)], 72, 90)
    x, y = torch.randn(rows, 72), torch.randn(rows, 90)
    together = pool.add(compiled, y, x)
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    pool.table[0, 1] = last - first
    assert torch.equal(pool.add(compiled, y[first:last], x[first:last]), together[first:last])


def test_the_twin_is_invariant_too(kernels: Any) -> None:
    pool = Pool([(0, 24, 16, FP32, 1.0)], 576, 192)
    x, y = torch.randn(24, 576), torch.randn(24, 192)
    together = pool.add(kernels, y, x)
    for rows in (1, 3, 8, 23):
        pool.table[0, 1] = rows
        assert torch.equal(pool.add(kernels, y[:rows], x[:rows]), together[:rows])


def test_a_poisoned_neighbour_stays_alone(kernels: Any) -> None:
    pool = Pool([(0, 2, 4, FP32, 1.0), (2, 4, 4, BF16, 1.0)], 64, 64)
    x, y = torch.randn(4, 64), torch.randn(4, 64)
    clean = pool.add(kernels, y, x)
    x[3] = torch.nan
    spoilt = pool.add(kernels, y, x)
    assert torch.equal(spoilt[:3], clean[:3])
    assert spoilt[3].isnan().all()
