"""The GPU report's own reckoning; what it measures needs a GPU."""

from typing import Any

import pytest
import torch

from loadtest import gpu


def test_a_line_says_whether_its_promise_held() -> None:
    assert gpu.at_least("b", "speed", 1.5, 1.5).verdict == "holds"
    assert gpu.at_least("b", "speed", 1.49, 1.5).verdict == "FAILS"
    assert gpu.at_least("b", "speed", float("nan"), 1.5).verdict == "FAILS"
    assert gpu.Line("f", "cold adapter", "?", "-", None).verdict == "not measured"


def test_the_rate_counts_tokens_after_everybodys_first() -> None:
    def ask(burst: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"times": [delay + 0.1 * step for step in range(burst["tokens"])]} for delay in (0.0, 0.05)]

    seconds = 0.1 * (gpu.TOKENS - 1)  # the later request's first token to its last
    assert gpu.rate(ask, 2, [None]) == pytest.approx((2 * gpu.TOKENS - 2) / seconds, rel=0.01)


def test_the_roofline_reads_every_weight_once() -> None:
    assert gpu.bytes_per_token() / 1e9 == pytest.approx(6.98e9 * (1 / 2 + 1 / 64) / 1e9 + 1.05, rel=0.01)


def test_the_page_has_a_row_for_each_line() -> None:
    described = {"gpu": "G", "cuda": "13.0", "packages": {"torch": "2"}, "date": "today", "command": "make gpu"}
    page = gpu.markdown(described, [gpu.Line("a", "tests", "all | any", "3 passed", True)])
    assert page.splitlines()[-1] == "| a | tests | all / any | 3 passed | holds |"


def test_a_worker_that_ends_says_why(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing.py").write_text("raise SystemExit('no such model')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no such model"), gpu.worker("failing", {}):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure for minutes")
def test_without_a_gpu_nothing_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main() == 2
    assert "nothing was measured" in capsys.readouterr().err
