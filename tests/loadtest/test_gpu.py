"""The GPU report: its arithmetic, and every line of it at a size that a CPU can run. Figures need a GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loadtest.gpu import __main__ as command
from loadtest.gpu import lines, models, parts
from loadtest.workers import WorkerError, worker


def test_a_line_says_whether_its_promise_held() -> None:
    assert lines.at_least("b", "speed", 1.5, 1.5).verdict == "holds"
    assert lines.at_least("b", "speed", 1.49, 1.5).verdict == "FAILS"
    assert lines.at_least("b", "speed", float("nan"), 1.5).verdict == "FAILS"
    assert lines.at_most("f", "latency", 1.1, 1.1).verdict == "holds"
    assert lines.at_most("f", "latency", 1.2, 1.1).verdict == "FAILS"
    assert lines.at_most("f", "latency", float("nan"), 1.1).verdict == "FAILS"
    assert lines.Line("f", "cold adapter", "?", "-", None).verdict == "not measured"


def test_the_rate_counts_tokens_after_everybodys_first() -> None:
    def ask(burst: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"times": [delay + 0.1 * step for step in range(burst["tokens"])]} for delay in (0.0, 0.05)]

    tokens = models.FULL.tokens
    seconds = 0.1 * (tokens - 1)  # the later request's first token to its last
    bench = parts.Bench(Path(), models.FULL)
    assert parts.rate(bench, ask, 2, [None]) == pytest.approx((2 * tokens - 2) / seconds, rel=0.01)


def test_neighbours_are_counted_apart_from_who_arrives() -> None:
    standing = {"sent": 0.0, "times": [1.0, 1.1, 1.5]}
    burst = parts.Burst.of([{"sent": 2.0, "times": [2.25, 3.0]}], [standing])
    assert burst.firsts == [0.25]
    assert burst.gaps == pytest.approx([0.1, 0.4])
    assert burst.rate == pytest.approx(2 / 1.0)
    assert parts.percentile([3.0, 1.0, 2.0], 99) == 3.0
    assert parts.percentile([3.0, 1.0, 2.0], 50) == 2.0


def test_the_roofline_reads_every_weight_once() -> None:
    llama, qwen = (models.bytes_per_token(shape) / 1e9 for shape in models.FULL.models.values())
    assert llama == pytest.approx(6.98 * (1 / 2 + 1 / 64) + 1.05, rel=0.01)
    assert qwen == pytest.approx(6.95 * (1 / 2 + 1 / 64) + 1.24, rel=0.01)
    assert models.adapter_bytes(models.LLAMA_8B, 16) == 2 * 16 * 32 * 81920


def test_parts_run_again_replace_their_own_lines(tmp_path: Path) -> None:
    machine = {"gpu": "G", "cuda": "13.0", "python": "3.12", "packages": {"torch": "2"}, "date": "2026-01-01T00:00"}
    machine |= {"commit": "abc", "command": "make gpu"}

    def part(name: str, *measured: str) -> lines.Part:
        found = [lines.Line(name, f"tests {value}", "all | any", value, True) for value in measured]
        return lines.Part(name, machine, found, {"raw": measured})

    lines.write_results(tmp_path / "gpu-g", [part("a", "3 passed", "old"), part("b", "1.5x")])
    lines.write_results(tmp_path / "gpu-g", [part("a", "4 passed")])
    page = (tmp_path / "gpu-g.md").read_text().splitlines()
    assert page[4:6] == [
        "| a | tests 4 passed | all / any | 4 passed | holds |",
        "| b | tests 1.5x | all / any | 1.5x | holds |",
    ]
    assert page[-1] == "- a, b: G, CUDA 13.0; Python 3.12, torch 2; 2026-01-01, commit abc, `make gpu`"


def test_a_worker_that_ends_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing.py").write_text("raise SystemExit('no such model')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(WorkerError, match="no such model"), worker("failing", {}):
        pass


def test_a_part_that_breaks_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: parts.Bench) -> list[lines.Line]:
        bench.raw["so far"] = 1
        raise OSError("no space left")

    monkeypatch.setitem(parts.PARTS, "b", broken)
    part = command.run("b", parts.Bench(Path(), models.SMOKE), [])
    assert [line.text.strip() for line in part.lines] == ["not measured  b  broken: no space left (runs)"]
    assert part.raw == {"so far": 1}


@pytest.mark.parametrize(
    "letters", ["b", *(pytest.param(each, marks=pytest.mark.slow) for each in ("a", "cde", "f", "g", "h"))]
)
def test_every_line_can_be_measured(
    letters: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a size that only proves that the command runs."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command.main(["--smoke", "--results", str(tmp_path), letters])
    found = json.loads(next(tmp_path.glob("gpu-*.json")).read_text())
    measured = [line for part in found.values() for line in part["lines"]]
    assert set(letters) <= {line["name"] for line in measured}
    errors = capfd.readouterr().err
    for line in measured:
        assert line["verdict"] != "not measured", (line, errors)
        assert "nan" not in line["measured"], line
        if line["name"] in "ab" and line["what"].startswith(("tests", "log-prob", "error")):
            assert line["verdict"] == "holds", (line, found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure for minutes")
def test_without_a_gpu_nothing_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 2
    assert "nothing was measured" in capsys.readouterr().err
