"""Rounds, cells and verdicts, with sides that answer from a script."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loadtest import cases, claims, kernels, pages
from loadtest.client import Timeline
from loadtest.compare import Case, Cell, Comparison, compare
from loadtest.peers.base import Kit, Side, SideError, Work
from loadtest.peers.registry import SIDES


class Scripted(Side):
    """Decodes `rate` tokens/s for each request after 0.5 s of prefill, in simulated time."""

    def __init__(self, name: str, rate: float, *, log: list[str], start_error: str = "", error: str = "") -> None:
        self.name = name  # type: ignore[misc]
        self.rate, self.log, self.start_error, self.error = rate, log, start_error, error
        self.bursts: list[list[Work]] = []
        self.stopped = False

    def missing_reason(self) -> str | None:
        return "not here" if self.rate == 0 else None

    def describe(self) -> dict[str, Any]:
        return {"version": "1"}

    async def start(self, kit: Kit) -> None:
        if self.start_error:
            raise SideError(self.start_error)

    async def burst(self, works: Sequence[Work]) -> list[Timeline]:
        self.bursts.append(list(works))
        self.log.append(self.name)
        return [self.answer(work) for work in works]

    def answer(self, work: Work) -> Timeline:
        count = work.output_tokens
        tokens = [(0.5 + i / self.rate, i + 1.0) for i in range(count)]
        text = str(work.adapter)
        timeline = Timeline(0.0, 0.0, count, tokens=tokens, output_tokens=count, text=text, finished=tokens[-1][0])
        timeline.error = self.error or None
        return timeline

    async def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path, {("float32", i): tmp_path for i in range(8)}, 16, 2, tmp_path)


async def measure(
    sides: Sequence[Side], chosen: Sequence[Case], kit: Kit, rounds: int = 1, seconds: float = 1e9
) -> Comparison:
    return await compare(
        sides, chosen, kit, rounds=rounds, cell_seconds=seconds, report=lambda line: None, idle_seconds=0.0
    )


def case(*sides: str, name: str = "eight", output_tokens: int = 5) -> Case:
    return Case(name, name, 8, "distinct", "float32", output_tokens, sides)


async def test_rounds_are_interleaved_and_rotate(kit: Kit) -> None:
    log: list[str] = []
    sides = [Scripted("a", 10, log=log), Scripted("b", 5, log=log)]
    result = await measure(sides, [case("a", "b")], kit, rounds=3)
    assert log[-6:] == ["a", "b", "b", "a", "a", "b"]
    cell = result.cells["eight"]["a"].to_json()
    assert cell["decode"] == {
        "median": pytest.approx(80),
        "low": pytest.approx(80),
        "high": pytest.approx(80),
        "rounds": 3,
    }
    assert cell["whole"]["median"] == pytest.approx(40 / 0.9)
    assert cell["ttft"]["median"] == 0.5
    assert result.answers == {"a": 8, "b": 8}
    assert all(side.stopped for side in sides)
    # The same prompts for every side in a round, others in the next.
    rounds_a, rounds_b = sides[0].bursts[-3:], sides[1].bursts[-3:]
    assert rounds_a == rounds_b
    assert rounds_a[0] != rounds_a[1]
    assert [work.adapter for work in rounds_a[0]] == [("float32", i) for i in range(8)]


async def test_a_side_takes_part_only_where_it_is_named(kit: Kit) -> None:
    sides = [Scripted("a", 10, log=[]), Scripted("b", 5, log=[])]
    both, one = case("a", "b"), case("a", name="one")
    result = await measure(sides, [both, one], kit)
    assert {name: set(row) for name, row in result.cells.items()} == {"eight": {"a", "b"}, "one": {"a"}}


async def test_a_missing_side_is_reported_and_the_rest_go_on(kit: Kit) -> None:
    broken = Scripted("broken", 1, log=[], start_error="boom")
    sides = [Scripted("absent", 0, log=[]), broken, Scripted("a", 10, log=[])]
    result = await measure(sides, [case("absent", "broken", "a")], kit)
    assert result.missing == {"absent": "not here", "broken": "did not start: boom"}
    assert set(result.cells["eight"]) == {"a"}
    assert broken.stopped


async def test_a_side_that_breaks_down_leaves_the_others_measured(kit: Kit) -> None:
    class Fragile(Scripted):
        async def burst(self, works: Sequence[Work]) -> list[Timeline]:
            if len(self.bursts) == 3:  # both bursts of the warm-up, one round
                raise SideError("out of memory")
            return await super().burst(works)

    class Broken(Scripted):
        async def burst(self, works: Sequence[Work]) -> list[Timeline]:
            raise SideError("cannot")

    sides = [Broken("c", 10, log=[]), Fragile("b", 10, log=[]), Scripted("a", 10, log=[])]
    result = await measure(sides, [case("a", "b", "c")], kit, rounds=2)
    assert result.missing == {"c": "failed in its warm-up: cannot"}
    assert result.cells["eight"]["b"].to_json() == {"error": "out of memory"}
    assert len(result.cells["eight"]["a"].decode) == 2
    assert all(side.stopped for side in sides)


async def test_interrupted_while_starting_it_stops_what_it_started(kit: Kit) -> None:
    class Interrupted(Scripted):
        async def start(self, kit: Kit) -> None:
            raise KeyboardInterrupt

    sides = [Scripted("a", 10, log=[]), Interrupted("b", 10, log=[])]
    with pytest.raises(KeyboardInterrupt):
        await measure(sides, [case("a", "b")], kit)
    assert all(side.stopped for side in sides)


async def test_a_slow_side_gets_fewer_rounds(kit: Kit) -> None:
    sides = [Scripted("fast", 100, log=[]), Scripted("slow", 1, log=[])]  # 0.54 s and 4.5 s per round
    result = await measure(sides, [case("fast", "slow")], kit, rounds=4, seconds=10)
    row = {name: cell.to_json()["decode"]["rounds"] for name, cell in result.cells["eight"].items()}
    assert row == {"fast": 4, "slow": 2}


async def test_an_error_leaves_no_figures(kit: Kit) -> None:
    side = Scripted("a", 10, log=[], error="7 of 8 tokens returned")
    result = await measure([side], [case("a")], kit, rounds=2)
    assert result.cells["eight"]["a"].to_json() == {"error": "8 of 8 requests: 7 of 8 tokens returned"}


def test_a_cell_of_single_tokens_has_no_decode_rate() -> None:
    cell = Cell()
    cell.add([Timeline(0.0, 0.0, 1, tokens=[(at, 1)], output_tokens=1, finished=at) for at in (1.0, 2.0)])
    assert "decode" not in cell.to_json()
    assert cell.to_json()["whole"]["median"] == 1.0


def test_standing_cases_name_known_sides() -> None:
    plain = cases.default_sides({"vector_extensions": ["avx2"]})
    assert set(cases.default_sides({"vector_extensions": ["avx512_bf16"]})) == set(SIDES)
    assert set(SIDES) - set(plain) == {"vllm-bf16", "peft-bf16", "transformers-serve-bf16"}
    assert [c.output_tokens for c in cases.select(["one", "whole"], 4)] == [4, 4]
    assert [c.name for c in cases.select(["whole", "one"])] == ["one", "whole"]


# --- verdicts ------------------------------------------------------------------------------------------------------


def result(**figures: float) -> dict[str, Any]:
    """A result file's content; `eight__llama=10` is a cell."""
    rows: dict[str, dict[str, Any]] = {}
    for key, value in figures.items():
        name, side = key.split("__")
        quantity = {"median": value, "low": value, "high": value, "rounds": 3}
        rows.setdefault(name, {})[side.replace("_", "-")] = {"decode": quantity, "whole": quantity}
    sides = {side: {"version": "1"} for row in rows.values() for side in row}
    listed = [{"name": name, "title": name} for name in rows]
    return {
        "cases": listed,
        "cells": rows,
        "sides": sides,
        "missing": {"vllm": "not installed"},
        "distinct_answers": {},
        "busy_cores_when_idle": 0.0,
    }


