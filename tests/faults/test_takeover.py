"""Two real servers on one object store: the one that trains is killed, and the other finishes its job."""

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.conftest import Files
from tests.support.running import BASE, RunningServer, eventually

CHAT = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"it is {n}"}]}
    for n in range(30)
]


def posted(server: RunningServer, path: str, **options: Any) -> dict[str, Any]:
    response = httpx.post(f"{server.url}{path}", timeout=60, **options)
    assert response.status_code in (200, 201), response.text
    found: dict[str, Any] = response.json()
    return found


def job_of(server: RunningServer, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = server.get(f"/v1/fine_tuning/jobs/{job_id}").json()
    return found


def ended(server: RunningServer, job_id: str) -> dict[str, Any] | None:
    job = job_of(server, job_id)
    assert job["status"] not in ("failed", "cancelled"), job
    return job if job["status"] == "succeeded" else None


def digest(server: RunningServer, name: str) -> str:
    found: str = server.get(f"/v1/adapters/{name}").json()["digest"]
    return found


@pytest.mark.slow
def test_a_job_whose_server_is_killed_ends_at_another_with_the_same_bytes(made: Files, tmp_path: Path) -> None:
    def server(name: str, *flags: str) -> RunningServer:
        (tmp_path / name).mkdir()
        flags = ("--adapter-store", f"file://{tmp_path}/store", "--job-lease-seconds", "5", *flags)
        return RunningServer(made.model, tmp_path / name, tmp_path / name / "data", *flags)

    one, two = server("one"), server("two")
    try:
        one.ensure()
        file = "\n".join(json.dumps(row) for row in CHAT)
        upload = {"files": {"file": ("train.jsonl", file)}, "data": {"purpose": "fine-tune"}}
        training = posted(one, "/v1/files", **upload)["id"]
        body = {
            "model": BASE,
            "training_file": training,
            "seed": 7,
            "hyperparameters": {"batch_size": 1, "n_epochs": 2},
            "training": {"checkpoint_every": 10},
        }
        undisturbed = posted(one, "/v1/fine_tuning/jobs", json=body)["id"]
        whole = eventually(lambda: ended(one, undisturbed), 120, "the undisturbed job")
        expected = digest(one, whole["fine_tuned_model"])
        job_id = posted(one, "/v1/fine_tuning/jobs", json=body)["id"]
        two.begin()
        eventually(lambda: job_of(one, job_id)["step"] >= 15, 120, "half of it")
        one.kill()
        two.wait_ready(300)
        done = eventually(lambda: ended(two, job_id), 180, f"the end at the other\n{two.log[-4000:]}")
        assert digest(two, done["fine_tuned_model"]) == expected
        assert job_of(two, undisturbed) == whole
        events = two.get(f"/v1/fine_tuning/jobs/{job_id}/events?limit=1000").json()["data"]
        steps = [event["data"]["step"] for event in reversed(events) if event["type"] == "metrics"]
        assert steps == list(range(1, 61))

        assert "The server restarted; the job is queued again" in [event["message"] for event in events]

        one.ensure()
        id_ = posted(one, "/v1/files", **upload)["id"]
        eventually(lambda: id_ in two.get("/v1/files").text, 30, "the file in the other's list")
        assert made.upload(one, "red", "red").status_code == 201
        began = time.monotonic()
        assert posted(two, "/v1/completions", json={"model": "red", "prompt": "Once", "max_tokens": 2})["usage"]
        assert time.monotonic() - began < 2
    finally:
        one.stop()
        two.stop()
