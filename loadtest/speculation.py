"""The gain of drafts by prompt lookup on texts that repeat their prompt, and the cost on other texts.

One server; the same requests are sent without and with drafts directly after one another, alone and eight at once, and
compared in pairs. Answers end at their stop tokens, and must be equal both times. Prompts are in the prefix cache, so
the time is that of decoding, over HTTP.
"""

import asyncio
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.table import Table

from loadtest.peers.base import Kit
from loadtest.peers.lorakeet import Lorakeet

DRAFTS = 8
TOKENS = 64  # of an answer, at most
ALONE, TOGETHER = 4, 8  # number of requests one after the other, and at once
MAX_SLOWDOWN = 0.05
PROSE = Path(__file__).parents[1] / "docs/guides/adapters.md"  # texts to quote, edit and summarise
TOPICS = (
    *("a lighthouse", "two rival bakers", "the last train", "a lost letter"),
    *("winter in Oslo", "a clockmaker", "an honest thief", "the deep sea"),
)

Report = Callable[[str], None]
Body = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Requests of one kind."""

    name: str
    bodies: Sequence[Body]


@dataclass
class Cell:
    """One task, alone or at once, without and with drafts."""

    rates: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})  # output tokens/s, in pairs
    accepted: int = 0
    drafted: int = 0
    equal: bool = True

    @property
    def gain(self) -> float:
        """Speed with drafts as a multiple of speed without: the median over pairs."""
        return statistics.median(on / off for off, on in zip(self.rates[False], self.rates[True], strict=True))


def passages(text: str) -> list[str]:
    """Return a Markdown file's paragraphs of prose of 250 to 900 characters."""
    blocks = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL).split("\n\n")
    prose = (
        " ".join(block.replace("**", "").split()) for block in blocks if block.strip()[:1] not in ("|", "#", "!", "-")
    )
    return [block for block in prose if 250 <= len(block) <= 900]


def tasks(prose: Sequence[str]) -> list[Task]:
    """Return four tasks, from the most repetitive to the least."""

    def about(words: str) -> list[Body]:
        return [_body(f"{words}\n\n{passage}") for passage in prose[:TOGETHER]]

    stories = [_body(f"Tell me a story about {topic}.") | {"temperature": 1.0, "seed": 1} for topic in TOPICS]
    return [
        Task("quote", about("Repeat the following text word for word.")),
        Task(
            "edit", about("Write the following text once more, with every full stop replaced by an exclamation mark.")
        ),
        Task("summarise", about("Summarise the following text in three sentences.")),
        Task("story", stories),
    ]


def _body(words: str) -> Body:
    message = {"role": "user", "content": words}
    return {"model": "base", "messages": [message], "max_tokens": TOKENS, "temperature": 0.0}


async def measure(kit: Kit, *, rounds: int, report: Report) -> dict[str, Any]:
    """Run all measurements on a server of their own; return JSON values."""
    chosen = tasks(passages(PROSE.read_text("utf-8")))
    side = Lorakeet(upload=False)
    try:
        await side.start(kit)
        async with httpx.AsyncClient(base_url=side.url, timeout=300) as http:
            cells = await run(http, chosen, rounds=rounds, report=report)
    finally:
        await side.stop()
    return summary(cells)


async def run(http: httpx.AsyncClient, chosen: Sequence[Task], *, rounds: int, report: Report) -> dict[str, list[Cell]]:
    """Run all tasks; return task -> its cells, alone and at once."""
    cells = {task.name: [Cell(), Cell()] for task in chosen}
    for task in chosen:
        for body in task.bodies:
            await _ask(http, body | {"max_tokens": 1})  # puts it into the prefix cache
    for index in range(rounds):
        for task in chosen:
            for at_once, cell in zip((1, TOGETHER), cells[task.name], strict=True):
                bodies = task.bodies[: ALONE if at_once == 1 else TOGETHER]
                for start in range(0, len(bodies), at_once):
                    first = (index + start) % 2 == 0
                    await _pair(http, bodies[start : start + at_once], cell, first=first)
                    rates = f"{cell.rates[False][-1]:.1f} tokens/s without, {cell.rates[True][-1]:.1f} with"
                    report(f"round {index + 1}/{rounds}  {task.name}, {at_once} at once: {rates}")
    return cells


async def _pair(http: httpx.AsyncClient, bodies: Sequence[Body], cell: Cell, *, first: bool) -> None:
    """Run the same burst twice. `first`: whether it drafts the first or the second time."""
    texts = [await _burst(http, bodies, cell, drafting=drafting) for drafting in (first, not first)]
    cell.equal &= texts[0] == texts[1]


async def _burst(http: httpx.AsyncClient, bodies: Sequence[Body], cell: Cell, *, drafting: bool) -> list[str]:
    """Send all bodies at once; return the answers' texts."""
    more = {"speculative_tokens": DRAFTS if drafting else 0}
    begin = time.perf_counter()
    answers = await asyncio.gather(*(_ask(http, body | more) for body in bodies))
    seconds = time.perf_counter() - begin
    cell.rates[drafting].append(sum(answer["usage"]["completion_tokens"] for answer in answers) / seconds)
    for answer in answers:
        details = answer["usage"].get("completion_tokens_details", {})
        accepted = details.get("accepted_prediction_tokens", 0)
        cell.accepted += accepted
        cell.drafted += accepted + details.get("rejected_prediction_tokens", 0)
    return [answer["choices"][0]["message"]["content"] for answer in answers]


async def _ask(http: httpx.AsyncClient, body: Body) -> Any:
    answer = await http.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    return answer.json()


def summary(cells: dict[str, list[Cell]]) -> dict[str, Any]:
    """Return figures and verdicts."""
    rows = [
        {
            "task": name,
            "at_once": at_once,
            "without": statistics.median(cell.rates[False]),
            "with": statistics.median(cell.rates[True]),
            "gain": cell.gain,
            "drafted": cell.drafted,
            "accepted": cell.accepted,
            "raw": {"without": cell.rates[False], "with": cell.rates[True]},
        }
        for name, pair in cells.items()
        for at_once, cell in zip((1, TOGETHER), pair, strict=True)
    ]
    measured = [cell for pair in cells.values() for cell in pair]
    least, equal = min(cell.gain for cell in measured), all(cell.equal for cell in measured)
    return {
        "speculative_tokens": DRAFTS,
        "tokens": TOKENS,
        "rows": rows,
        "verdicts": [
            {"claim": "the same text without drafts and with them", "value": equal, "holds": equal},
            {
                "claim": f"no kind of text is more than {MAX_SLOWDOWN:.0%} slower",
                "value": round(least, 3),
                "holds": least >= 1 - MAX_SLOWDOWN,
            },
        ],
    }


def table(result: dict[str, Any]) -> Table:
    """Return the result as a table for the terminal."""
    shown = Table("", "at once", "without", "with drafts", "", "accepted", title="Output tokens/s, medians")
    for row in result["rows"]:
        share = f"{row['accepted']} of {row['drafted']}"
        speeds = f"{row['without']:.1f}", f"{row['with']:.1f}", f"{row['gain']:.2f}x"
        shown.add_row(row["task"], str(row["at_once"]), *speeds, share)
    return shown