def verdicts(found: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    return {claim.title: (claim.value, claim.verdict) for claim in claims.claims(found)}


def test_ratios_are_taken_against_the_best_peer() -> None:
    found = verdicts(result(eight__lorakeet=100, eight__peft=5, eight__peft_bf16=20, eight__llama=60))
    eight = "8 requests, 8 adapters: decode /"
    assert found[f"{eight} PEFT's mixed batch, fp32"] == (20, "met")
    assert found[f"{eight} PEFT's mixed batch, its faster type"] == (5, "missed")
    assert found[f"{eight} llama-server, per-request lora, Q4_1"] == (pytest.approx(100 / 60), "missed")
    assert found[f"{eight} vLLM's CPU build, fp32"] == (None, "not measured")


def test_a_disturbed_run_says_so() -> None:
    quiet = result(eight__lorakeet=70)
    assert "Disturbed" not in claims.markdown(quiet)
    assert "others kept 1.5 cores busy" in claims.markdown(quiet | {"busy_cores_when_idle": 1.5})


def test_taxes() -> None:
    found = verdicts(
        result(
            eight__lorakeet=70,
            eight_bf16__lorakeet=1,
            base__lorakeet=100,
            base__lorakeet_bare=101,
            eight__lorakeet_offline=74,
        )
        | {"lorakeet_prefix_cache": {"first": [1.0, 2.0, 3.0], "second": [0.1, 0.2, 0.9]}}
    )
    assert found["LoRA tax, 8 adapters, fp32 files"] == (pytest.approx(0.30), "met")
    assert found["Base-only requests: cost of 16 loaded adapters"] == (pytest.approx(1 / 101), "met")
    assert found["HTTP: 8 streams / engine offline"] == (pytest.approx(70 / 74), "met")
    assert found["512-token shared prefix: second TTFT / first"] == (0.1, "met")


def test_kernels_are_judged_by_their_worst_shape() -> None:
    line = {"kernel": "nf4 linear", "shape": "576x576", "seconds": 1e-4, "library": "bitsandbytes"}
    line |= {"library_seconds": 1e-3, "rows": 1, "bandwidth_share": 0.5, "flops_share": 0.01}
    other = line | {"kernel": "bf16 head", "bandwidth_share": 0.1}
    lines = [line, line | {"bandwidth_share": 0.3}, other, line | {"rows": 16, "flops_share": 0.7}]
    roofline = {"read_gb_s": 20.0, "fp32_gflop_s": 150.0, "threads": 2}
    measured = {"roofline": roofline, "lines": lines}
    found = verdicts(result() | {"kernels": measured})
    assert found["NF4 linear, 1 row: share of read bandwidth"] == (0.3, "missed")
    assert found["NF4 linear, 16 rows: share of the fp32 peak"] == (0.7, "met")
    text = claims.markdown(result() | {"kernels": measured})
    assert "| nf4 linear 576x576, 16 rows | 100 | 1000 (bitsandbytes) | 50% | 70% |" in text
    console = Console(width=100, file=io.StringIO())
    console.print(kernels.table(measured))
    assert "10.0x" in console.file.getvalue()  # type: ignore[attr-defined]


# --- pages ---------------------------------------------------------------------------------------------------------

MACHINE = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "python -m loadtest bench",
    "commit": "abc",
    "cpu": "A CPU",
    "cores": 2,
    "memory_gib": 8.0,
    "vector_extensions": ["avx2"],
    "packages": {"torch": "2"},
}


