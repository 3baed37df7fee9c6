"""Jobs and files shared by several servers through one object store."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from adapters.storage.bucket import Bucket
from adapters.storage.versions import RemoteUnavailable
from server.finetune import manager, shared_jobs, sharing
from server.finetune.jobs import JobStateError
from server.services import TENANT
from tests.support.buckets import S3Server
from tests.support.several import EXAMPLES, STEPS, Sharer, asleep, sharer, take_over


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/bucket"


@pytest.fixture
async def lives(tmp_path: Path, url: str) -> AsyncIterator["Lives"]:
    async with AsyncExitStack() as stack:
        yield Lives(tmp_path, url, stack)


class Lives:
    """Opens servers for a test."""

    def __init__(self, root: Path, url: str, stack: AsyncExitStack) -> None:
        self.root, self.url, self._stack = root, url, stack

    async def open(self, name: str, **settings: Any) -> Sharer:
        return await self._stack.enter_async_context(sharer(self.root / name, self.url, **settings))


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "SPACE_SECONDS", 0.05)
    monkeypatch.setattr(sharing, "_RENEWALS", 60)


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - a thread's doing
            await asyncio.sleep(0.02)


async def whole(site: Sharer, file: str) -> str:
    """The result of an undisturbed job."""
    return site.result(await site.until(await site.create(file), "succeeded"))


def statuses(site: Sharer) -> list[str]:
    return sorted(job.status for job in site.jobs.page(TENANT, limit=9)[0])


def steps_of(events: list[dict[str, Any]]) -> list[int]:
    return [event["data"]["step"] for event in events if event["type"] == "metrics"]


async def test_another_server_resumes_the_job_of_one_that_died_and_ends_with_the_same_bytes(lives: Lives) -> None:
    one, two = await lives.open("one"), await lives.open("two", max_training_jobs=1)
    file = await one.upload()
    expected = await whole(one, file)
    two.sharing.records._max_held = 0  # takes no jobs
    one.trainer.until, one.trainer.steps = 6, []
    job_id = await one.create(file)
    await one.until(job_id, "running", step=5)
    await two.until(job_id, "running", step=4)
    await one.http.delete(f"/v1/files/{file}")
    await one.die()
    await take_over(two.sharing, job_id)
    done = await two.until(job_id, "succeeded")
    assert two.result(done) == expected
    assert one.trainer.steps == [1, 2, 3, 4, 5]
    assert two.trainer.steps == [5, 6, 7, 8]  # from the last checkpoint
    assert steps_of(await two.events(job_id)) == [1, 2, 3, 4, 5, 6, 7, 8]
    checkpoints = (await two.ask("GET", f"/v1/fine_tuning/jobs/{job_id}/checkpoints"))["data"]
    assert [one["step_number"] for one in checkpoints] == [8, 6, 4, 2]
    content = await two.http.get(f"/v1/files/{done['result_files'][0]}/content")
    assert len(content.text.splitlines()) == STEPS + 1
    await until(lambda: not Bucket(lives.url).list("job-files"))


async def test_files_and_jobs_of_one_server_are_visible_at_others(lives: Lives) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    file = await one.upload()
    assert (await two.http.get(f"/v1/files/{file}/content")).content == EXAMPLES
    one.trainer.until = two.trainer.until = 0
    job_id = await one.create(file)
    assert (await two.job(job_id))["id"] == job_id  # without waiting for a poll
    other = await one.create(file)
    await until(lambda: len(two.jobs.page(TENANT, limit=9)[0]) == 2)
    assert [job.id for job in two.jobs.page(TENANT, limit=9)[0]] == [other, job_id]
    third = await lives.open("three")
    assert [job.id for job in third.jobs.page(TENANT, limit=9)[0]] == [other, job_id]
    assert [found["id"] for found in (await third.ask("GET", "/v1/files"))["data"]] == [file]
    await two.ask("DELETE", f"/v1/files/{file}")
    for name, site in {"one": one, "two": two, "three": third}.items():
        await until(lambda files=site.tuning.files: files.page(TENANT, limit=9)[0] == [])
        assert not (lives.root / name / "files" / file).exists()
        assert (await site.http.get(f"/v1/files/{file}")).status_code == 404


async def test_the_first_of_two_files_with_one_id_is_kept(lives: Lives) -> None:
    """As when a batch's results are written again by a server that assumed the first one dead."""
    one, two = await lives.open("one"), await lives.open("two")
    for site, content in ((one, b"first"), (two, b"other")):
        with site.tuning.files.staging() as staging:
            (staging / "a").write_bytes(content)
            site.tuning.files.add(TENANT, staging / "a", filename="a", purpose="batch_output", file_id="file-same")
    for site in (one, two, await lives.open("three")):
        assert (await site.http.get("/v1/files/file-same/content")).content == b"first"
    assert len(Bucket(lives.url).list("file-contents")) == 1
    await two.ask("DELETE", "/v1/files/file-same")
    assert Bucket(lives.url).list("file-contents") == []


