"""Draws and log-probabilities in C++, compared with sorting in float64."""

import math
import random

import pytest
import torch
from torch import Tensor

from adapters.kernels import Truncation, native

VOCABULARIES = [1, 3, 127, 128, 129, 1000, 20_000]
NEAR = 1e-5  # tolerance of cumulative probabilities in float32


def scores_of(vocabulary: int, rows: int, kind: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, vocabulary, generator=generator) * (12 if kind == "peaked" else 1)
    match kind:
        case "equal":
            return scores.round()
        case "flat":
            return scores * 0.01
        case "masked":
            forbidden = torch.rand(rows, vocabulary, generator=generator) < 0.9
            forbidden[:, vocabulary // 2] = False
            return scores.masked_fill(forbidden, -torch.inf)
    return scores


def kept(scores: Tensor, truncation: Truncation) -> tuple[Tensor, bool]:
    """Probabilities of the kept tokens, float64, and whether float32 may keep different ones."""
    weights = ((scores.double() - scores.max()) / truncation.temperature).exp()
    floor, doubtful = truncation.min_p, False
    ranked = weights.sort(descending=True).values
    if 0 < truncation.top_k < len(weights):
        floor = max(floor, float(ranked[truncation.top_k - 1]))
    ranked = ranked[ranked >= floor]
    reached = ranked.cumsum(0) / ranked.sum()
    if truncation.top_p < 1:
        last = min(int((reached < truncation.top_p).sum()), len(ranked) - 1)
        doubtful = bool(((reached - truncation.top_p).abs() < NEAR).any())
        floor = max(floor, float(ranked[last]))
    doubtful |= bool(((weights - floor).abs() < NEAR * floor).logical_and(weights != floor).any())
    weights = torch.where(weights >= floor, weights, 0)
    return weights / weights.sum(), doubtful


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("kind", ["normal", "peaked", "equal", "flat", "masked"])
def test_drawn_tokens_equal_a_draw_by_sorting(compiled: native.Kernels, vocabulary: int, kind: str) -> None:
    chosen = random.Random(f"{vocabulary} {kind}")
    judged = 0
    for trial in range(20):
        truncation = Truncation(
            chosen.choice([0.05, 0.7, 1.0, 3.0]),
            chosen.choice([0.0, 0.0, 0.02, 0.9]),
            chosen.choice([0, 0, 1, 7, 50, 1200, 10**6]),
            chosen.choice([1.0, 0.999, 0.9, 0.3, 1e-6]),
        )
        scores = scores_of(vocabulary, 1, kind, trial)
        shares, doubtful = kept(scores[0], truncation)
        uniforms = [0.0, *(chosen.random() for _ in range(6)), 1 - 2**-53]
        tokens = compiled.draw(scores.expand(8, -1), [truncation] * 8, uniforms).tolist()
        if doubtful:
            continue
        judged += 1
        for token, uniform in zip(tokens, uniforms, strict=True):
            below = float(shares[:token].sum())
            assert shares[token] > 0, truncation
            assert below - NEAR <= uniform <= below + float(shares[token]) + NEAR, truncation
    assert judged > (1 if kind == "flat" else 8)


def test_a_rows_result_does_not_depend_on_other_rows(compiled: native.Kernels) -> None:
    scores = torch.cat([scores_of(5000, 4, kind, 7) for kind in ("normal", "peaked", "flat")])
    truncations = [Truncation(0.5 + 0.1 * row, 0.001 * row, 3 * row, 1 - 0.05 * row) for row in range(12)]
    uniforms = [row / 12 for row in range(12)]
    together = compiled.draw(scores, truncations, uniforms).tolist()
    alone = [
        compiled.draw(scores[row : row + 1], [truncations[row]], [uniforms[row]]).item() for row in reversed(range(12))
    ]
    assert together == alone[::-1]


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_row_that_is_not_finite_does_not_affect_others(
    compiled: native.Kernels, fault: float, everywhere: bool
) -> None:
    scores = scores_of(3000, 3, "normal")
    scores[1, slice(None) if everywhere else slice(7, 3000, 5)] = fault
    truncation = Truncation(1.0, 0.0, 40, 0.9)
    clean = compiled.draw(scores[::2], [truncation] * 2, [0.3, 0.6]).tolist()
    found = compiled.draw(scores, [truncation] * 3, [0.3, 0.5, 0.6]).tolist()
    assert found[::2] == clean
    assert 0 <= found[1] < 3000
    tokens = torch.tensor([1, 2, 3])
    values, _, ids, likeliest = compiled.logprobs(scores, tokens, 20)
    assert values.isfinite().tolist()[::2] == likeliest.isfinite().all(-1).tolist()[::2] == [True, True]
    assert bool(((ids >= 0) & (ids < 3000)).all())


def test_no_rows(compiled: native.Kernels) -> None:
    assert compiled.draw(torch.empty(0, 50), [], []).tolist() == []
    assert [len(part) for part in compiled.logprobs(torch.empty(0, 50), torch.empty(0, dtype=torch.int64), 3)] == [
        0
    ] * 4


@pytest.mark.parametrize("kind", ["normal", "peaked", "equal", "masked"])
@pytest.mark.parametrize("most", [0, 1, 20, 600])
def test_logprobs(compiled: native.Kernels, kind: str, most: int) -> None:
    for vocabulary in VOCABULARIES:
        check_logprobs(compiled, scores_of(vocabulary, 5, kind), most)


def check_logprobs(compiled: native.Kernels, scores: Tensor, most: int) -> None:
    vocabulary = scores.shape[1]
    scores[0, 0] = -0.0  # equals 0
    tokens = torch.randint(vocabulary, (5,), generator=torch.Generator().manual_seed(vocabulary))
    tokens[0] = vocabulary // 2
    values, ranks, ids, likeliest = compiled.logprobs(scores, tokens, most)
    expected = scores.double().log_softmax(-1)
    own = scores.gather(1, tokens[:, None])
    torch.testing.assert_close(values, expected.gather(1, tokens[:, None])[:, 0], atol=2e-6, rtol=1e-6)
    assert torch.equal(ranks, (scores > own).sum(-1) + 1)
    best = scores.double().sort(dim=-1, descending=True, stable=True).indices[:, :most]
    assert torch.equal(ids, best)
    torch.testing.assert_close(likeliest, expected.gather(1, best), atol=2e-6, rtol=1e-6)


def test_logprobs_of_a_token_that_is_not_there(compiled: native.Kernels) -> None:
    with pytest.raises(IndexError, match="token 50 is outside"):
        compiled.logprobs(torch.zeros(1, 50), torch.tensor([50]), 1)


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 1000])
@pytest.mark.parametrize("words", [0, 1, 7, 40])
def test_masks(compiled: native.Kernels, vocabulary: int, words: int) -> None:
    generator = torch.Generator().manual_seed(words)
    allowed = torch.randint(-(2**31), 2**31, (words,), generator=generator).int()
    bits = (allowed[:, None] >> torch.arange(32)).flatten() & 1
    scores = torch.randn(vocabulary, generator=generator)
    expected = [score if i < len(bits) and bits[i] else -math.inf for i, score in enumerate(scores.tolist())]
    compiled.mask_(scores, allowed)
    assert scores.tolist() == expected
