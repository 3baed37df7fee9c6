"""The README says what the code says. `make readme` rewrites its generated tables."""

import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.routing import Route

from adapters.peft_format.config import FIELDS
from server.finetune.metrics import TrainingMetrics
from server.metrics import PREFIX, Metrics
from server.settings import settings_table

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _adapter_fields() -> str:
    rows = [f"| `{name}` | {field.effect} | {_cell(field.note)} |" for name, field in FIELDS.items()]
    return "\n".join(["| Field | | |", "|---|---|---|", *rows]) + "\n"


def _metrics() -> str:
    metrics = Metrics()
    TrainingMetrics(metrics.registry).jobs({"running": 0})
    rows = []
    for metric in metrics.registry.collect():
        if metric.name.startswith(PREFIX):
            name = metric.name + ("_total" if metric.type == "counter" else "")
            rows.append(f"| `{name}` | {metric.type} | {_cell(metric.documentation)} |")
    return "\n".join(["| Name | Type | Meaning |", "|---|---|---|", *sorted(rows)]) + "\n"


@pytest.mark.parametrize(
    ("block", "generate"),
    [("settings", settings_table), ("metrics", _metrics), ("adapter fields", _adapter_fields)],
)
def test_generated_tables_are_current(block: str, generate: Callable[[], str]) -> None:
    begin, end = f"<!-- {block}: begin -->\n", f"<!-- {block}: end -->"
    text = README.read_text(encoding="utf-8")
    head, found, rest = text.partition(begin)
    old, closed, tail = rest.partition(end)
    assert found
    assert closed
    if os.environ.get("UPDATE_README"):
        README.write_text(head + begin + generate() + end + tail, encoding="utf-8")
    else:
        assert old == generate(), "run: make readme"


def test_every_endpoint_is_in_the_table() -> None:
    routes = []
    for path in (ROOT / "server/http/routes").glob("*.py"):
        routes += getattr(importlib.import_module(f"server.http.routes.{path.stem}"), "routes", [])
    assert len(routes) > 10
    served = {
        f"{method} {route.path.replace(':path', '')}"
        for route in routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    written = set(re.findall(r"`((?:GET|POST|DELETE|PUT|PATCH) [^`]+)`", README.read_text(encoding="utf-8")))
    assert served == written


def test_every_command_and_target_exists() -> None:
    text = README.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?<![\w-])make ([a-z-]+)(?=[ `\n])", text)) <= targets
    cli = importlib.import_module("server.cli")
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert commands == set(re.findall(r"`lorakeet ([a-z]+)", text)) - {"serve-"}


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target