async def test_jobs_are_shared_out_among_servers_with_room(lives: Lives) -> None:
    one, two = await lives.open("one", max_training_jobs=1), await lives.open("two", max_training_jobs=1)
    one.trainer.until = two.trainer.until = 3
    file = await one.upload()
    jobs = [await one.create(file) for _ in range(3)]
    await until(lambda: one.trainer.steps == two.trainer.steps == [1, 2])
    await until(lambda: statuses(one) == statuses(two) == ["running", "running", "validating_files"])
    one.trainer.until = two.trainer.until = STEPS + 1
    digests = [one.result(await one.until(job, "succeeded")) for job in jobs]
    assert len(set(digests)) == 1


async def running_at_one(lives: Lives) -> tuple[Sharer, Sharer, str]:
    one, two = await lives.open("one"), await lives.open("two")
    two.sharing.records._max_held = 0
    one.trainer.until = 4
    job_id = await one.create()
    await two.until(job_id, "running", step=3)
    return one, two, job_id


async def test_a_refused_wish_tells_the_task_what_another_server_has_changed(lives: Lives) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    two.sharing.records._max_held = 0
    one.trainer.until = 3  # no reply comes from the engine any more
    job_id = await one.create()
    await one.until(job_id, "running", step=2)
    await two.until(job_id, "running")
    await asleep(one.sharing)
    await two.steer(job_id, "cancel")
    refused = await one.http.post(f"/v1/fine_tuning/jobs/{job_id}/pause")
    assert refused.status_code == 400
    await one.sharing.poll()  # there is no news of the job in the store
    await until(lambda: not one.tuning.manager.tasks)


async def test_a_job_is_cancelled_at_another_server(lives: Lives) -> None:
    one, two, job_id = await running_at_one(lives)
    assert (await two.steer(job_id, "cancel"))["status"] == "cancelled"
    await until(lambda: not one.tuning.manager.tasks)
    assert one.jobs.get(TENANT, job_id).status == "cancelled"
    assert one.trainer.steps == [1, 2, 3]
    await until(lambda: not Bucket(lives.url).list("job-files"))
    refused = await one.http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_job_state")


async def test_a_job_is_paused_at_one_server_and_resumed_by_another(lives: Lives) -> None:
    one, two, job_id = await running_at_one(lives)
    assert (await two.steer(job_id, "pause"))["status"] == "pausing"
    await two.until(job_id, "paused")
    await until(lambda: one.sharing.records.leases.held_keys() == [])
    one.sharing.records._max_held, two.sharing.records._max_held = 0, 1
    assert (await one.steer(job_id, "resume"))["status"] == "queued"
    done = await one.until(job_id, "succeeded")
    assert two.trainer.steps == [4, 5, 6, 7, 8]
    one.sharing.records._max_held, one.trainer.until = 1, STEPS + 1
    two.sharing.records._max_held = 0
    assert one.result(done) == await whole(one, done["training_file"])


async def test_a_server_that_stops_hands_its_jobs_over_at_once(lives: Lives) -> None:
    one, two, job_id = await running_at_one(lives)
    await one.tuning.stop()
    two.sharing.records._max_held = 1
    await two.until(job_id, "succeeded")


