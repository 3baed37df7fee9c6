"""Several servers on one object store in this process, with engines that only simulate training."""

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from adapters.storage.remote import RemoteStore
from adapters.storage.store import AdapterStore
from server.finetune.sharing import Sharing
from server.messages.training import (
    Checkpoint,
    JobEnded,
    JobReply,
    MemoryPlan,
    Metrics,
    PlanMemory,
    StartJob,
    StopJob,
    TrainingStep,
)
from server.services import TENANT
from tests.support.harness import IdleEngine, Site, base_info, write_adapter
from tests.support.threads import threads_at_rest
from tests.support.tiny import tiny_text

EXAMPLES = b"\n".join(json.dumps({"prompt": f"say {n}", "completion": f"it is {n}"}).encode() for n in range(8))
LEASE = 60.0  # never waited for, see `take_over`; too long for any slow machine to exceed
STEPS = 8


async def take_over(sharing: Sharing | None, id_: str) -> None:
    """Give a server without free capacity a place, and make a record's lease look expired to it."""
    assert sharing is not None
    leases, sharing.records._max_held = sharing.records.leases, 1
    async with asyncio.timeout(180):
        while not leases.holds(id_):
            lease, since = leases._seen[id_]
            leases._seen[id_] = lease, since - LEASE
            await asyncio.sleep(0.02)


async def asleep(sharing: Sharing | None) -> None:
    """Stop a server's renewals and take-overs, including those in progress."""
    assert sharing is not None
    await sharing.stop()
    await threads_at_rest()


class PretendingEngine(IdleEngine):
    """Simulates training: the result is a chain of hashes over the data and all steps.

    Attributes:
        until: the step before which it waits.
        steps: completed steps of all jobs.
    """

    def __init__(self) -> None:
        super().__init__(base_info())
        self.until = STEPS + 1
        self.steps: list[int] = []
        self._stops: dict[str, bool] = {}

    async def plan_memory(self, asked: PlanMemory) -> MemoryPlan:
        sizes = dict.fromkeys(("base", "adapter", "gradients", "optimizer", "checkpoint"), 1)
        activations: Any = {"recompute": 1}
        return MemoryPlan(id=asked.id, **sizes, activations=activations, available=99, mode="recompute")

    async def train(self, job: StartJob) -> AsyncGenerator[JobReply, None]:
        self._stops.pop(job.id, None)
        step, chain = 0, hashlib.sha256(Path(job.train_data).read_bytes()).hexdigest()
        if job.initial is not None:
            chain += hashlib.sha256((Path(job.initial) / "adapter_model.safetensors").read_bytes()).hexdigest()
        if job.resume is not None:
            step, chain = json.loads((Path(job.resume) / "state.json").read_bytes())
        while step < STEPS:
            while step + 1 >= self.until or job.id in self._stops:
                await asyncio.sleep(0.002)
                if (save := self._stops.pop(job.id, None)) is not None:
                    if save:
                        yield self._saved(job, step, chain, "state")
                    yield JobEnded(id=job.id, outcome="paused" if save else "cancelled")
                    return
            await asyncio.sleep(0.002)
            step += 1
            chain = hashlib.sha256(f"{chain}{step}".encode()).hexdigest()
            self.steps.append(step)
            yield TrainingStep(
                id=job.id,
                metrics=Metrics(step=step, train_loss=int(chain[:4], 16) / 7),
                total_steps=STEPS,
                learning_rate=0.1,
                grad_norm=1.0,
                trained_tokens=step * 10,
                seconds=0.01,
                busy_seconds=0.01,
            )
            if step % (job.plan.checkpoint_every or STEPS) == 0 and step < STEPS:
                yield self._saved(job, step, chain, "checkpoint")
        yield self._saved(job, step, chain, "final")
        yield JobEnded(id=job.id, outcome="succeeded")

    def _saved(self, job: StartJob, step: int, chain: str, kind: Any) -> Checkpoint:
        directory = Path(job.directory) / "checkpoints" / f"step-{step}"
        write_adapter(directory, int(chain[:8], 16))
        (directory / "state.json").write_text(json.dumps([step, chain]))
        loss = Metrics(step=step, train_loss=int(chain[:4], 16) / 7)
        return Checkpoint(id=job.id, metrics=loss, directory=str(directory), trained_tokens=step * 10, kind=kind)

    async def stop_job(self, message: StopJob) -> None:
        self._stops[message.id] = message.save


