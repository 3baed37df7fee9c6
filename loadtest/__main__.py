"""`python -m loadtest`: the command line over the other modules."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtest import (
    beside,
    capacity,
    cases,
    claims,
    constrained,
    drive,
    fairness,
    kernels,
    loading,
    machine,
    mixture,
    pages,
    registered,
    report,
    speculation,
    synthetic,
    training,
    trees,
)
from loadtest.client import Client, Timeline
from loadtest.compare import compare as run_comparison
from loadtest.peers.base import Kit, SideError
from loadtest.peers.lorakeet import executable, upload_adapter
from loadtest.peers.registry import RECIPES, SIDES
from loadtest.scenario import Closed, Scenario, ScenarioError, load_scenario
from loadtest.workload import plan

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__)
peers_app = typer.Typer(no_args_is_help=True, help="Install the systems to compare with, each in its own environment.")
app.add_typer(peers_app, name="peers")

notes = Console(stderr=True, highlight=False)
RANK = 16


# --- run -----------------------------------------------------------------------------------------------------------


@app.command()
def run(
    scenario: Annotated[Path, typer.Option(help="Scenario file (TOML).")],
    url: Annotated[str, typer.Option(help="The server's address, without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Base model's name [default: the first that is listed].")] = None,
    model_dir: Annotated[
        Path | None, typer.Option(help="Base model's folder; only its config.json is read, to make adapters that fit.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="LORAKEET_API_KEY", help="Sent as a bearer token.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Instead of the scenario's. A server's prefix cache knows a seed's prompts."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for result.json and report.html.")] = None,
) -> None:
    """Drive a running server through a scenario; print a table, write JSON and one HTML page."""
    spec = load_scenario(scenario)
    if seed is not None:
        spec = msgspec.structs.replace(spec, seed=seed)
    points = asyncio.run(_run(spec, url, model, model_dir, api_key))
    Console().print(report.table(points))
    for message, count in (item for point in points for item in point.summary.error_messages.items()):
        notes.print(f"[red]{count} x[/red] {escape(message)}")
    if out is not None:
        circumstances = machine.describe()
        report.write_json(out / "result.json", report.as_json(points, circumstances))
        (out / "report.html").write_text(report.html(points, circumstances), "utf-8")
        notes.print(f"written: {out / 'result.json'}, {out / 'report.html'}")
    if any(point.summary.errors for point in points):
        raise typer.Exit(1)


async def _run(
    spec: Scenario, url: str, model: str | None, model_dir: Path | None, api_key: str | None
) -> list[report.Point]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    client = Client(url, api_key=api_key, timeout=spec.timeout)
    points: list[report.Point] = []
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=120) as http:
        base = model or (await _get(http, "/v1/models"))["data"][0]["id"]
        async with _adapters(http, spec, model_dir) as names:
            with _progress() as progress:
                for point in spec.points():
                    requests = plan(point, names[: point.adapters.count] if point.adapters.count else names)
                    load = point.load
                    pace = f"{load.concurrency} clients" if isinstance(load, Closed) else f"{load.rate:g}/s"
                    bar = progress.add_task(f"{spec.name}: {pace}, {len(names)} adapters", total=len(requests))

                    def on_end(_: Timeline, bar: Any = bar) -> None:
                        progress.advance(bar)

                    done = await drive.drive(
                        client, requests, load, base=base, ignore_eos=point.ignore_eos, on_end=on_end
                    )
                    points.append(report.Point.of(point, done.timelines, done.client_cpu))
    return points


@contextlib.asynccontextmanager
async def _adapters(http: httpx.AsyncClient, spec: Scenario, model_dir: Path | None) -> AsyncIterator[list[str]]:
    """The adapters for the requests, by name; those made for the run are uploaded, and deleted at its end."""
    wanted = max((point.adapters.count for point in spec.points()), default=0)
    if not wanted:
        yield spec.adapters.names
        return
    if model_dir is None:
        raise ScenarioError("the scenario makes adapters: --model-dir must say for which model")
    names: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        made = synthetic.make_adapters(
            Path(folder), model_dir, wanted, rank=spec.adapters.rank, dtype=spec.adapters.dtype, seed=spec.seed
        )
        try:
            for path in made:
                await upload_adapter(http, f"loadtest-{path.name}", path)
                names.append(f"loadtest-{path.name}")
                shutil.rmtree(path)
            yield names
        finally:
            for name in names:
                await http.delete(f"/v1/adapters/{name}")


async def _get(http: httpx.AsyncClient, path: str) -> Any:
    try:
        return (await http.get(path)).raise_for_status().json()
    except httpx.HTTPError as error:
        raise SideError(f"{http.base_url}{path.lstrip('/')}: {error}") from error


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=notes, refresh_per_second=2)  # leaves the cores to the server


# --- compare -------------------------------------------------------------------------------------------------------

ModelDir = Annotated[Path | None, typer.Option(help="Base model's folder [default: what `lorakeet fetch` gives].")]
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds.")]
CellSeconds = Annotated[float, typer.Option(help="A side that needs longer for a case gets fewer rounds.")]
Out = Annotated[Path | None, typer.Option(help="Write PREFIX.json and PREFIX.md.", metavar="PREFIX")]


@app.command()
def compare(
    side: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SIDES)} [default: all].")] = None,
    case: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(cases.NAMES)} [default: all].")] = None,
    model_dir: ModelDir = None,
    rounds: Rounds = 3,
    cell_seconds: CellSeconds = 60.0,
    output_tokens: Annotated[int | None, typer.Option(min=2, help="Instead of each case's own; to try it out.")] = None,
    out: Out = None,
) -> None:
    """Give our server and its peers the same work in interleaved rounds; print medians, spread and verdicts."""
    result = _compare(side, case, model_dir, rounds, cell_seconds, output_tokens)
    _show(result, out)


@app.command("kernels")
def show_kernels(out: Out = None) -> None:
    """Measure each kernel beside its library counterpart and this machine's roofline."""
    measured = kernels.measure()
    Console().print(kernels.table(measured))
    if out is not None:
        report.write_json(out.with_suffix(".json"), {"kind": "kernels", "machine": machine.describe(), **measured})


