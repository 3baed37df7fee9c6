"""Reports of results: JSON files, terminal tables, and one self-contained HTML page with plots."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import msgspec
from rich.table import Table

from loadtest import metrics
from loadtest.client import Timeline
from loadtest.metrics import Spread, Summary
from loadtest.scenario import Open, Scenario


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a scenario: its load, its figures, and the latencies of single requests (seconds)."""

    scenario: Scenario
    summary: Summary
    latencies: dict[str, list[float]]  # "TTFT", "TPOT", "E2E"

    @classmethod
    def of(cls, scenario: Scenario, timelines: Sequence[Timeline], client_cpu: float) -> "Point":
        """Summarise one run under the scenario's SLO."""
        good = [timeline for timeline in timelines if timeline.error is None]
        return cls(
            scenario,
            metrics.summarise(timelines, scenario.slo, client_cpu),
            {
                "TTFT": [metrics.ttft(t) for t in good],
                "TPOT": [value for t in good if (value := metrics.tpot(t)) is not None],
                "E2E": [metrics.e2e(t) for t in good],
            },
        )

    @property
    def label(self) -> str:
        """The values that distinguish this point in a sweep."""
        load = self.scenario.load
        pace = f"{load.rate:g} requests/s" if isinstance(load, Open) else f"{load.concurrency} clients"
        count = self.summary.adapters
        return f"{pace}, {count} adapter{'' if count == 1 else 's'}"


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")


def as_json(points: Sequence[Point], machine: dict[str, Any]) -> dict[str, Any]:
    """Return the result file of `loadtest run`."""
    return {
        "kind": "run",
        "machine": machine,
        "points": [
            {
                "label": point.label,
                "scenario": msgspec.to_builtins(point.scenario),
                "summary": point.summary.to_json(),
                "latencies": point.latencies,
            }
            for point in points
        ],
    }


def _milliseconds(spread: Spread | None, name: str) -> str:
    return "-" if spread is None else f"{getattr(spread, name) * 1e3:.1f}"


def _spread_rows() -> list[tuple[str, Callable[[Summary], str]]]:
    def row(attribute: str, statistic: str) -> Callable[[Summary], str]:
        return lambda summary: _milliseconds(getattr(summary, attribute), statistic)

    return [
        (f"{attribute.upper()} {statistic} (ms)", row(attribute, statistic))
        for attribute in ("ttft", "tpot", "itl", "e2e")
        for statistic in ("mean", "p50", "p90", "p99")
    ]


_ROWS: list[tuple[str, Callable[[Summary], str]]] = [
    ("Requests", lambda s: str(s.requests)),
    ("Errors", lambda s: str(s.errors)),
    ("Duration (s)", lambda s: f"{s.duration:.2f}"),
    ("Prompt tokens", lambda s: str(s.prompt_tokens)),
    ("Output tokens", lambda s: str(s.output_tokens)),
    ("Requests/s", lambda s: f"{s.request_throughput:.2f}"),
    ("Output tokens/s", lambda s: f"{s.output_throughput:.1f}"),
    ("Goodput (requests/s)", lambda s: "-" if s.goodput is None else f"{s.goodput:.2f}"),
    *_spread_rows(),
    ("Lateness p99 (ms)", lambda s: _milliseconds(s.lateness, "p99")),
    ("Client CPU (s)", lambda s: f"{s.client_cpu:.2f}"),
    ("Client CPU (% of one core)", lambda s: f"{100 * s.client_cpu / s.duration:.1f}"),
]


def rows(points: Sequence[Point]) -> list[list[str]]:
    """Return the table's lines: a name, then one value for each point."""
    return [[name, *(show(point.summary) for point in points)] for name, show in _ROWS]


def table(points: Sequence[Point]) -> Table:
    """Return the result as a table for the terminal, one column a point."""
    result = Table("", *(point.label for point in points), title=points[0].scenario.name)
    for column in result.columns[1:]:
        column.justify = "right"
    for line in rows(points):
        result.add_row(*line)
    return result


# --- HTML ----------------------------------------------------------------------------------------------------------

_PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c2330 }
 table { border-collapse: collapse; font-variant-numeric: tabular-nums }
 th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #e3e6ea }
 th:first-child, td:first-child { text-align: left }
 pre { background: #f5f6f8; padding: .8rem; overflow-x: auto } svg { max-width: 100%; height: auto }
</style></head><body>
<h1>{{ title }}</h1>
{% for plot in plots %}{{ plot }}
{% endfor %}
<table><thead><tr><th></th>{% for label in labels %}<th>{{ label }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>
{% if errors %}<h2>Errors</h2><ul>
{% for message, count in errors %}<li>{{ count }} &times; {{ message }}</li>
{% endfor %}</ul>{% endif %}
<h2>Definitions</h2><pre>{{ definitions }}</pre>
<h2>Scenario</h2><pre>{{ scenario }}</pre>
<h2>Machine</h2><pre>{{ machine }}</pre>
</body></html>
""")


def html(points: Sequence[Point], machine: dict[str, Any]) -> str:
    """Return one self-contained page: plots as inline SVG, no scripts, nothing fetched."""

    def pretty(value: Any) -> str:
        return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()

    return _PAGE.render(
        title=points[0].scenario.name,
        plots=[_svg(draw, points) for draw in (_latency_cdfs, _throughput, _goodput)],
        labels=[point.label for point in points],
        rows=rows(points),
        errors=[item for point in points for item in point.summary.error_messages.items()],
        definitions=metrics.__doc__,
        scenario=pretty(points[0].scenario),
        machine=pretty(machine),
    )


def _svg(draw: Callable[[Any, Sequence[Point]], bool], points: Sequence[Point]) -> Any:
    """Draw one figure as SVG; empty if there is nothing to show."""
    from matplotlib.figure import Figure  # late, since importing it takes a second

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    if not draw(figure, points):
        return ""
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    svg = stream.getvalue()
    return markupsafe.Markup(svg[svg.index("<svg") :])  # matplotlib has escaped its labels


def _latency_cdfs(figure: Any, points: Sequence[Point]) -> bool:
    for axes, name in zip(figure.subplots(1, 3), ("TTFT", "TPOT", "E2E"), strict=True):
        for point in points:
            values = sorted(point.latencies[name])
            share = [i / len(values) for i in range(len(values) + 1)]
            axes.step([value * 1e3 for value in values[:1] + values], share, where="post", label=point.label)
        axes.set(title=f"{name}: share of requests within", xlabel="ms", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return True


def _curve(figure: Any, xs: list[float], ys: list[float], xlabel: str, ylabel: str) -> bool:
    if len(set(xs)) < 2:
        return False
    axes = figure.subplots()
    order = sorted(range(len(xs)), key=xs.__getitem__)
    axes.plot([xs[i] for i in order], [ys[i] for i in order], marker="o")
    axes.set(title=f"{ylabel} against {xlabel}", xlabel=xlabel, ylabel=ylabel)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    return True


def _throughput(figure: Any, points: Sequence[Point]) -> bool:
    xs = [float(point.summary.adapters) for point in points]
    return _curve(figure, xs, [point.summary.output_throughput for point in points], "adapters", "output tokens/s")


def _goodput(figure: Any, points: Sequence[Point]) -> bool:
    measured = [
        (point.scenario.load.rate, point.summary.goodput)
        for point in points
        if isinstance(point.scenario.load, Open) and point.summary.goodput is not None
    ]
    xs, ys = [rate for rate, _ in measured], [goodput for _, goodput in measured]
    return _curve(figure, xs, ys, "request rate (1/s)", "goodput (requests/s)")
