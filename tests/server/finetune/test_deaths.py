"""Jobs whose engine dies or is down: two attempts at most, across restarts of the server, and cancel and pause work."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from server.client.engine import EngineDied
from server.engine.engine import Engine
from server.errors import EngineUnavailable
from server.messages.training import JobReply, MemoryPlan, PlanMemory, StartJob, StopJob
from server.services import TENANT
from tests.support.site import TrainingEngine, eventually, tuning_site


class FragileEngine(TrainingEngine):
    """Dies at a chosen point and is up again at once; or stays down.

    Attributes:
        dies_of: "planning" or "training", or empty.
        deaths: number of deaths so far.
        started: number of jobs sent to it.
        down: it accepts no message and sends none.
    """

    dies_of = ""
    deaths = 0
    started = 0

    @property
    def down(self) -> bool:
        return self.unready_reason is not None

    def go_down(self) -> None:
        self.unready_reason = "the engine died 3 times in a row"
        self.kill()

    async def plan_memory(self, asked: PlanMemory) -> MemoryPlan:
        if self.dies_of == "planning":
            self.deaths += 1
            raise EngineDied("died")
        return await super().plan_memory(asked)

    async def train(self, job: StartJob) -> AsyncGenerator[JobReply, None]:
        if self.dies_of == "training":
            self.deaths += 1
            raise EngineDied("died")
        self.started += 1
        async with aclosing(super().train(job)) as replies:
            async for reply in replies:
                yield reply

    async def stop_job(self, message: StopJob) -> None:
        if self.down:
            raise EngineUnavailable("down")
        await super().stop_job(message)


@pytest.fixture
def engine(tiny_engine: Engine) -> Iterator[FragileEngine]:
    engine = FragileEngine(tiny_engine)
    yield engine
    engine.close()


@pytest.mark.parametrize("reason", ["planning", "training"])
async def test_a_job_that_two_engines_died_of_fails_and_the_next_one_trains(
    tmp_path: Path, engine: FragileEngine, reason: str
) -> None:
    engine.dies_of = reason
    async with tuning_site(tmp_path / "data", engine) as site:
        failed = await site.until((await site.create())["id"])
        assert (failed["status"], failed["error"]["code"]) == ("failed", "engine_died")
        assert engine.deaths == 2
        engine.dies_of = ""
        assert (await site.until((await site.create())["id"]))["status"] == "succeeded"


async def test_deaths_are_counted_across_restarts_and_forgotten_with_a_checkpoint(
    tmp_path: Path, engine: FragileEngine
) -> None:
    async with tuning_site(tmp_path / "data", engine) as site:
        engine.held = True
        job = await site.create(training={"checkpoint_every": 1})
        jobs, id_ = site.tuning.jobs, job["id"]
        await site.until(id_, "running")
        await eventually(lambda: engine.started == 1)
        engine.kill()
        await eventually(lambda: jobs.get(TENANT, id_).deaths == 1)
    async with tuning_site(tmp_path / "data", engine) as site:
        await site.until(id_, "running")
        assert site.tuning.jobs.get(TENANT, id_).deaths == 1
        engine.held = False
        assert (await site.until(id_))["status"] == "succeeded"
        assert site.tuning.jobs.get(TENANT, id_).deaths == 0
        engine.held, engine.started = True, 0
        id_ = (await site.create())["id"]
        await eventually(lambda: engine.started == 1)
        engine.kill()
        await eventually(lambda: site.tuning.jobs.get(TENANT, id_).deaths == 1)
    engine.started = 0
    async with tuning_site(tmp_path / "data", engine) as site:
        await eventually(lambda: engine.started == 1)
        engine.kill()
        assert (await site.until(id_))["error"]["code"] == "engine_died"


@pytest.mark.parametrize(("verb", "status"), [("cancel", "cancelled"), ("pause", "paused")])
async def test_a_job_is_stopped_while_the_engine_is_down(
    tmp_path: Path, engine: FragileEngine, verb: str, status: str
) -> None:
    async with tuning_site(tmp_path / "data", engine) as site:
        engine.held = True
        job = await site.create()
        await site.until(job["id"], "running")
        await eventually(lambda: engine.started == 1)
        engine.go_down()
        async with asyncio.timeout(60):
            while "The engine restarts" not in (await site.messages(job["id"]))[-1]:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.005)
        assert (await site.steer(job["id"], verb)).json()["status"] == status
        directory = site.settings.data_dir / "jobs" / job["id"]
        assert directory.exists() == (status == "paused")
        engine.unready_reason, engine.held = None, False
        assert (await site.until((await site.create())["id"]))["status"] == "succeeded"  # the slot is free


async def test_a_job_resumed_before_it_has_paused_ends_up_running(tmp_path: Path, engine: FragileEngine) -> None:
    async with tuning_site(tmp_path / "data", engine) as site:
        whole = await site.until((await site.create())["id"])
        engine.held = True
        job = await site.create()
        await site.until(job["id"], "running")
        await eventually(lambda: engine.started == 2)
        assert (await site.steer(job["id"], "pause")).json()["status"] == "pausing"
        resumed = await site.steer(job["id"], "resume")
        assert (resumed.status_code, resumed.json()["status"]) == (200, "running")
        engine.held = False
        done = await site.until(job["id"])
        assert done["status"] == "succeeded"
        digests = {site.store.get(TENANT, found["fine_tuned_model"]).digest for found in (whole, done)}
        assert len(digests) == 1