@app.command("registered")
def show_registered(
    few_url: Annotated[str, typer.Option(help="A server that gets few adapters.")],
    many_url: Annotated[str, typer.Option(help="Another that gets many.")],
    model_dir: Annotated[Path, typer.Option(help="Folder of the base of both; only its config.json is read.")],
    few: Annotated[int, typer.Option(min=1)] = 10,
    many: Annotated[int, typer.Option(min=1)] = 10_000,
    rounds: Annotated[int, typer.Option(min=1, help="Requests to each server.")] = 500,
    out: Annotated[Path | None, typer.Option(help="File for the result, in JSON.")] = None,
) -> None:
    """Compare a server with few adapters and one with many: looking up a model, admitting a request."""
    measured = registered.run(few_url, many_url, model_dir, few=few, many=many, rounds=rounds)
    typer.echo(json.dumps(measured, indent=1))
    if out is not None:
        report.write_json(out, {"kind": "registered", "machine": machine.describe(), **measured})


@app.command("training")
def show_training(
    model_dir: ModelDir = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    out: Out = None,
) -> None:
    """Training compared with PEFT's: speed and peak memory in both memory modes, and two joint jobs with one."""
    threads = len(os.sched_getaffinity(0))
    measured = training.run(model_dir or _default_model(), _cache_dir(), threads=threads, rounds=rounds, steps=1)
    _show_measured("training", measured, training.table(measured), out)


@app.command("mixture")
def show_mixture(rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5, out: Out = None) -> None:
    """Decoding a mixture of experts, compared with transformers and bitsandbytes, and with the memory bandwidth."""
    with tempfile.TemporaryDirectory(prefix="loadtest-") as folder:
        measured = mixture.run(
            Path(folder),
            threads=len(os.sched_getaffinity(0)),
            rounds=rounds,
            report=lambda line: notes.print(escape(line)),
        )
    _show_measured("mixture", measured, mixture.table(measured), out)
    if out is not None:
        out.with_suffix(".md").write_text(mixture.markdown(measured), "utf-8")


@app.command("beside")
def show_beside(
    minutes: Annotated[float, typer.Option(min=0.1, help="Of requests, once without and once with a job.")] = 5.0,
    flag: Annotated[list[str] | None, typer.Option(help="For `lorakeet serve`; repeatable.")] = None,
    model_dir: ModelDir = None,
    out: Out = None,
) -> None:
    """The cost of a fine-tuning job to concurrent requests, and of these to the job."""
    _measure(partial(beside.measure, minutes=minutes, flags=flag or []), beside.table, "beside", model_dir, out)


