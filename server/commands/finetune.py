"""`lorakeet finetune`, `jobs` and `eval`: training on a running server, watched from the terminal."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from server.commands.listing import AsJson, show_json, show_rows
from server.commands.remote import (
    DEFAULT_URL,
    ApiKey,
    CommandError,
    Url,
    base_name,
    checked,
    connect,
    get_json,
)

JOBS = "/v1/fine_tuning/jobs"
_FINAL_STATUSES = ("succeeded", "failed", "cancelled")
_POLL_SECONDS = 0.5
_INTERRUPTED = 130  # a shell's status for a command ended by Ctrl-C

Data = Annotated[
    Path, typer.Argument(metavar="DATA.jsonl", help="One example per line: messages, prompt and completion, or text.")
]


def finetune(
    data: Data,
    name: Annotated[str, typer.Option("--name", help="Becomes part of the result's name, ft:BASE:NAME:ID.")],
    model: Annotated[str | None, typer.Option("--model", help="An adapter to continue; by default the base.")] = None,
    validation: Annotated[Path | None, typer.Option("--validation", help="Held-out examples, as DATA.")] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the data [default: 3].")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Examples per step.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="The peak [default: by the base].")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="The adapter's r [default: 16].")] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="Its lora_alpha [default: 2 r].")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Same seed, same result.")] = None,
    watch: Annotated[bool, typer.Option("--watch/--no-watch", help="Stay and show progress.")] = True,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Train a new adapter on the server's resident base, while it serves. Prints the adapter's name."""
    with connect(url, api_key) as client:
        files = {"training_file": _upload(client, data)}
        if validation is not None:
            files["validation_file"] = _upload(client, validation)
        given = {"n_epochs": epochs, "batch_size": batch_size}
        lora = {"r": rank, "lora_alpha": alpha if alpha is not None or rank is None else 2 * rank}
        body = {
            "model": model or base_name(client),
            "suffix": name,
            "seed": seed,
            **files,
            "method": {"type": "supervised", "supervised": {"hyperparameters": _without_none(given)}},
            "lora": _without_none(lora) or None,
            "training": _without_none({"learning_rate": learning_rate}) or None,
        }
        job = checked(client.post(JOBS, json=_without_none(body))).json()
        if not watch:
            print(job["id"])
            return
        try:
            job = _watch(client, job)
        except KeyboardInterrupt:
            command = f"lorakeet jobs {job['id']}" + ("" if url == DEFAULT_URL else f" --url {url}")
            Console(stderr=True, highlight=False, soft_wrap=True).print(
                f"The job continues. `{command}` shows its log, `{command} --cancel` ends it."
            )
            raise typer.Exit(_INTERRUPTED) from None
    if job["status"] != "succeeded":
        reason = (job["error"] or {}).get("message", "")
        raise CommandError(f"job {job['id']} {job['status']}" + (f": {reason}" if reason else ""))
    print(job["fine_tuned_model"])


def jobs(
    job_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="Show this job's log.")] = None,
    cancel: Annotated[bool, typer.Option("--cancel", help="Cancel it.")] = False,
    pause: Annotated[bool, typer.Option("--pause", help="Stop after the current step, saving it.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue it.")] = False,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Show the fine-tuning jobs, newest first, or one job's log; steer one."""
    verbs = [verb for verb, wanted in (("cancel", cancel), ("pause", pause), ("resume", resume)) if wanted]
    if len(verbs) > 1 or (verbs and job_id is None):
        raise CommandError("give an ID and one of --cancel, --pause and --resume")
    with connect(url, api_key) as client:
        if job_id is None:
            found = _all_jobs(client)
            if as_json:
                show_json(found)
            else:
                _list(found)
        elif verbs:
            job = checked(client.post(f"{JOBS}/{job_id}/{verbs[0]}")).json()
            print(f"{job['id']} is {job['status']}")
        else:
            events = get_json(client, f"{JOBS}/{job_id}/events?limit=1000")["data"]
            if as_json:
                show_json(events)
                return
            for event in reversed(events):
                when = time.strftime("%H:%M:%S", time.localtime(event["created_at"]))
                print(f"{when} {event['message']}")


