"""Clients steer jobs at several servers while these come and go, at random: nothing is done twice or left behind."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from adapters.storage.bucket import Bucket
from server.finetune import manager, sharing
from server.finetune.jobs import Job
from server.finetune.manager import JobManager
from server.finetune.worker import Worker
from tests.support.several import LEASE, STEPS, Sharer, sharer
from tests.support.site import FINAL, eventually

MOVES = 14


class Fleet:
    """Two servers on one store, each in its own life."""

    def __init__(self, root: Path) -> None:
        self.url = f"file://{root}/bucket"
        self.servers: list[Sharer] = []
        self._root = root
        self._lives: list[AsyncExitStack] = []
        self._opened = 0

    async def open(self, place: int) -> None:
        """A new server, with a disk of its own, in the place of one that has gone."""
        life = AsyncExitStack()
        self._opened += 1
        server = await life.enter_async_context(sharer(self._root / f"disk-{self._opened}", self.url))
        self.servers[place : place + 1], self._lives[place : place + 1] = [server], [life]

    async def restart(self, place: int) -> None:
        await self._lives[place].aclose()
        await self.open(place)

    async def die(self, place: int) -> None:
        """By `kill -9`; the other server has waited for as long as the leases last."""
        held = self.servers[place].sharing.records.leases.held_keys()
        await self.servers[place].die()
        for key in held:
            self.servers[place].sharing.records.leases.drop(key)  # or it would be given back
        await self._lives[place].aclose()
        self.pass_by(held)
        await self.open(place)

    def pass_by(self, leases: Sequence[str]) -> None:
        """The time that these last, for all servers that do not hold them."""
        for server in self.servers:
            theirs = server.sharing.records.leases
            for key in leases:
                if key in theirs._seen and not theirs.holds(key):
                    lease, since = theirs._seen[key]
                    theirs._seen[key] = lease, since - LEASE

    def lost(self, job: str) -> bool:
        return not any(server.sharing.records.holds(job) for server in self.servers)

    async def close(self) -> None:
        for life in self._lives:
            await life.aclose()


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    fleet = Fleet(tmp_path)
    for place in range(2):
        await fleet.open(place)
    yield fleet
    await fleet.close()


@pytest.fixture(autouse=True)
def _one_task_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server begins with a job while a task of its own still works on it."""
    monkeypatch.setattr(manager, "SPACE_SECONDS", 0.05)
    monkeypatch.setattr(sharing, "_RENEWALS", 60)
    start_tasks = Worker.start_tasks

    def watched(worker: JobManager, jobs: Sequence[Job]) -> None:
        assert not worker.tasks.keys() & {job.id for job in jobs}
        start_tasks(worker, jobs)

    monkeypatch.setattr(JobManager, "start_tasks", watched)


async def steer(server: Sharer, job: str, verb: str) -> bool:
    """Whether a wish did not come too late, or too early."""
    response = await server.http.post(f"/v1/fine_tuning/jobs/{job}/{verb}")
    assert response.status_code in (200, 400), response.text
    return response.status_code == 200


@pytest.mark.parametrize("seed", range(4))
async def test_jobs_steered_at_random_end_as_undisturbed_ones(fleet: Fleet, seed: int) -> None:
    choose, servers = random.Random(seed), fleet.servers
    file = await servers[0].upload()
    undisturbed = await servers[0].until(await servers[0].create(file), "succeeded")
    jobs = [await choose.choice(servers).create(file) for _ in range(2)]
    for _ in range(MOVES):
        match choose.choice(("steer", "steer", "steer together", "restart", "die", "hold", "wait")):
            case "steer":
                await steer(choose.choice(servers), choose.choice(jobs), choose.choice(("pause", "resume")))
            case "steer together":
                wishes = [
                    (choose.choice(servers), choose.choice(jobs), choose.choice(("pause", "resume"))) for _ in "1234"
                ]
                await asyncio.gather(*(steer(*wish) for wish in wishes))
            case "restart":
                await fleet.restart(choose.randrange(2))
            case "die":
                await fleet.die(choose.randrange(2))
            case "hold":
                choose.choice(servers).trainer.until = choose.randrange(2, STEPS)
            case _:
                await asyncio.sleep(choose.random() / 10)
    for server in servers:
        server.trainer.until = STEPS + 1
    cancelled = await steer(choose.choice(servers), jobs[1], "cancel")
    async with asyncio.timeout(120):
        while (await servers[0].job(jobs[0]))["status"] not in FINAL:
            await steer(choose.choice(servers), jobs[0], "resume")
            fleet.pass_by([job for job in jobs if fleet.lost(job)])
            await asyncio.sleep(0.05)
    done, said = await servers[0].job(jobs[0]), await servers[0].events(jobs[0])
    assert done["status"] == "succeeded", said
    assert servers[0].result(done) == servers[0].result(undisturbed)
    assert [event["data"]["step"] for event in said if event["type"] == "metrics"] == list(range(1, STEPS + 1))
    await eventually(lambda: not any(server.tuning.manager.tasks for server in servers))
    if cancelled:
        await servers[0].until(jobs[1], "cancelled")
        await eventually(lambda: not any((server.settings.data_dir / "jobs" / jobs[1]).exists() for server in servers))
        await eventually(lambda: not Bucket(fleet.url).list(f"job-files/{jobs[1]}"))
