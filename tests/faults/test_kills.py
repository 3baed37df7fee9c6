"""Random kill -9 of either process, under uploads, deletes, promotes and training, on a disk that fills and frees.

Nothing acknowledged is lost, nothing is left behind, every job ends. KILLS is the number of kills (200), KILLS_SECONDS
a time limit for all. Run by `make kills`.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.faults.conftest import ADAPTERS, Files
from tests.support.running import BASE, RunningServer, eventually
from tests.support.threads import ClientThreads

KILLS = int(os.environ.get("KILLS", "200"))
SECONDS = float(os.environ.get("KILLS_SECONDS", "inf"))
FINAL = {"succeeded", "failed", "cancelled"}
ROWS = [{"text": f"the quick brown fox number {n} jumps over the lazy dog"} for n in range(16)]


class Clients(ClientThreads):
    """Threads that make changes and record the answers."""

    def __init__(self, server: RunningServer, made: Files) -> None:
        self.server = server
        self.made = made
        self.meaning: dict[str, set[str | None]] = {}  # name -> digests; several if unacknowledged
        self.jobs: set[str] = set()
        self.faults: list[str] = []
        works: list[Callable[[], None]] = [partial(self._adapters, n) for n in range(3)]
        works.append(self._training)
        super().__init__(threading.Event(), works, timeout=30)

    def _ask(self, method: str, path: str, **more: Any) -> httpx.Response | None:
        """Send a request; None if its outcome is unknown."""
        try:
            response = self._client.request(method, f"{self.server.url}{path}", **more)
        except httpx.ConnectError:
            time.sleep(0.1)
            return None
        except httpx.TransportError:
            return None
        if response.status_code == 500:
            self.faults.append(f"{method} {path}: {response.text}")
        return response

    def _adapters(self, number: int) -> None:
        draws = random.Random(number)
        name = f"n{number}"
        digests: dict[str, str] = {}
        self.meaning[name] = {None}
        while not self._stop.wait(0.05):
            match draws.choice(["upload", "upload", "promote", "delete"]):
                case "upload":
                    content = draws.choice(ADAPTERS)
                    directory = self.made.adapters[content]
                    files = {
                        "config": (directory / "adapter_config.json").read_bytes(),
                        "weights": (directory / "adapter_model.safetensors").read_bytes(),
                    }
                    self._changed(
                        name,
                        self._ask("POST", "/v1/adapters", data={"name": name}, files=files),
                        lambda response, content=content: digests.setdefault(content, response.json()["digest"]),
                        {digests[content]} if content in digests else None,
                    )
                case "promote" if digests:
                    digest = draws.choice(sorted(digests.values()))
                    body = {"digest": digest}
                    response = self._ask("POST", f"/v1/adapters/{name}/promote", json=body)
                    self._changed(name, response, lambda _, digest=digest: digest, {digest})
                case "delete":
                    self._changed(name, self._ask("DELETE", f"/v1/adapters/{name}"), lambda _: None, {None})

    def _changed(self, name: str, response: httpx.Response | None, meaning: Any, possible: Any) -> None:
        if response is None:
            self.meaning[name] |= {"?"} if possible is None else possible
        elif response.is_success:
            self.meaning[name] = {meaning(response)}
        elif response.status_code >= 500 and response.status_code not in (503, 507):
            self.meaning[name] |= {"?"} if possible is None else possible

    def _training(self) -> None:
        while not self._stop.wait(1.0):
            content = "\n".join(map(json.dumps, ROWS)).encode()
            files = {"file": ("train.jsonl", content)}
            upload = self._ask("POST", "/v1/files", data={"purpose": "fine-tune"}, files=files)
            if upload is None or not upload.is_success:
                continue
            hyperparameters = {"n_epochs": 2, "batch_size": 4}
            body = {"model": BASE, "training_file": upload.json()["id"], "hyperparameters": hyperparameters}
            job = self._ask("POST", "/v1/fine_tuning/jobs", json=body)
            if job is not None and job.is_success:
                self.jobs.add(job.json()["id"])
                self._stop.wait(10)
                with contextlib.suppress(httpx.TransportError, KeyError):
                    make_room(self.server)


@contextlib.contextmanager
def filled_now_and_then(disk: Path | None) -> Any:
    """Fill the whole disk with a file, for a moment, again and again."""
    stop = threading.Event()

    def fill() -> None:
        assert disk is not None
        while not stop.wait(3.0):
            with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 16))
            stop.wait(1.0)
            (disk / "filler").unlink()

    thread = threading.Thread(target=fill)
    if disk is not None:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if disk is not None:
            thread.join()
            (disk / "filler").unlink(missing_ok=True)


def make_room(server: RunningServer) -> None:
    """Delete trained adapters: the disk is small, and jobs would rightly wait for space forever."""
    for item in server.get("/v1/adapters").json()["data"]:
        if item["name"].startswith("ft:"):
            server.delete(f"/v1/adapters/{item['name']}")


def ended(server: RunningServer, path: str) -> bool:
    time.sleep(0.2)
    make_room(server)
    return server.get(path).json()["status"] in FINAL


def shown(server: RunningServer, path: str) -> str:
    """A job, its events and the largest files, for the message of a failed test."""
    files = [(file.stat().st_size, str(file)) for file in server.data_dir.rglob("*") if file.is_file()]
    disk = f"{shutil.disk_usage(server.data_dir)}, largest: {sorted(files)[-12:]}"
    return f"{server.get(path).text}\n{server.get(path + '/events').text}\n{disk}"


def _engines(server: RunningServer) -> list[int]:
    """Live engine processes started for this server at any time."""
    lines = {process.pid: process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])}
    return [pid for pid, line in lines.items() if "server.engine.process" in line and str(server.root) in line[-1]]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_hundred_kills_lose_nothing(
    server: RunningServer, made: Files, small_disk: Path | None, capsys: pytest.CaptureFixture[str]
) -> None:
    clients, draws, killed = Clients(server, made), random.Random(0), 0
    began = time.monotonic()
    with filled_now_and_then(small_disk), clients:
        while killed < KILLS and time.monotonic() - began < SECONDS:
            time.sleep(draws.uniform(0.1, 3.0))
            with contextlib.suppress(httpx.TransportError, KeyError, AssertionError, ProcessLookupError):
                if draws.random() < 0.4:
                    os.kill(server.engine_pid, signal.SIGKILL)
                    killed += 1
                    continue
            server.kill()
            killed += 1
            server.begin()
            server.wait_ready(600)
    server.begin()
    server.wait_ready(600)
    eventually(lambda: _engines(server) == [server.engine_pid], 60, "no engine outlives its API process")
    with capsys.disabled():
        print(f"\n{killed} kills in {time.monotonic() - began:.0f} s, {len(clients.jobs)} jobs, {clients.meaning}")

    assert not clients.faults, clients.faults[:5]
    found = {item["name"]: item["digest"] for item in server.get("/v1/adapters").json()["data"]}
    for name, possible in clients.meaning.items():
        assert found.get(name) in possible or "?" in possible, (name, found.get(name), possible)
    for job in clients.jobs:
        path = f"/v1/fine_tuning/jobs/{job}"
        if server.get(path).json()["status"] == "paused":
            httpx.post(f"{server.url}{path}/resume", timeout=30)
        try:
            eventually(partial(ended, server, path), 120, f"{job} ends")
        except AssertionError as fault:
            raise AssertionError(f"{fault}: {shown(server, path)}") from None

    listed = [item["name"] for item in server.get("/v1/adapters").json()["data"]]  # includes trained adapters
    named = {digest for name in listed for digest in server.get(f"/v1/adapters/{name}").json()["versions"]}
    versions = {f"sha256:{path.name}" for path in (server.data_dir / "adapters" / "versions").iterdir()}
    assert versions == named
    assert not list((server.data_dir / "adapters" / "staging").iterdir())
    assert not list((server.data_dir / "jobs").iterdir())
    assert not list((server.data_dir / "lost+found").glob("*/*"))
