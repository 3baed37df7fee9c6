"""`python -m tests.ui.screenshots`: pictures of the console's views, from a real run, into docs/console.

It starts a server with the default model, fine-tunes on the example orders, evaluates, chats, and takes each view in
both schemes. `--url` uses a running server, and its files, jobs and adapters from an earlier run. `--check DIRECTORY`
takes every view at three widths instead, for inspection.
"""

import io
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from PIL import Image
from playwright.sync_api import Browser, Page

from tests.ui.browser import Console, chromium

ROOT = Path(__file__).parent.parent.parent
ORDERS = ROOT / "docs/demo/orders"
PICTURES = ROOT / "docs/console"
SCHEMES = ("light", "dark")
WIDTHS = {360: 740, 1280: 800, 2560: 1300}
NAME = "orders"
LINES = {"train": 64, "held_out": 12}  # lines of the shipped files: enough for a curve, in minutes on two cores
QUESTION = "We need six tables in yellow, delivered to Berlin on Tuesday."
SYSTEM = "Write the order as one line."


def main(
    url: Annotated[str | None, typer.Option(help="A server that runs. It gets files, jobs and adapters.")] = None,
    check: Annotated[Path | None, typer.Option(help="Take every view at three widths, into this directory.")] = None,
) -> None:
    if url is not None:
        _take(url, check)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as data:
        command = [
            sys.executable,
            "-c",
            "from server.cli import main; main()",
            "serve",
            "--port",
            str(port),
            "--data-dir",
            data,
        ]
        server = subprocess.Popen(command, cwd=ROOT)
        try:
            _take(f"http://127.0.0.1:{port}", check, server)
        finally:
            server.terminate()
            server.wait()


def _take(url: str, check: Path | None, server: "subprocess.Popen[bytes] | None" = None) -> None:
    with httpx.Client(base_url=url, timeout=600) as client:
        while not _ready(client):
            assert server is None or server.poll() is None, "the server ended"
            time.sleep(1)
        views = _provide(client)
        with chromium() as browser:
            _talk(browser, url, views["playground"])
            for scheme in SCHEMES:
                if check is None:
                    PICTURES.mkdir(parents=True, exist_ok=True)
                    _pictures(browser, url, views, scheme, {1280: 800}, PICTURES)
                else:
                    check.mkdir(parents=True, exist_ok=True)
                    _pictures(browser, url, views, scheme, WIDTHS, check)


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def _provide(client: httpx.Client) -> dict[str, str]:
    """Create data, two fine-tunes, mixes and an evaluation, and return the addresses of the views that show them."""
    base = client.get("/v1/models?limit=1").json()["data"][0]["id"]
    jobs = client.get("/v1/fine_tuning/jobs").json()["data"]
    if not jobs:
        files = {name: _upload(client, ORDERS / f"{name}.jsonl", lines) for name, lines in LINES.items()}
        for rank in (4, 16):
            body = {
                "model": base,
                "training_file": files["train"],
                "validation_file": files["held_out"],
                "suffix": NAME,
                "metadata": {"name": f"{NAME}, rank {rank}"},
                "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}}},
                "lora": {"r": rank, "lora_alpha": 2 * rank},
                "training": {"checkpoint_every": 8},
            }
            client.post("/v1/fine_tuning/jobs", json=body).raise_for_status()
        jobs = client.get("/v1/fine_tuning/jobs").json()["data"]
    tuned = [_checkpoint(client, job["id"]) for job in jobs]
    for name, weights in (("orders/soft", (0.5, 0.5)), ("orders/strong", (1.0, 0.4)), ("orders/soft", (0.4, 0.6))):
        mix = [{"adapter": model, "weight": weight} for model, weight in zip(tuned, weights, strict=False)]
        client.post("/v1/adapters", json={"name": name, "mix": mix, "method": "svd"}).raise_for_status()
    client.post(f"/v1/adapters/{tuned[0]}/pin").raise_for_status()
    evaluations = client.get("/v1/evaluations").json()["data"]
    if not evaluations:
        held_out = jobs[0]["validation_file"]
        for model in tuned:
            body = {"model": model, "file": held_out, "max_examples": 8}
            made = client.post("/v1/evaluations", json=body).raise_for_status().json()
            evaluations.insert(0, _over(client, "/v1/evaluations", made))
    return {
        "adapters": "adapters/orders%2Fsoft",
        "playground": f"playground?m={base}&m={tuned[0]}&max_tokens=24&temperature=0&logprobs=1&system={SYSTEM}",
        "finetune": f"finetune/{jobs[0]['id']}",
        "evaluations": f"evaluations/{evaluations[0]['id']}",
        "server": "server",
    }


def _upload(client: httpx.Client, path: Path, lines: int) -> str:
    content = b"".join(path.read_bytes().splitlines(keepends=True)[:lines])
    answer = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (path.name, content)})
    return str(answer.raise_for_status().json()["id"])


def _checkpoint(client: httpx.Client, job: str) -> str:
    """The newest adapter of a job, which may still be running, so that its curve is shown growing."""
    while not (made := client.get(f"/v1/fine_tuning/jobs/{job}/checkpoints").json()["data"]):
        time.sleep(1)
    return str(made[0]["fine_tuned_model_checkpoint"])


def _over(client: httpx.Client, path: str, made: dict[str, Any]) -> dict[str, Any]:
    """Wait until a created object has succeeded, and return it."""
    while made["status"] != "succeeded":
        assert made["status"] not in ("failed", "cancelled"), made["error"]
        time.sleep(1)
        made = client.get(f"{path}/{made['id']}").json()
    return made


def _talk(browser: Browser, url: str, view: str) -> None:
    """Store a conversation for the pictures. It belongs to the tab, so its storage is copied to later ones."""
    console = Console(browser, url)
    page = console.open(view)
    page.get_by_role("textbox", name="Prompt", exact=True).fill(QUESTION)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").wait_for()
    page.get_by_role("button", name="Send").wait_for(timeout=60_000)
    TALK.update(page.evaluate("({ ...sessionStorage })"))
    console.close()


TALK: dict[str, str] = {}


def _pictures(
    browser: Browser, url: str, views: dict[str, str], scheme: str, sizes: dict[int, int], directory: Path
) -> None:
    for width, height in sizes.items():
        console = Console(browser, url, color_scheme=scheme, viewport={"width": width, "height": height})
        for name, value in TALK.items():
            console.context.add_init_script(f"sessionStorage.setItem({name!r}, {value!r})")
        for name, view in views.items():
            page = console.open(view)
            page.wait_for_timeout(1500)
            _save(page, directory / (f"{name}-{scheme}.png" if len(sizes) == 1 else f"{name}-{width}-{scheme}.png"))
        console.close()


def _save(page: Page, path: Path) -> None:
    """Save a picture with a palette, since it has few colours."""
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    typer.run(main)
