"""Two real servers on one object store, killed at random during all shared kinds of work: nothing is lost or doubled.

KILLS is the number of kills (12).
"""

import json
import os
import random
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.conftest import Files
from tests.support.buckets import BUCKET, S3Server
from tests.support.running import BASE, RunningServer, eventually
from tests.support.threads import ClientThreads

KILLS = int(os.environ.get("KILLS", "12"))
LEASE = "4"
ROWS = 24  # per batch
TRAINED = [{"text": f"the quick brown fox number {n} jumps over the lazy dog"} for n in range(16)]
ASKED = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(8)]
FINAL = {"succeeded", "failed", "cancelled", "completed", "expired", "incomplete"}


def batch_rows() -> list[dict[str, Any]]:
    asked = {"method": "POST", "url": "/v1/completions"}
    return [
        asked | {"custom_id": f"r{n}", "body": {"model": BASE, "prompt": f"Once {n}", "max_tokens": 24}}
        for n in range(ROWS)
    ]


class Clients(ClientThreads):
    """A thread for each kind of work, sending to any server, and the acknowledged objects."""

    def __init__(self, servers: list[RunningServer], stop: threading.Event) -> None:
        self.made: dict[str, list[str]] = {kind: [] for kind in ("batches", "jobs", "evaluations", "responses")}
        self.files: list[str] = []
        self.faults: list[str] = []
        self._servers = servers
        works = self._batch, self._job, self._evaluation, self._response
        super().__init__(stop, [partial(self._work, i, work) for i, work in enumerate(works)], timeout=60)

    def _work(self, seed: int, work: Any) -> None:
        draw = random.Random(seed)
        while not self._stop.wait(draw.uniform(0.5, 3.0)):
            work(draw)

    def _post(self, draw: random.Random, path: str, **options: Any) -> str | None:
        """The id of the new object; None if the outcome is unknown."""
        try:
            response = self._client.post(f"{draw.choice(self._servers).url}/v1/{path}", **options)
        except httpx.TransportError:
            return None
        if response.status_code not in (200, 201, 503):
            self.faults.append(f"{path}: {response.status_code} {response.text}")
        return str(response.json()["id"]) if response.status_code in (200, 201) else None

    def _upload(self, draw: random.Random, purpose: str, rows: list[dict[str, Any]]) -> str | None:
        content = "\n".join(map(json.dumps, rows)).encode()
        file = self._post(draw, "files", data={"purpose": purpose}, files={"file": ("rows.jsonl", content)})
        self.files += [file] if file else []
        return file

    def _make(self, kind: str, draw: random.Random, path: str, body: dict[str, Any]) -> None:
        if (made := self._post(draw, path, json=body)) is not None:
            self.made[kind].append(made)

    def _batch(self, draw: random.Random) -> None:
        if file := self._upload(draw, "batch", batch_rows()):
            body = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
            self._make("batches", draw, "batches", body)

    def _job(self, draw: random.Random) -> None:
        if file := self._upload(draw, "fine-tune", TRAINED):
            sizes = {"hyperparameters": {"n_epochs": 1, "batch_size": 1}, "training": {"checkpoint_every": 4}}
            self._make("jobs", draw, "fine_tuning/jobs", {"model": BASE, "training_file": file} | sizes)

    def _evaluation(self, draw: random.Random) -> None:
        if file := self._upload(draw, "fine-tune", ASKED):
            self._make("evaluations", draw, "evaluations", {"model": BASE, "file": file})

    def _response(self, draw: random.Random) -> None:
        body = {"model": BASE, "input": "Once", "max_output_tokens": 60, "background": True}
        self._make("responses", draw, "responses", body)


def object_of(server: RunningServer, path: str) -> dict[str, Any]:
    response = server.get(f"/v1/{path}")
    assert response.status_code == 200, f"{path}: {response.text}"
    found: dict[str, Any] = response.json()
    return found


def ended(server: RunningServer, path: str) -> dict[str, Any] | None:
    found = object_of(server, path)
    return found if found["status"] in FINAL else None


def equals(server: RunningServer, path: str, expected: dict[str, Any]) -> bool:
    return object_of(server, path) == expected


def lines(server: RunningServer, file: str) -> list[dict[str, Any]]:
    content = server.get(f"/v1/files/{file}/content").content  # texts may contain other line separators
    return [json.loads(line) for line in content.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", ["file", "s3"])
def test_two_killed_servers_lose_and_double_nothing(
    made: Files, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    s3 = S3Server()
    if kind == "s3":
        s3.start()
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
    url = f"s3://{BUCKET}/shared" if kind == "s3" else f"file://{tmp_path}/store"
    servers = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        flags = ("--adapter-store", url, "--job-lease-seconds", LEASE, "--store-poll-seconds", "1")
        servers.append(RunningServer(made.model, tmp_path / name, tmp_path / name / "data", *flags))
    draw, stop = random.Random(5), threading.Event()
    clients = Clients(servers, stop)
    try:
        for server in servers:
            server.begin()
        for server in servers:
            server.wait_ready(600)
        with clients:
            for _ in range(KILLS):
                time.sleep(draw.uniform(2.0, 8.0))
                victim = draw.choice(servers)
                victim.kill()
                if draw.random() < 0.3:  # longer than the lease: the other takes over
                    time.sleep(float(LEASE) + 3)
                victim.begin()
                victim.wait_ready(600)
        counts = {name: len(ids) for name, ids in clients.made.items()}
        with capsys.disabled():
            print(f"\n{kind}: {KILLS} kills, acknowledged {counts}")
        assert clients.faults == []
        assert min(counts.values()) > 0
        _check(servers, clients)
    finally:
        for server in servers:
            server.stop()
        s3.stop()


def _check(servers: list[RunningServer], clients: Clients) -> None:
    one, two = servers
    paths = {"batches": "batches", "jobs": "fine_tuning/jobs", "evaluations": "evaluations", "responses": "responses"}
    for name, path in paths.items():
        outcomes = Counter[str]()
        for id_ in clients.made[name]:
            at = f"{path}/{id_}"
            done = eventually(partial(ended, one, at), 300, f"the end of {at}: {one.get(f'/v1/{at}').text}")
            eventually(partial(equals, two, at, done), 30, f"the same at the other: {at}, {done}")
            outcomes[done["status"]] += 1
            if name == "batches":
                assert done["request_counts"] == {"total": ROWS, "completed": ROWS, "failed": 0}, done
                answers = Counter(line["custom_id"] for line in lines(two, done["output_file_id"]))
                assert answers == Counter(f"r{n}" for n in range(ROWS)), f"{id_}: {answers}"
            if name == "jobs":
                events = object_of(two, f"{at}/events?limit=1000")["data"]
                steps = [event["data"]["step"] for event in reversed(events) if event["type"] == "metrics"]
                assert steps == list(range(1, len(TRAINED) + 1)), f"{id_}: {steps}"
                assert two.get(f"/v1/adapters/{done['fine_tuned_model']}").status_code == 200
            if name == "evaluations":
                assert len(lines(two, done["result_files"][0])) == len(ASKED)
        print(name, dict(outcomes))
        # A background response ends with its server and has then failed, as documented.
        may = {"responses": {"completed", "incomplete", "failed"}, "batches": {"completed"}}
        assert outcomes.keys() <= may.get(name, {"succeeded"}), f"{name}: {outcomes}"
    for file in clients.files:
        assert object_of(two, f"files/{file}")["id"] == file
    listed = [{item["id"] for item in object_of(server, "batches?limit=100")["data"]} for server in servers]
    assert listed[0] == listed[1] >= set(clients.made["batches"][-100:])
