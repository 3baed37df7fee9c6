"""Fairness: verdicts from figures, and the measurement at the scale of a test."""

from loadtest import fairness
from loadtest.fairness import summary


def test_verdicts() -> None:
    rates = {"alone": [100.0, 110.0], "beside": [95.0, 80.0]}
    result = summary([0.1] * 20, [0.3] * 20, rates, [0.95, 0.73], step=0.18)
    assert [verdict["holds"] for verdict in result["verdicts"]] == [True, False]
    assert [verdict["value"] for verdict in result["verdicts"]] == [1.2, 0.84]
    assert result["all_tokens_per_second"] == {"alone": [300.0, 330.0], "beside": [321.0, 276.0]}
    assert fairness.table(result).row_count == 5