def test_the_pages_are_rewritten_from_a_result(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    readme, full = tmp_path / "README.md", tmp_path / "docs/performance.md"
    for page in (readme, full):
        page.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    file = tmp_path / "2026-01-02-a.json"
    cell = result(eight__lorakeet=100, eight__peft=8, **{"eight__peft-bf16": 10}) | {
        "kind": "compare",
        "machine": MACHINE,
    }
    cell["cells"]["eight"]["llama"] = {"error": "x"}
    file.write_text(json.dumps(cell))
    (tmp_path / "2025-12-31-b.json").write_text('{"kind": "compare"}')
    (tmp_path / "2026-01-03-c.json").write_text('{"kind": "kernels"}')
    assert pages.newest(tmp_path) == file
    assert pages.rewrite_all(tmp_path, file) == [readme, full]
    for text in (readme.read_text(), full.read_text()):
        assert "old" not in text
        assert text.startswith("before\n")
        assert text.endswith("after\n")
    assert "| **100** |  |  |  | 10 (10.0x) |" in readme.read_text()
    text = full.read_text()
    assert "100.0 (100.0-100.0)" in text
    assert "**vllm**: not measured, not installed" in text
    assert "2026-01-02-a.json" in text
    assert not pages.rewrite_all(tmp_path, file)


def test_a_page_without_the_block_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("nothing")
    with pytest.raises(pages.PageError, match="block"):
        pages.rewrite(page, "block")
    with pytest.raises(pages.PageError, match="no comparison"):
        pages.newest(tmp_path / "empty")