def evaluate(
    data: Data,
    adapter: Annotated[str, typer.Option("--adapter", help="The adapter's name.")],
    examples: Annotated[int | None, typer.Option("--examples", help="Use only this many, from the first.")] = None,
    as_json: AsJson = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Compare an adapter with the base on held-out examples: loss, perplexity, exact match."""
    with connect(url, api_key) as client, _progress(SpinnerColumn(), TextColumn("{task.description}")) as progress:
        progress.add_task(f"Evaluating {adapter}")
        body = {"model": adapter, "file": _upload(client, data), "max_examples": examples}
        found = checked(client.post("/v1/evaluations", json=_without_none(body))).json()
        while found["status"] == "running":
            time.sleep(_POLL_SECONDS)
            found = get_json(client, f"/v1/evaluations/{found['id']}")
    if found["status"] != "succeeded":
        raise CommandError(f"the evaluation failed: {found['error']['message']}")
    if as_json:
        show_json(found)
        return
    rows = []
    for label, score in (("base", found["results"]["base"]), (adapter, found["results"]["adapter"])):
        if score is not None:
            exact = "-" if score["exact_match"] is None else f"{score['exact_match']:.1%}"
            rows.append((label, f"{score['loss']:.4f}", f"{score['perplexity']:.2f}", exact))
    numbers = ("LOSS", "PERPLEXITY", "EXACT MATCH")
    show_rows((f"{found['examples']} examples, {found['tokens']} tokens", *numbers), rows, right=numbers)


def _upload(client: httpx.Client, path: Path) -> str:
    if not path.is_file():
        raise CommandError(f"{path}: no such file")
    with path.open("rb") as file:
        response = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (path.name, file)})
    return str(checked(response).json()["id"])


def _watch(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    """Show a job's events as a progress bar until it ends; return the ended job. Continues when a stream ends early."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    last = None
    with _progress(*columns) as progress:
        bar = progress.add_task("Waiting", total=None, loss="-", speed=0.0)
        start: tuple[float, int] | None = None  # time of the first step seen, and the tokens up to it
        while (job := get_json(client, f"{JOBS}/{job['id']}"))["status"] not in _FINAL_STATUSES:
            headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
            with client.stream("GET", f"{JOBS}/{job['id']}/events", headers=headers) as response:
                for line in checked(response).iter_lines():
                    field, _, value = line.partition(": ")
                    if field == "id":
                        last = value
                    if field != "data" or value == "[DONE]":
                        continue
                    event = json.loads(value)
                    if (step := event["data"]) is None:
                        progress.console.print(event["message"], highlight=False, markup=False)
                        continue
                    start = start or (time.monotonic(), step["trained_tokens"])
                    seconds = time.monotonic() - start[0]
                    progress.update(
                        bar,
                        description="Training",
                        completed=step["step"],
                        total=step["total_steps"],
                        loss=f"{step['train_loss']:.3f}" if step.get("train_loss") is not None else "-",
                        speed=(step["trained_tokens"] - start[1]) / seconds if seconds else 0.0,
                    )
    return job


def _all_jobs(client: httpx.Client) -> list[dict[str, Any]]:
    """Every job, newest first."""
    found: list[dict[str, Any]] = []
    more = True
    while more:
        after = f"&after={found[-1]['id']}" if found else ""
        page = get_json(client, f"{JOBS}?limit=100{after}")
        found, more = found + page["data"], page["has_more"]
    return found


def _list(found: list[dict[str, Any]]) -> None:
    if not found:
        print("No jobs yet; `lorakeet finetune DATA.jsonl --name NAME` starts one.")
        return
    rows = []
    for job in found:
        step = f"{job['step']}/{job['total_steps']}" if job["total_steps"] else "-"
        rows.append((job["id"], job["status"], step, job["model"], job["fine_tuned_model"] or "-"))
    show_rows(("ID", "STATUS", "STEP", "MODEL", "RESULT"), rows)


def _progress(*columns: Any) -> Progress:
    """A progress bar on standard error, on a terminal only, removed when done."""
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
