"""Prometheus itself scrapes a running application and returns every documented metric under its documented name."""

import asyncio
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from server.finetune.metrics import TrainingMetrics
from server.messages.protocol import AdapterUse, Stats
from server.messages.training import Metrics as StepMetrics
from server.messages.training import TrainingStep
from server.metrics import PREFIX
from tests.support.documented import documented, series_names
from tests.support.scripted import Served, serving

pytestmark = [
    pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: apt-get install prometheus)"),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus (Debian: apt-get install it)"),
]

_COLON = "metric names should not contain ':'"  # as vLLM's do; Prometheus reserves colons for recording rules


@asynccontextmanager
async def _listening(served: Served) -> AsyncIterator[int]:
    server = uvicorn.Server(uvicorn.Config(served.app, port=0, log_config=None, timeout_graceful_shutdown=1))
    running = asyncio.create_task(server._serve())  # without its signal handlers
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await running


@asynccontextmanager
async def _prometheus(folder: Path, target: int) -> AsyncIterator[httpx.AsyncClient]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\n"
        f"scrape_configs: [{{job_name: lorakeet, static_configs: [{{targets: ['127.0.0.1:{target}']}}]}}]\n"
    )
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'series'}",
        f"--web.listen-address=127.0.0.1:{port}",
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/api/v1") as client:
            yield client
    finally:
        process.kill()
        await process.wait()


async def _ask(client: httpx.AsyncClient, path: str, **parameters: str) -> httpx.Response | None:
    try:
        return await client.get(path, params=parameters)
    except httpx.TransportError:  # it is not listening yet
        return None


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> list[TrainingMetrics]:
    """The training metrics of every application created during the test."""
    made: list[TrainingMetrics] = []

    def make(*args: Any) -> TrainingMetrics:
        made.append(TrainingMetrics(*args))
        return made[-1]

    monkeypatch.setattr("server.finetune.service.TrainingMetrics", make)
    return made


async def _use_everything(served: Served, training: TrainingMetrics, folder: Path) -> None:
    """Load an adapter and train a job, so that every metric with labels has a series."""
    digest = await served.add_adapter(folder, "poet")
    answer = await served.client.post("/v1/completions", json={"model": "poet", "prompt": "Hi"})
    assert answer.status_code == 200
    metrics = served.services.metrics
    metrics.add_engine_stats(Stats(adapters=[AdapterUse(digest, "device", 8, 0, 0)]))
    step = StepMetrics(step=1, train_loss=2.0)
    training.step(
        TrainingStep(
            id="ftjob-1",
            metrics=step,
            total_steps=10,
            learning_rate=1e-4,
            grad_norm=1.0,
            trained_tokens=10,
            seconds=2.0,
            busy_seconds=1.0,
        ),
        10,
    )


@pytest.mark.prometheus
@pytest.mark.parametrize("prefix", ["lorakeet", "vllm"])
async def test_every_documented_name_answers(tmp_path: Path, training: list[TrainingMetrics], prefix: str) -> None:
    async with serving(tmp_path, metrics_prefix=prefix) as served, _listening(served) as port:
        await _use_everything(served, training[0], tmp_path)
        names = {
            f"{prefix}:{name.removeprefix(PREFIX)}": metric.type
            for metric in documented()
            for name in series_names(metric)
        }
        async with _prometheus(tmp_path, port) as client:
            missing = set(names)
            async with asyncio.timeout(60):
                while missing:
                    await asyncio.sleep(0.1)
                    for name in sorted(missing):
                        answer = await _ask(client, "query", query=name)
                        if answer is None or not answer.json()["data"]["result"]:
                            break
                        missing.remove(name)
            stored = (await client.get("label/__name__/values")).json()["data"]
            assert not [name for name in stored if name.startswith(f"{prefix}_")]
            types = (await client.get("metadata")).json()["data"]
            for metric in documented():
                name = f"{prefix}:{metric.name.removeprefix(PREFIX)}" + ("_total" if metric.type == "counter" else "")
                assert [entry["type"] for entry in types[name]] == [metric.type]


async def test_promtool_finds_nothing_but_the_colons(tmp_path: Path, training: list[TrainingMetrics]) -> None:
    async with serving(tmp_path) as served:
        await _use_everything(served, training[0], tmp_path)
        page = (await served.client.get("/metrics")).content
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, check=False)
    complaints = done.stderr.decode().splitlines()
    assert complaints
    assert [line for line in complaints if not (line.startswith(PREFIX) and line.endswith(_COLON))] == []