@app.command("speculation")
def show_speculation(rounds: Rounds = 3, model_dir: ModelDir = None, out: Out = None) -> None:
    """The gain of drafts by prompt lookup on texts that repeat their prompt, and the cost on other texts."""
    _measure(partial(speculation.measure, rounds=rounds), speculation.table, "speculation", model_dir, out)


@app.command("constrained")
def show_constrained(
    rounds: Rounds = 5,
    flag: Annotated[list[str] | None, typer.Option(help="For `lorakeet serve`; repeatable.")] = None,
    model_dir: ModelDir = None,
    out: Out = None,
) -> None:
    """The cost and the gain of answers under a grammar, and the cost of compiling it to other requests."""
    _measure(
        partial(constrained.measure, rounds=rounds, flags=flag or []),
        constrained.table,
        "constrained",
        model_dir,
        out,
        dtypes=("float32",),
    )


@app.command("fairness")
def show_fairness(
    rounds: Rounds = 3,
    seconds: Annotated[float, typer.Option(min=2.0, help="Of each of a round's three parts.")] = 30.0,
    model_dir: ModelDir = None,
    out: Out = None,
) -> None:
    """The cost of a tenant that floods the server to one with a request a second, and the reverse."""
    _measure(partial(fairness.measure, rounds=rounds, seconds=seconds), fairness.table, "fairness", model_dir, out)


@app.command("loading")
def show_loading(
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    every: Annotated[float, typer.Option(min=0.0, help="Seconds from one load to the next.")] = 1.0,
    flag: Annotated[list[str] | None, typer.Option(help="For `lorakeet serve`; repeatable.")] = None,
    model_dir: ModelDir = None,
    out: Out = None,
) -> None:
    """The cost of loading and uploading adapters to concurrent requests; a cold adapter's first token."""
    _measure(
        partial(loading.measure, rounds=rounds, every=every, flags=flag or []),
        loading.table,
        "loading",
        model_dir,
        out,
        dtypes=("float32",),
    )


@app.command("capacity")
def show_capacity(
    comparison: Annotated[Path, typer.Option(help="A result of `bench`, for the speeds.")],
    out: Out = None,
) -> None:
    """The capacity of one GPU, calculated; the throughput of 1 to 64 replicas with 10,000 adapters, simulated."""
    measured = capacity.measure(comparison, capacity.Demand())
    Console().print(capacity.table(measured))
    if out is not None:
        report.write_json(out.with_suffix(".json"), {"kind": "capacity", "machine": machine.describe(), **measured})


@app.command("trees")
def show_trees(
    other: Annotated[Path, typer.Argument(help="Another checkout, such as a git worktree of an older commit.")],
    rounds: Annotated[int, typer.Option(min=1, help="Alternating rounds.")] = 15,
    starts: Annotated[int, typer.Option(min=0, help="Alternating starts of each server.")] = 5,
    model_dir: ModelDir = None,
    out: Out = None,
) -> None:
    """Compare this checkout's server with another checkout's: decode speed and start-up."""
    _measure(
        partial(trees.measure, folder=other, rounds=rounds, starts=starts),
        trees.table,
        "trees",
        model_dir,
        out,
        dtypes=("float32",),
    )


def _measure(
    measure: Callable[..., Coroutine[Any, Any, dict[str, Any]]],
    table: Callable[[dict[str, Any]], Table],
    kind: str,
    model_dir: Path | None,
    out: Path | None,
    dtypes: Sequence[synthetic.Dtype] = synthetic.DTYPES,
) -> None:
    """Run a comparison over servers with eight adapters of each dtype; show its result and write it."""
    with tempfile.TemporaryDirectory(prefix="loadtest-") as folder:
        model, threads = model_dir or _default_model(), len(os.sched_getaffinity(0))
        kit = _kit(Path(folder), model, machine_threads=threads, dtypes=dtypes)
        measured = asyncio.run(measure(kit, report=lambda line: notes.print(escape(line))))
    _show_measured(kind, measured, table(measured), out)


def _show_measured(kind: str, measured: dict[str, Any], shown: Table, out: Path | None) -> None:
    """Print a table and a verdict for each promise, and write the file."""
    Console().print(shown)
    for verdict in measured["verdicts"]:
        typer.echo(f"{'holds' if verdict['holds'] else 'FAILS'}  {verdict['claim']}: {verdict['value']}")
    if out is not None:
        report.write_json(out.with_suffix(".json"), {"kind": kind, "machine": machine.describe(), **measured})


