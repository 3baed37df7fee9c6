"""The documentation agrees with the code, and its links resolve. `make docs` rewrites generated tables."""

import importlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.peft_format.fields import FIELDS
from loadtest import pages
from server.batches.metrics import BatchMetrics
from server.finetune.metrics import TrainingMetrics
from server.http.operations import Operation
from server.metrics import PREFIX, Metrics
from server.setting_table import settings_table
from server.settings import settings_fields

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
REFERENCE = ROOT / "docs/reference"
# Flags in the guides other than settings of `lorakeet serve`.
OTHER_FLAGS = {"--url", "--help", "--cancel", "--pause", "--resume", "--json", "--max-tokens"}
OTHER_FLAGS |= {"--role", "--tenant", "--days", "--limit"}  # of `lorakeet keys` and `tenants`
OTHER_FLAGS |= {"--build-arg", "--target", "--gpus"}  # of `docker`
OTHER_FLAGS |= {"--restore", "--remove", "--verify", "--all"}  # of `lorakeet doctor`
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _adapter_fields() -> str:
    rows = [f"| `{name}` | {field.effect} | {_cell(field.note)} |" for name, field in FIELDS.items()]
    return "\n".join(["| Field | | |", "|---|---|---|", *rows]) + "\n"


def _metrics() -> str:
    metrics = Metrics()
    TrainingMetrics(metrics.registry)
    BatchMetrics(metrics.registry)
    rows = []
    for metric in metrics.registry.collect():
        if metric.name.startswith(PREFIX):
            name = metric.name + ("_total" if metric.type == "counter" else "")
            rows.append(f"| `{name}` | {metric.type} | {_cell(metric.documentation)} |")
    return "\n".join(["| Name | Type | Meaning |", "|---|---|---|", *sorted(rows)]) + "\n"


def _clients() -> str:
    found: list[tuple[str, str, str]] = []
    for file in sorted((ROOT / "tests/clients").glob("*/requirements.txt")):
        pins = re.findall(r"^([^#\s=]+)==(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        found += [(name, version, file.parent.name) for name, version in pins if not name.startswith("pytest")]
    for file in sorted((ROOT / "tests/clients").glob("*/package.json")):
        pins = json.loads(file.read_text(encoding="utf-8"))["dependencies"].items()
        found += [(name, version, file.parent.name) for name, version in pins]
    rows = [f"| `{name}` | {version} | {home} |" for name, version, home in sorted(found)]
    return "\n".join(["| Package | Version | Environment |", "|---|---|---|", *rows]) + "\n"


@pytest.mark.parametrize(
    ("page", "block", "generate"),
    [
        ("clients.md", "clients", _clients),
        ("settings.md", "settings", settings_table),
        ("metrics.md", "metrics", _metrics),
        ("adapter-fields.md", "adapter fields", _adapter_fields),
    ],
)
def test_generated_tables_are_current(page: str, block: str, generate: Callable[[], str]) -> None:
    begin, end = f"<!-- {block}: begin -->\n", f"<!-- {block}: end -->"
    file = REFERENCE / page
    head, found, rest = file.read_text(encoding="utf-8").partition(begin)
    old, closed, tail = rest.partition(end)
    assert found
    assert closed
    if os.environ.get("UPDATE_DOCS"):
        file.write_text(head + begin + generate() + end + tail, encoding="utf-8")
    else:
        assert old == generate(), "run: make docs"


def test_figures_are_those_of_the_newest_comparison() -> None:
    file = pages.newest(pages.results_folder())
    result = json.loads(file.read_text("utf-8"))
    assert f"\n{pages.summary(result)}\n" in README.read_text("utf-8"), "run: make docs"
    assert f"\n{pages.section(result, file.name)}\n" in (ROOT / "docs/performance.md").read_text("utf-8")


def test_every_endpoint_is_in_the_table() -> None:
    routes: list[object] = []
    for path in (ROOT / "server/http/routes").glob("*.py"):
        routes += getattr(importlib.import_module(f"server.http.routes.{path.stem}"), "routes", [])
    assert len(routes) > 10
    served = {
        f"{method} {route.path.replace(':path', '')}"
        for route in routes
        if isinstance(route, Operation)
        for method in (route.methods or set()) - {"HEAD"}
    }
    page = (REFERENCE / "http-api.md").read_text(encoding="utf-8")
    assert served == set(re.findall(r"`((?:GET|POST|DELETE|PUT|PATCH) [^`]+)`", page))
    for path in re.findall(r"`(/[a-z_0-9/]+)`", README.read_text(encoding="utf-8").partition("## API")[2]):
        assert any(endpoint.endswith(f" {path}") for endpoint in served), path


def test_every_command_target_and_flag_exists() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "CHANGELOG.md")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    cli = importlib.import_module("server.cli")
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    commands |= {group.typer_instance.info.name for group in cli.app.registered_groups}
    assert commands == set(re.findall(r"`(?:.venv/bin/)?lorakeet ([a-z]+)", text))
    for page in (ROOT / "docs/guides").glob("*.md"):
        flags = {declared for row in settings_fields() for both in row.declarations for declared in both.split("/")}
        named = set(re.findall(r"`(--[a-z-]+)", page.read_text(encoding="utf-8")))
        assert named <= flags | OTHER_FLAGS, page


def _anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(_anchor, headings), link


def test_every_page_is_found_from_the_readme() -> None:
    found = [README]
    for page in found:
        links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
        targets = {(page.parent / link).resolve() for link in links}
        found += [target for target in sorted(targets) if target.suffix == ".md" and target not in found]
    assert set(PAGES) <= set(found)


def test_the_readme_stays_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_examples_stream_and_have_a_limit() -> None:
    """Otherwise an example may generate thousands of tokens, and show nothing until the end."""
    programs = list((ROOT / "examples").glob("*.py"))
    found = 0
    for path in (*PAGES, *programs):
        text = path.read_text(encoding="utf-8")
        bodies = re.findall(r"-d '({[^']*})'", text) + re.findall(r"completions\.create\((?:[^()]|\([^()]*\))*\)", text)
        for body in bodies:
            if re.search(r"messages|prompt", body):
                found += 1
                assert "max_tokens" in body, (path.name, body)
                assert path in programs or "stream" in body, (path.name, body)
    assert found > 5


def test_tests_and_files_named_by_the_architecture_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 10
    assert named <= set(re.findall(r"def (test_\w+)", tests)), named - set(re.findall(r"def (test_\w+)", tests))
    for path in re.findall(r"`((?:server|adapters|loadtest|tests|docs)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path
