"""Clients steer jobs while engine and server come and go, at random: one task a job, the same adapter in the end."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from server.finetune.jobs import Job
from server.finetune.manager import JobManager
from server.finetune.worker import Worker
from server.services import TENANT
from tests.support.site import FINAL, TrainingEngine, TuningSite, eventually, tuning_site

BODY = {"hyperparameters": {"n_epochs": 4, "batch_size": 3}, "training": {"checkpoint_every": 2}, "seed": 3}
JOBS = 2
MOVES = 14


def working() -> Counter[str]:
    """How many tasks there are, by job."""
    return Counter(name for task in asyncio.all_tasks() if (name := task.get_name()).startswith("ftjob-"))


@pytest.fixture
def one_task_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """No job is begun while a task still works on it."""
    start_tasks = Worker.start_tasks

    def watched(worker: JobManager, jobs: Sequence[Job]) -> None:
        assert not working().keys() & {job.id for job in jobs}
        start_tasks(worker, jobs)

    monkeypatch.setattr(JobManager, "start_tasks", watched)


async def steer(site: TuningSite, job: str, verb: str) -> None:
    """A wish that may come too late, or too early."""
    response = await site.steer(job, verb)
    assert response.status_code in (200, 400), response.text
    if response.status_code == 400:
        assert response.json()["error"]["code"] == "invalid_job_state"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("one_task_each")
async def test_jobs_steered_at_random_end_as_undisturbed_ones(
    tmp_path: Path, engine: TrainingEngine, seed: int
) -> None:
    async with tuning_site(tmp_path / "whole", engine) as site:
        whole = await site.until((await site.create(**BODY))["id"])
        expected = site.store.get(TENANT, whole["fine_tuned_model"]).digest
    choose = random.Random(seed)
    root = tmp_path / "steered"
    async with AsyncExitStack() as stack:
        life = await stack.enter_async_context(AsyncExitStack())
        site = await life.enter_async_context(tuning_site(root, engine, max_training_jobs=1 + seed % 2))
        jobs = [(await site.create(**BODY))["id"] for _ in range(JOBS)]
        for _ in range(MOVES):
            match choose.choice(("steer", "steer", "steer together", "restart", "kill", "wait")):
                case "steer":
                    await steer(site, choose.choice(jobs), choose.choice(("pause", "resume")))
                case "steer together":
                    wishes = [(choose.choice(jobs), choose.choice(("pause", "resume"))) for _ in range(4)]
                    await asyncio.gather(*(steer(site, *wish) for wish in wishes))
                case "restart":
                    await life.aclose()
                    assert not working()
                    site = await life.enter_async_context(tuning_site(root, engine, max_training_jobs=1 + seed % 2))
                case "kill" if all(site.tuning.jobs.get(TENANT, job).deaths == 0 for job in jobs):
                    engine.kill()
                case _:
                    await asyncio.sleep(choose.random() / 20)
            assert all(count == 1 for count in working().values())
        await steer(site, jobs[1], "cancel")
        async with asyncio.timeout(120):
            while (await site.job(jobs[0]))["status"] not in FINAL:
                await steer(site, jobs[0], "resume")
                await asyncio.sleep(0.01)
        done = await site.job(jobs[0])
        assert done["status"] == "succeeded", await site.messages(jobs[0])
        assert site.store.get(TENANT, done["fine_tuned_model"]).digest == expected
        assert (await site.job(jobs[1]))["status"] in ("cancelled", "succeeded")
        await eventually(lambda: not working())
        assert list((root / "jobs").iterdir()) == []