def _cache_dir() -> Path:
    """The server's default folder of quantised bases."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakeet"


@app.command()
def bench(model_dir: ModelDir = None, rounds: Rounds = 3, cell_seconds: CellSeconds = 20.0) -> None:
    """The whole CPU table: kernels, then the comparison with every peer installed; kept under loadtest/results/."""
    measured = kernels.measure()
    Console().print(kernels.table(measured))
    result = _compare(None, None, model_dir, rounds, cell_seconds, None)
    circumstances = result["machine"]
    prefix = pages.results_folder() / f"{circumstances['date'][:10]}-{machine.slug(circumstances)}"
    _show(result | {"kernels": measured}, prefix)


def _compare(
    side_names: list[str] | None,
    case_names: list[str] | None,
    model_dir: Path | None,
    rounds: int,
    cell_seconds: float,
    output_tokens: int | None,
) -> dict[str, Any]:
    for chosen, known in ((side_names, list(SIDES)), (case_names, cases.NAMES)):
        if unknown := [name for name in chosen or [] if name not in known]:
            raise typer.BadParameter(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    circumstances = machine.describe()
    chosen_sides = side_names or cases.default_sides(circumstances)
    chosen_cases = cases.select(case_names or cases.NAMES, output_tokens)
    model = model_dir or _default_model()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="loadtest-") as folder:
        kit = _kit(Path(folder), model, machine_threads=circumstances["cores"])
        result = asyncio.run(
            run_comparison(
                [SIDES[name]() for name in chosen_sides],
                chosen_cases,
                kit,
                rounds=rounds,
                cell_seconds=cell_seconds,
                report=lambda line: notes.print(escape(line)),
            )
        )
    minutes = round((time.monotonic() - start) / 60, 1)
    return {"kind": "compare", "machine": circumstances, "minutes": minutes, **result.to_json()}


def _kit(folder: Path, model: Path, machine_threads: int, dtypes: Sequence[synthetic.Dtype] = synthetic.DTYPES) -> Kit:
    made = {
        (dtype, index): path
        for dtype in dtypes
        for index, path in enumerate(synthetic.make_adapters(folder / "adapters", model, 8, rank=RANK, dtype=dtype))
    }
    return Kit(model=model, adapters=made, rank=RANK, threads=machine_threads, folder=folder)


def _default_model() -> Path:
    done = subprocess.run([str(executable()), "fetch"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SideError("`lorakeet fetch` failed")
    return Path(done.stdout.strip())


def _show(result: dict[str, Any], out: Path | None) -> None:
    text = claims.markdown(result)
    typer.echo(text)
    if out is not None:
        report.write_json(out.with_suffix(".json"), result)
        out.with_suffix(".md").write_text(pages.section(result, f"{out.name}.json"), "utf-8")
        notes.print(f"written: {out}.json, {out}.md")


# --- peers, pages --------------------------------------------------------------------------------------------------


@peers_app.command("list")
def list_peers() -> None:
    """List the sides, and whether each can run here."""
    for name, side in SIDES.items():
        typer.echo(f"{name:16} {side().missing_reason() or 'ready'}")


@peers_app.command("install")
def install_peer(name: Annotated[str, typer.Argument(help=f"One of {', '.join(RECIPES)}.")]) -> None:
    """Install one peer, replacing an existing installation."""
    if name not in RECIPES:
        raise typer.BadParameter(f"one of {', '.join(RECIPES)}")
    with notes.status(f"installing {name}; this takes minutes"):
        RECIPES[name]()
    typer.echo(f"{name}: installed")


@app.command("docs")
def write_docs(
    root: Annotated[Path, typer.Option(help="The checkout to write in.")] = Path(),
    result: Annotated[Path | None, typer.Option(help="A result of `bench` [default: the newest].")] = None,
) -> None:
    """Rewrite the figures in README.md and docs/performance.md from a result file."""
    for page in pages.rewrite_all(root, result or pages.newest(pages.results_folder())):
        typer.echo(f"{page}: rewritten")


def main() -> None:
    """Run the command. Errors that the user can fix are printed in one line, without a traceback."""
    # SIGTERM must stop the started servers, too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        app()
    except (ScenarioError, SideError, pages.PageError, kernels.KernelsError, json.JSONDecodeError) as error:
        notes.print("[red]error:[/red]", escape(str(error)))
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
