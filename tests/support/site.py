"""The whole application over a real trainer in this process: real files, jobs, store and tokenizer; no serving."""

import asyncio
import itertools
import json
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from msgspec.structs import replace

from adapters.storage.names import LocalNames
from adapters.storage.store import AdapterStore
from server.client.engine import EngineDied, TrainingRefused
from server.engine.engine import Engine
from server.http.app import build_app
from server.messages.protocol import Done
from server.messages.training import JobEnded, JobReply, MemoryPlan, PlanMemory, StartJob, StopJob
from server.settings import Settings
from server.startup import make_services
from server.training.trainer import Trainer
from tests.support.conforming import client_of
from tests.support.harness import IdleEngine
from tests.support.tiny import tiny_text

FINAL = ("succeeded", "failed", "cancelled")


class TrainingEngine(IdleEngine):
    """An engine that only trains, one piece per iteration of the event loop.

    Attributes:
        pieces: the number of pieces run.
        memory: if set, the memory reported as available to every job.
        held: while set, jobs are started but nothing runs.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(replace(engine.ready(), pool_rows=dict.fromkeys(engine.pool.capacity, 1024)))
        self._base = engine.base
        self._trainer = Trainer(engine.base)
        self._generation = 0
        self._replies: defaultdict[str, list[JobReply]] = defaultdict(list)  # unread, by run
        self._runs: dict[str, str] = {}  # the latest run of each job
        self._count = itertools.count()
        self.pieces = 0
        self.memory: int | None = None
        self.held = False

    def kill(self) -> None:
        """Lose everything in memory and restart."""
        self._trainer.close()
        self._trainer._writer.shutdown()  # a thread does not survive its process
        self._trainer = Trainer(self._base)
        self._replies.clear()
        self._generation += 1

    async def train(self, job: StartJob) -> AsyncGenerator[JobReply, None]:
        born = self._generation
        run = self._runs[job.id] = f"{job.id}.{next(self._count)}"  # as `LocalEngine` does
        self._trainer.start(replace(job, id=run))
        ended = False
        try:
            while not ended:
                await asyncio.sleep(0.001)
                if self._generation != born:
                    raise EngineDied("killed")
                if self._trainer.ready and not self.held:
                    self._trainer.run_piece()
                    self.pieces += 1
                for reply in self._trainer.take_replies():
                    assert not isinstance(reply, MemoryPlan | Done)
                    self._replies[reply.id].append(reply)
                for reply in self._replies.pop(run, []):
                    ended = isinstance(reply, JobEnded)
                    yield replace(reply, id=job.id)
        finally:
            if not ended and self._generation == born:
                self._trainer.stop(StopJob(run, save=False))

    async def plan_memory(self, asked: PlanMemory) -> MemoryPlan:
        plan = self._trainer._plan(asked)
        if isinstance(plan, Done):
            raise TrainingRefused(plan.error or "", plan.code or "")
        return plan if self.memory is None else replace(plan, available=self.memory, mode=None)

    async def stop_job(self, message: StopJob) -> None:
        self._trainer.stop(replace(message, id=self._runs.get(message.id, message.id)))

    def close(self) -> None:
        self._trainer.close()


class TuningSite:
    """One run of the API process over a directory."""

    def __init__(self, root: Path, engine: TrainingEngine, **settings: Any) -> None:
        self.engine = engine
        self.settings = Settings(
            **dict[str, Any](data_dir=root, served_model_name="tiny", max_training_jobs=1) | settings
        )
        self._names = LocalNames(root / "adapters.db")
        self.store = AdapterStore(root / "adapters", self._names)
        self.text = tiny_text()
        self.services = make_services(self.settings, engine, self.store, self.text)
        self.metrics = self.services.metrics
        self.tuning = self.services.tuning
        self.client = client_of(build_app(self.services), timeout=30)

    async def close(self) -> None:
        await self.tuning.stop()
        await self.client.aclose()
        self.text.close()
        self._names.close()

    # --- common operations ---------------------------------------------------------------------------------

    async def upload(self, examples: list[Any] | None = None) -> str:
        """Upload a new training file; return its id."""
        lines = EXAMPLES if examples is None else examples
        response = await self.client.post("/v1/files", files=as_file(lines), data={"purpose": "fine-tune"})
        assert response.status_code == 200, response.text
        return str(response.json()["id"])

    async def create(self, **body: Any) -> dict[str, Any]:
        """Create a job over the example data."""
        fields = {"model": "tiny", "training_file": body.pop("training_file", None) or await self.upload()}
        if "method" not in body:
            fields["hyperparameters"] = {"batch_size": 3}  # few steps
        response = await self.client.post("/v1/fine_tuning/jobs", json=fields | {"seed": 3} | body)
        assert response.status_code == 200, response.text
        job: dict[str, Any] = response.json()
        return job

    async def job(self, job_id: str) -> dict[str, Any]:
        job: dict[str, Any] = (await self.client.get(f"/v1/fine_tuning/jobs/{job_id}")).json()
        return job

    async def steer(self, job_id: str, verb: str) -> httpx.Response:
        return await self.client.post(f"/v1/fine_tuning/jobs/{job_id}/{verb}")

    async def until(self, job_id: str, *statuses: str) -> dict[str, Any]:
        """Wait until the job has one of these statuses (by default: any final one); return it."""
        wanted = statuses or FINAL
        async with asyncio.timeout(180):
            while (job := await self.job(job_id))["status"] not in wanted:
                assert job["status"] not in FINAL, await self.messages(job_id)
                await asyncio.sleep(0.005)
        return job

    async def messages(self, job_id: str) -> list[str]:
        events = (await self.client.get(f"/v1/fine_tuning/jobs/{job_id}/events?limit=500")).json()["data"]
        return [event["message"] for event in reversed(events)]


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until `condition` is true."""
    async with asyncio.timeout(180):
        while not condition():  # noqa: ASYNC110  # there is no notification
            await asyncio.sleep(0.001)


EXAMPLES = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"it is {n}"}]}
    for n in range(12)
]


def as_file(lines: list[Any]) -> dict[str, tuple[str, bytes]]:
    """The multipart part of a JSONL file."""
    text = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    return {"file": ("train.jsonl", text)}


@asynccontextmanager
async def tuning_site(root: Path, engine: TrainingEngine, **settings: Any) -> AsyncIterator[TuningSite]:
    """A site whose jobs continue from the contents of `root`."""
    root.mkdir(exist_ok=True)
    site = TuningSite(root, engine, **settings)
    await site.tuning.start()
    try:
        yield site
    finally:
        await site.close()


def refused(response: httpx.Response, param: str | None, status: int = 400) -> str:
    """Check a refusal; return its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    return str(error["message"])