class Sharer(Site):
    """One run of a server over `root`, whose object store is at `url`."""

    def __init__(self, root: Path, url: str, **settings: Any) -> None:
        root.mkdir(exist_ok=True)
        chosen = {"store_poll_seconds": 0.1, "job_lease_seconds": LEASE, "served_model_name": "tiny"}
        super().__init__(root, tiny_text(), adapter_store=url, **dict[str, Any](chosen) | settings)
        assert isinstance(self.engine, PretendingEngine)
        self.trainer = self.engine
        self.tuning = self.services.tuning
        self.jobs = self.tuning.jobs
        assert self.tuning.manager.sharing is not None
        self.sharing = self.tuning.manager.sharing
        self.http = self.client()

    def open_engine(self) -> IdleEngine:
        return PretendingEngine()

    def open_store(self, root: Path) -> AdapterStore:
        assert self.settings.adapter_store is not None
        remote = RemoteStore(self.settings.adapter_store)
        return AdapterStore(root / "store", remote, remote=remote)

    async def die(self) -> None:
        """Stop as by `kill -9`: no lease is released."""
        await self.sharing.stop()
        for job in list(self.tuning.manager.tasks):
            await self.tuning.manager.abandon(job)
        await threads_at_rest()

    # --- common operations ---------------------------------------------------------------------------------

    async def ask(self, method: str, path: str, **options: Any) -> Any:
        response = await self.http.request(method, path, **options)
        assert response.status_code == 200, response.text
        return response.json()

    async def upload(self, content: bytes = EXAMPLES, purpose: str = "fine-tune") -> str:
        files = {"file": ("data.jsonl", content)}
        return str((await self.ask("POST", "/v1/files", files=files, data={"purpose": purpose}))["id"])

    async def create(self, file: str | None = None, **body: Any) -> str:
        fields = {"model": "tiny", "training_file": file or await self.upload(), "seed": 3}
        every = {"training": {"checkpoint_every": 2}}
        return str((await self.ask("POST", "/v1/fine_tuning/jobs", json=fields | every | body))["id"])

    async def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = await self.ask("GET", f"/v1/fine_tuning/jobs/{job_id}")
        return found

    async def steer(self, job_id: str, verb: str) -> dict[str, Any]:
        found: dict[str, Any] = await self.ask("POST", f"/v1/fine_tuning/jobs/{job_id}/{verb}")
        return found

    async def until(self, job_id: str, status: str, *, step: int = 0) -> dict[str, Any]:
        """Wait until the job has this status and at least this step; return it."""
        async with asyncio.timeout(180):
            while True:
                job = await self.job(job_id)
                if job["status"] == status and job["step"] >= step:
                    return job
                ended = job["status"] in ("succeeded", "failed", "cancelled")
                assert not ended, (job, await self.messages(job_id))
                await asyncio.sleep(0.02)

    async def events(self, job_id: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.ask("GET", f"/v1/fine_tuning/jobs/{job_id}/events?limit=1000"))[
            "data"
        ]
        return found[::-1]

    async def messages(self, job_id: str) -> list[str]:
        return [event["message"] for event in await self.events(job_id)]

    def result(self, job: dict[str, Any]) -> str:
        """The digest of what a job has made, wherever it was made."""
        self.store.import_changes()
        return self.store.get(TENANT, job["fine_tuned_model"]).digest


@asynccontextmanager
async def sharer(root: Path, url: str, **settings: Any) -> AsyncIterator[Sharer]:
    """A server that continues from the contents of `root` and the store."""
    site = Sharer(root, url, **settings)
    await site.tuning.start()
    try:
        yield site
    finally:
        await site.tuning.stop()
        await site.http.aclose()
        site.services.text.close()
        site.close()
