"""The whole story in a few minutes on two cores: serve, upload, fine-tune on the resident base, compare.

    make demo
    make demo ARGS="--model gemma-3-270m"     flags of `lorakeet serve`

Starts a server of its own on a free port with an empty data directory, trains on `orders/train.jsonl` through the
command line, and measures base and adapter on `orders/held_out.jsonl`. Ends with status 1 if the adapter did not learn.
"""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
TRAINING, HELD_OUT = HERE / "orders/train.jsonl", HERE / "orders/held_out.jsonl"
LORAKEET = [sys.executable, "-c", "from server.cli import main; main()"]
START_SECONDS = 900  # a first start fetches and quantises the model
SHOWN = 6
AT_MOST_BEFORE, AT_LEAST_AFTER = 0.1, 0.6  # exact match on the held-out orders

console = Console(highlight=False)


@contextlib.contextmanager
def server(data_dir: Path) -> Iterator[str]:
    """The URL of a fresh server, with the command line's flags."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = data_dir / "server.log"
    command = [*LORAKEET, "serve", "--port", str(port), "--data-dir", str(data_dir / "data"), *sys.argv[1:]]
    with log.open("wb") as sink:
        process = subprocess.Popen(command, cwd=HERE.parent.parent, stdout=sink, stderr=sink)
    try:
        _wait_ready(url, process, log)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def _wait_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')[-2000:]}")


def fine_tune(url: str, training: Path, name: str, *, batch_size: int = 8, learning_rate: float = 0.0015) -> str:
    """Train with the command line, progress bar and all; the adapter's name."""
    arguments = ["finetune", str(training), "--name", name, "--epochs", "1", "--batch-size", str(batch_size)]
    options = ["--learning-rate", str(learning_rate), "--seed", "1", "--url", url]
    done = subprocess.run([*LORAKEET, *arguments, *options], cwd=HERE.parent.parent, stdout=subprocess.PIPE, check=True)
    return done.stdout.decode().split()[-1]


def evaluate(client: httpx.Client, name: str) -> dict[str, Any]:
    """Base and adapter on the held-out orders."""
    with HELD_OUT.open("rb") as file:
        upload = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (HELD_OUT.name, file)})
    found = client.post("/v1/evaluations", json={"model": name, "file": upload.json()["id"]}).json()
    while found["status"] == "running":
        time.sleep(0.5)
        found = client.get(f"/v1/evaluations/{found['id']}").json()
    if found["status"] != "succeeded":
        raise SystemExit(f"the evaluation failed: {found['error']}")
    results: dict[str, Any] = found
    return results


def answer(client: httpx.Client, model: str, messages: list[dict[str, str]]) -> str:
    """What a model says, greedily and on one line."""
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 32}
    response = client.post("/v1/chat/completions", json=body).raise_for_status()
    return " ".join(response.json()["choices"][0]["message"]["content"].split())


def side_by_side(client: httpx.Client, base: str, adapter: str) -> Table:
    """Some held-out orders, answered by both."""
    table = Table("Order", "Expected", "Base", "Adapter", title="Orders that were not in the training data")
    for line in HELD_OUT.read_text().splitlines()[:SHOWN]:
        *asked, expected = json.loads(line)["messages"]
        table.add_row(
            asked[-1]["content"], expected["content"], answer(client, base, asked), answer(client, adapter, asked)
        )
    return table


def main() -> int:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lorakeet-demo-") as directory:
        console.print("Starting the server (a first start also fetches the model) ...")
        with server(Path(directory)) as url, httpx.Client(base_url=url, timeout=None) as client:
            base = client.get("/v1/models").json()["data"][0]["id"]
            console.print(f"Serving {base} at {url}. Fine-tuning on {TRAINING.relative_to(HERE.parent)}:")
            began = time.monotonic()
            adapter = fine_tune(url, TRAINING, "orders")
            console.print(f"Trained in {time.monotonic() - began:.0f} s; served at once as {adapter}.\n")
            console.print(side_by_side(client, base, adapter))
            found = evaluate(client, adapter)
    before, after = (found["results"][name] for name in ("base", "adapter"))
    console.print(
        f"\n{found['examples']} held-out orders, exact match: base {before['exact_match']:.0%}, adapter "
        f"{after['exact_match']:.0%} (loss {before['loss']:.3f} -> {after['loss']:.3f}). "
        f"All in {time.monotonic() - started:.0f} s."
    )
    learned = before["exact_match"] <= AT_MOST_BEFORE and after["exact_match"] >= AT_LEAST_AFTER
    return 0 if learned else 1


if __name__ == "__main__":
    sys.exit(main())
