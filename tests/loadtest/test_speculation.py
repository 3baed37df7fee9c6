"""Runs with and without drafts compared, at the scale of a test and with an engine that only reports drafts."""

from pathlib import Path

from loadtest.speculation import ALONE, PROSE, TOGETHER, Cell, passages, run, summary, table, tasks
from server.messages.protocol import Generate
from tests.support.scripted import TEXT, encode, serving


def test_the_documentation_has_enough_prose() -> None:
    prose = passages(PROSE.read_text("utf-8"))
    assert len(prose) >= TOGETHER
    assert not any(mark in passage for passage in prose for mark in ("```", "<!--", "| ", "**"))
    assert {len(task.bodies) for task in tasks(prose)} == {TOGETHER}


async def test_every_task_runs_with_drafts_and_without(tmp_path: Path) -> None:
    async with serving(tmp_path, served_model_name="base") as served:
        served.engine.drafted = (2, 1)
        [quote, *_] = tasks([f"{TEXT} {i}" for i in range(TOGETHER)])
        lines: list[str] = []
        cells = await run(served.client, [quote], rounds=2, report=lines.append)
        asked = [
            request.sampling.speculative_tokens for request in served.engine.requests if request.sampling.max_tokens > 1
        ]
        assert asked.count(0) == asked.count(8) == len(asked) / 2
        assert len(lines) == 2 * (ALONE + 1)
        result = summary(cells)
        assert [row["at_once"] for row in result["rows"]] == [1, TOGETHER]
        assert all(row["accepted"] * 2 == row["drafted"] > 0 for row in result["rows"])
        assert result["verdicts"][0]["holds"]
        assert table(result).row_count == 2


async def test_a_text_that_changes_is_told(tmp_path: Path) -> None:
    def reply(request: Generate) -> list[int]:
        return encode(" quick" if request.sampling.speculative_tokens else " brown")

    async with serving(tmp_path, served_model_name="base") as served:
        served.engine.reply = reply
        cells = await run(served.client, tasks([TEXT] * TOGETHER)[:1], rounds=1, report=lambda line: None)
    assert not summary(cells)["verdicts"][0]["holds"]


def test_a_text_that_gets_slower_is_told() -> None:
    rates = {False: [10.0, 20.0, 30.0], True: [9.0, 18.0, 60.0]}
    result = summary({"story": [Cell(rates), Cell({False: [1.0], True: [2.0]})]})
    assert [row["gain"] for row in result["rows"]] == [0.9, 2.0]
    assert [verdict["holds"] for verdict in result["verdicts"]] == [True, False]
