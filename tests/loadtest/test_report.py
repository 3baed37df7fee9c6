"""Tables, JSON and the HTML page of a run."""

import json
from html.parser import HTMLParser
from pathlib import Path

from rich.console import Console

from loadtest import machine, report, scenario
from loadtest.client import Timeline


def point(rate: float, adapters: int, error: str | None = None) -> report.Point:
    timelines = [
        Timeline(0.0, 0.0, 3, f"a{i}", [(0.5, 1), (0.7, 2), (1.0 + i, 3)], 4, 3, finished=1.0 + i)
        for i in range(adapters)
    ]
    timelines.append(Timeline(0.0, 0.1, 3, finished=0.2, error=error or "gone"))
    spec = scenario.Scenario(
        name="A <test>",
        load=scenario.Open(rate=rate, requests=adapters),
        lengths=scenario.Fixed(prompt=4, output=3),
        slo=scenario.Slo(e2e=1.5),
    )
    return report.Point.of(spec, timelines, client_cpu=0.01)


def test_json_holds_scenario_summary_and_latencies(tmp_path: Path) -> None:
    points = [point(1.0, 2)]
    report.write_json(tmp_path / "deep" / "r.json", report.as_json(points, machine.describe(["x"])))
    read = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert read["points"][0]["summary"]["errors"] == 1
    assert read["points"][0]["summary"]["goodput"] == 0.5  # one of two within 1.5 s, in 2 s
    assert read["points"][0]["latencies"]["E2E"] == [1.0, 2.0]
    assert read["points"][0]["scenario"]["load"] == {"kind": "open", "rate": 1.0, "requests": 2, "burstiness": 1.0}
    assert read["machine"]["cores"] >= 1
    assert read["machine"]["command"] == "x"


def test_table() -> None:
    console = Console(width=120, record=True, quiet=True)
    console.print(report.table([point(1.0, 2), point(2.0, 3)]))
    lines = dict(line[:2] for line in report.rows([point(1.0, 2)]))
    assert lines["TTFT p50 (ms)"] == "500.0"
    assert lines["Errors"] == "1"
    assert lines["Client CPU (% of one core)"] == "0.5"


def test_html_is_self_contained() -> None:
    page = report.html([point(1.0, 1), point(2.0, 2), point(4.0, 4, error="<b>bad</b>")], machine.describe(["x"]))
    assert page.count("<svg") == 3  # CDFs, throughput against adapters, goodput against rate
    assert "<h1>A &lt;test&gt;</h1>" in page
    assert "&lt;b&gt;bad" in page

    class Links(HTMLParser):
        found: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "img", "iframe")
            self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    links = Links()
    links.feed(page)
    assert all(link.startswith("#") for link in links.found)


def test_a_single_point_has_no_sweep_plots() -> None:
    assert report.html([point(1.0, 2)], machine.describe(["x"])).count("<svg") == 1
