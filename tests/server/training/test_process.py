"""A fine-tune on a real server: the openai client, `kill -9` of either process, the base unchanged."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from typer.testing import CliRunner

from server.cli import app
from server.commands.remote import CommandError
from tests.support.running import BASE, RunningServer, eventually
from tests.support.site import EXAMPLES


@pytest.fixture(scope="module")
def server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("server")
    server = RunningServer(model_dir, root, root / "data", "--max-training-jobs", "2")
    server.ensure()
    yield server
    server.stop()


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=180)


def prompt_logprobs(client: openai.OpenAI) -> list[float | None]:
    """The base's log-probabilities of a fixed prompt, without the prefix cache."""
    answer = client.completions.create(
        model=BASE, prompt=list(range(5, 45)), max_tokens=1, echo=True, logprobs=0, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    return list(logprobs.token_logprobs or [])


def base_digest(server: RunningServer) -> str:
    return str(server.get("/ready").json()["base_digest"])


def start(client: openai.OpenAI, file: str, **training: Any) -> str:
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file,
        seed=5,
        suffix="t",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": 1}}},
        extra_body={"training": {"checkpoint_every": 4, "learning_rate": 1e-3} | training, "lora": {"r": 4}},
    )
    return job.id


def digest(server: RunningServer, name: str | None) -> str:
    return str(server.get(f"/v1/adapters/{name}").json()["digest"])


def test_a_job_by_the_openai_client_and_again_through_kills(server: RunningServer, client: openai.OpenAI) -> None:
    before, logprobs = base_digest(server), prompt_logprobs(client)
    file = client.files.create(file=("train.jsonl", "\n".join(map(json.dumps, EXAMPLES)).encode()), purpose="fine-tune")
    assert file.status == "processed"
    whole = start(client, file.id)
    during = [prompt_logprobs(client) for _ in range(5)]
    assert all(found == logprobs for found in during)

    def done(job_id: str) -> Any:
        job = client.fine_tuning.jobs.retrieve(job_id)
        assert job.status not in ("failed", "cancelled"), job.error
        return job if job.status == "succeeded" else None

    job = eventually(lambda: done(whole), 180, "the job ends")
    answer = client.chat.completions.create(
        model=job.fine_tuned_model, messages=[{"role": "user", "content": "say 3"}], max_tokens=4
    )
    assert answer.model == job.fine_tuned_model
    checkpoints = client.fine_tuning.jobs.checkpoints.list(whole).data
    assert [checkpoint.step_number for checkpoint in checkpoints] == [*range(48, 8, -4)]
    events = client.fine_tuning.jobs.list_events(whole, limit=200).data
    assert len([event for event in events if event.type == "metrics"]) == 48
    expected = digest(server, job.fine_tuned_model)

    def saved() -> int:
        return max((found.step_number for found in client.fine_tuning.jobs.checkpoints.list(killed).data), default=0)

    with server.slowed("training "):  # prevents the job from ending before all this has happened to it
        killed = start(client, file.id)
        eventually(saved, 180, "a checkpoint")
        engine = server.engine_pid
        os.kill(engine, signal.SIGKILL)
        failing = eventually(
            lambda: (pid := server.wait_ready()["engine_pid"]) != engine and pid, 180, "another engine"
        )
        kept = saved()
        eventually(lambda: saved() > kept, 180, "a checkpoint of that engine's: without, the job is not tried again")
        server.fault.write_text("training accelerator")
        eventually(
            lambda: server.wait_ready()["engine_pid"] not in (failing, None),
            180,
            "a third: the device failed in training",
        )
    server.kill()
    server.ensure()
    job = eventually(lambda: done(killed), 180, "the job ends after the kills")
    assert digest(server, job.fine_tuned_model) == expected
    assert base_digest(server) == before
    assert prompt_logprobs(client) == logprobs
    assert client.models.delete(checkpoints[0].fine_tuned_model_checkpoint).deleted


def command(server: RunningServer, *arguments: str) -> str:
    """The output of a `lorakeet` command."""
    result = CliRunner().invoke(app, [*arguments, "--url", server.url])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_the_commands(server: RunningServer, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, EXAMPLES[:4])))
    options = ("--name", "cli", "--epochs", "40", "--learning-rate", "0.01", "--batch-size", "4", "--rank", "4")
    name = command(server, "finetune", str(data), *options, "--seed", "1", "--validation", str(data)).splitlines()[-1]
    assert name.startswith(f"ft:{BASE}:cli:")
    scores = command(server, "eval", str(data), "--adapter", name)
    base, adapted = (line.split() for line in scores.splitlines()[-2:])
    assert float(adapted[1]) < float(base[1])
    listed = command(server, "jobs")
    assert name in "".join(listed.split())
    waiting = command(server, "finetune", str(data), "--name", "b", "--epochs", "1000", "--no-watch").strip()
    assert "is cancelled" in command(server, "jobs", waiting, "--cancel")
    assert "Fine-tuning job cancelled" in command(server, "jobs", waiting)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("finetune", "/nowhere.jsonl", "--name", "a"), "no such file"),
        (("finetune", __file__, "--name", "a"), "line 1"),
        (("jobs", "--cancel"), "give an ID"),
        (("jobs", "ftjob-nobody", "--cancel"), "Could not find"),
        (("eval", __file__, "--adapter", "nobody"), "line 1"),
    ],
)
def test_commands_fail_in_one_line(server: RunningServer, arguments: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, [*arguments, "--url", server.url])
    assert isinstance(result.exception, CommandError)
    assert message in str(result.exception)