async def test_a_server_that_cannot_renew_its_lease_stops_and_writes_nothing_more(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, job_id = await running_at_one(lives)

    def fail(*_: object, **__: object) -> None:
        raise RemoteUnavailable("no route")

    cut_off = one.sharing.records._bucket
    with monkeypatch.context() as patch:
        for method in ("read", "list", "put_if", "put_file"):
            patch.setattr(cut_off, method, fail)
        one.sharing.records.leases.seconds = 0.5
        await until(lambda: not one.tuning.manager.tasks)
        assert one.sharing.records.leases.held_keys() == []
        one.sharing.records._max_held = 0
        await take_over(two.sharing, job_id)
        with pytest.raises(JobStateError):
            one.jobs.move(one.jobs.get(TENANT, job_id), "succeeded")
    one.jobs.add_event(job_id, "a thought of its own")
    done = await two.until(job_id, "succeeded")
    await until(lambda: one.jobs.get(TENANT, job_id).status == "succeeded")
    assert await one.events(job_id) == await two.events(job_id)
    assert one.trainer.steps == [1, 2, 3]
    assert two.result(done)


async def test_a_server_that_was_asleep_writes_nothing_over_what_another_did(lives: Lives) -> None:
    """By its own clock it still holds the lease; in the store it does not."""
    one, two, job_id = await running_at_one(lives)
    await asleep(one.sharing)
    await take_over(two.sharing, job_id)
    assert one.sharing.records.leases.holds(job_id)
    one.trainer.until = STEPS + 1
    await until(lambda: not one.tuning.manager.tasks)
    done = await two.until(job_id, "succeeded")
    assert steps_of(await two.events(job_id)) == list(range(1, STEPS + 1))
    messages = await two.messages(job_id)
    assert messages.count("The job has successfully completed") == 1
    assert len(done["result_files"]) == 1


async def test_long_logs_are_the_same_everywhere(lives: Lives, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_jobs, "_TAIL", 3)
    one, two, job_id = await running_at_one(lives)
    await two.steer(job_id, "pause")
    await two.until(job_id, "paused")
    await two.steer(job_id, "resume")
    bucket = Bucket(lives.url)
    bucket.put_if(f"job-logs/{job_id}/never-named.json", b"[]", None)  # as left by a change that was retried
    one.trainer.until = STEPS + 1
    await one.until(job_id, "succeeded")
    await two.until(job_id, "succeeded")
    third = await lives.open("three")
    events = await one.events(job_id)
    assert steps_of(events) == list(range(1, STEPS + 1))
    assert await two.events(job_id) == events
    assert await third.events(job_id) == events
    await until(lambda: not bucket.list("job-files"))
    await until(lambda: {entry.path for entry in bucket.list("job-logs")} == segments_of(one, job_id))
    assert len(segments_of(one, job_id)) > 2
    assert third.jobs.steps(job_id) == one.jobs.steps(job_id)


def segments_of(site: Sharer, job_id: str) -> set[str]:
    """Names of the objects of a job's log."""
    content = site.sharing.records._stored.fetch(job_id).content
    assert content is not None
    return {segment["name"] for segment in content["segments"]}


async def test_local_jobs_and_files_continue_with_a_new_store(lives: Lives, tmp_path: Path) -> None:
    one = await lives.open("one")
    one.trainer.until = 4
    other = await one.upload(purpose="batch")
    job_id = await one.create()
    await one.until(job_id, "running", step=3)
    await one.die()
    bucket = Bucket(lives.url)
    for prefix in ("jobs", "job-files", "job-logs", "files", "file-contents"):
        bucket.delete([entry.path for entry in bucket.list(prefix)])
    two = await lives.open("two")
    again = await lives.open("one", max_training_jobs=0)
    await two.until(job_id, "succeeded")
    assert min(two.trainer.steps) == 3
    listed = [site.ask("GET", "/v1/files?purpose=batch") for site in (two, again)]
    assert [[file["id"] for file in (await one)["data"]] for one in listed] == [[other], [other]]
    assert (await two.http.get(f"/v1/files/{other}/content")).content == EXAMPLES


async def test_while_the_store_is_down_nothing_is_begun_and_nothing_lost(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await lives.open("one")
    file = await one.upload()

    def fail(*_: object, **__: object) -> None:
        raise RemoteUnavailable("no route")

    with monkeypatch.context() as patch:
        for method in ("read", "list", "put_if", "put_file"):
            patch.setattr(Bucket, method, fail)
        body = {"model": "tiny", "training_file": file}
        response = await one.http.post("/v1/fine_tuning/jobs", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "adapter_store_unavailable")
        response = await one.http.post("/v1/files", files={"file": b"{}"}, data={"purpose": "batch"})
        assert response.status_code == 503
        assert (await one.ask("GET", "/v1/fine_tuning/jobs"))["data"] == []
        assert len((await one.ask("GET", "/v1/files"))["data"]) == 1
        await asyncio.sleep(0.3)
    await one.until(await one.create(file), "succeeded")


async def test_a_bucket_that_fails_often_costs_no_step(tmp_path: Path, s3: S3Server, s3_url: str) -> None:
    async with sharer(tmp_path / "two", s3_url) as two:
        two.sharing.records._max_held = 0
        async with AsyncExitStack() as stack:
            one = await stack.enter_async_context(sharer(tmp_path / "one", s3_url))
            file = await one.upload()
            expected = await whole(one, file)
            s3.suffer(
                ("lost", "PUT", "jobs/", 3),
                ("busy", "PUT", "jobs/", 4),
                ("busy", "GET", "job", 7),
                ("lost", "PUT", "job-files/", 5),
                ("late", "LIST", "jobs", 2),
            )
            one.trainer.until = 6
            job_id = await one.create(file)
            await one.until(job_id, "running", step=5)
            await one.die()
            await take_over(two.sharing, job_id)
            done = await two.until(job_id, "succeeded")
            s3.suffer()
        assert two.result(done) == expected
        assert steps_of(await two.events(job_id)) == list(range(1, STEPS + 1))
        ids = [event["id"] for event in await two.events(job_id)]
        assert len(set(ids)) == len(ids)
