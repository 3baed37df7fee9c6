"""A full disk: writers respond 507, jobs wait for space (or for a busy database), and deletions work."""

import asyncio
import contextlib
import errno
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from adapters.disk import StorageFull
from server.children.programs import work
from server.engine.engine import Engine
from server.finetune import manager
from server.finetune.database import open_database
from server.services import TENANT
from tests.support.publishing import held
from tests.support.site import EXAMPLES, TrainingEngine, TuningSite, as_file, eventually, tuning_site
from tests.support.tiny import tiny_adapter

DISK_MIB = 16


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of `DISK_MIB`."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs to mount a tmpfs, which only root may (and not in every container)")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
async def site(disk: Path, tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TuningSite]:
    monkeypatch.setattr(manager, "SPACE_SECONDS", 0.05)
    engine = TrainingEngine(tiny_engine)
    async with tuning_site(disk / "data", engine, database_seconds=1.0) as site:
        yield site
    engine.close()


def fill(disk: Path) -> Path:
    """Fill the disk, and return the file that fills it."""
    with contextlib.suppress(OSError), (disk / "filling").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    return disk / "filling"


async def test_every_writer_answers_507_and_everything_can_be_deleted(
    site: TuningSite, disk: Path, model_dir: Path, tmp_path: Path
) -> None:
    publisher = site.services.registry.publisher
    await publisher.import_directory(TENANT, "mine", tiny_adapter(tmp_path / "adapter", model_dir))
    files = [await site.upload() for _ in range(3)]
    site.engine.held = True
    running = (await site.create(training_file=files[0]))["id"]
    await site.until(running, "running")
    waiting = (await site.create(training_file=files[0]))["id"]
    await site.until(waiting, "queued")
    evaluation = {"model": "tiny", "file": files[0]}
    site.engine.unready_reason = "busy"
    evaluating = (await site.client.post("/v1/evaluations", json=evaluation)).json()["id"]
    fill(disk)
    job: dict[str, Any] = {"model": "tiny", "training_file": files[0]}
    for path, body in (
        ("/v1/files", {"files": as_file(EXAMPLES * 9), "data": {"purpose": "fine-tune"}}),
        ("/v1/fine_tuning/jobs", {"json": job}),
        ("/v1/fine_tuning/jobs", {"json": job | {"model": "mine"}}),
        ("/v1/evaluations", {"json": evaluation}),
    ):
        for _ in range(60):  # until the pages allocated for the write-ahead log are used up
            response = await site.client.post(path, **body)
            if response.status_code != 200:
                break
        assert (response.status_code, response.json()["error"]["code"]) == (507, "storage_full"), (path, response.text)
    assert (await site.steer(waiting, "pause")).json()["status"] == "paused"
    for path in (
        f"/v1/evaluations/{evaluating}",
        "/v1/models/mine",
        *(f"/v1/files/{file}" for file in files),
    ):
        gone = await site.client.delete(path)
        assert gone.status_code == 200, (path, gone.text)
        fill(disk)
    for id_ in (running, waiting):
        assert (await site.steer(id_, "cancel")).json()["status"] == "cancelled"
        fill(disk)


@pytest.mark.usefixtures("forked_helpers")
async def test_a_mix_and_a_merge_that_find_no_room_are_507s(
    site: TuningSite, disk: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    object.__setattr__(site.settings, "model", str(model_dir))
    publisher = site.services.registry.publisher
    for seed, name in enumerate(("mine", "yours")):
        adapter = tiny_adapter(tmp_path / name, model_dir, seed=seed)
        await publisher.import_directory(TENANT, name, adapter)
    mix = {"name": "ours", "mix": [{"adapter": "mine"}, {"adapter": "yours"}], "method": "cat"}
    orders: dict[str, dict[str, Any]] = {"/v1/adapters": mix, "/v1/adapters/mine/merge": {"to": "checkpoint"}}
    filling = fill(disk)
    for path, body in orders.items():
        response = await site.client.post(path, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (507, "storage_full"), response.text
    assert not list((site.settings.data_dir / "adapters" / "staging").iterdir())
    assert not list((site.settings.data_dir / "checkpoints").glob("*"))
    assert (await site.client.delete("/v1/models/yours")).status_code == 200
    filling.unlink()
    merge = "/v1/adapters/mine/merge"
    assert (await site.client.post(merge, json=orders[merge])).status_code == 201
    fill(disk)
    assert (await site.client.delete(merge)).json()["deleted"] == ["checkpoint"]
    assert (await site.client.delete("/v1/models/mine")).status_code == 200


async def test_a_running_job_is_paused_while_the_disk_is_full_and_goes_on(site: TuningSite, disk: Path) -> None:
    files = [await site.upload() for _ in range(2)]
    whole = (await site.until((await site.create(training_file=files[0]))["id"]))["fine_tuned_model"]
    expected = site.store.get(TENANT, whole).digest
    site.engine.held = True
    job = (await site.create(training_file=files[0]))["id"]
    await site.until(job, "running")
    filling = fill(disk)
    paused = await site.steer(job, "pause")
    assert (paused.status_code, paused.json()["status"]) == (200, "pausing"), paused.text
    site.engine.held = False
    await site.until(job, "paused")
    fill(disk)
    assert (await site.client.delete(f"/v1/files/{files[1]}")).status_code == 200
    assert (await site.client.delete(f"/v1/models/{whole}")).status_code == 200
    filling.unlink()
    await asyncio.sleep(0.2)
    assert (await site.job(job))["status"] == "paused", "a job paused by its owner stays paused"
    assert (await site.steer(job, "resume")).status_code == 200
    done = await site.until(job)
    assert done["status"] == "succeeded"
    assert site.store.get(TENANT, done["fine_tuned_model"]).digest == expected


def test_a_database_opened_on_a_full_disk_can_delete_rows(disk: Path) -> None:
    database = open_database(disk / "db")
    with database.transaction() as connection:
        connection.execute("INSERT INTO jobs (id, tenant, status, record) VALUES ('a', '', 'failed', '{}')")
    database.close()
    fill(disk)
    database = open_database(disk / "db")
    with pytest.raises(StorageFull), database.transaction():
        pass
    with database.transaction(removing=True) as connection:
        connection.execute("DELETE FROM jobs")
    with database.reading() as connection:
        assert connection.execute("SELECT COUNT(*) FROM jobs").fetchone()[0] == 0
    database.close()


def test_libraries_tell_of_a_full_disk_in_their_own_words(disk: Path) -> None:
    """The safetensors library has its own error type, raised in the process that writes a merged checkpoint."""
    fill(disk)
    order = {"function": f"{__name__}.write_much", "order": str(disk / "a")}
    assert json.loads(work.answer(json.dumps(order).encode()))["system"][0] == errno.ENOSPC


def write_much(path: Path) -> None:
    """The work of a helper process."""
    save_file({"a": np.zeros(9999)}, path)


async def test_a_job_that_meets_a_full_disk_waits_for_space_and_loses_nothing(site: TuningSite, disk: Path) -> None:
    """The disk fills up while a step's row, a checkpoint or the data is written, whichever comes first, repeatedly."""
    training = {"checkpoint_every": 2}
    whole = await site.until((await site.create(training=training))["id"])
    job = (await site.create(training=training))["id"]
    jobs, pauses = site.tuning.jobs, 0
    for step in (0, 1, 3):
        await eventually(lambda step=step: jobs.get(TENANT, job).step >= step)  # type: ignore[misc]
        filling = fill(disk)
        await eventually(lambda: jobs.get(TENANT, job).status in ("paused", "succeeded"))
        pauses += jobs.get(TENANT, job).status == "paused"
        filling.unlink()
    done = await site.until(job)
    assert done["status"] == "succeeded"
    assert pauses
    messages = await site.messages(job)
    assert sum("The disk is full" in message for message in messages) >= pauses
    assert "There is space again" in messages
    digests = [site.store.get(TENANT, str(found["fine_tuned_model"])).digest for found in (whole, done)]
    assert digests[0] == digests[1]


async def test_a_job_that_waits_for_space_takes_no_more_than_it_needs(site: TuningSite, disk: Path) -> None:
    """If many waiting jobs kept all their files, none would have the space to continue."""
    job = (await site.create(training={"checkpoint_every": 2}))["id"]
    checkpoints = disk / "data" / "jobs" / job / "checkpoints"
    await eventually(lambda: (checkpoints / "step-4" / "state.json").exists())
    (checkpoints / "step-90").mkdir()  # a checkpoint that could not be published for lack of space
    filling = fill(disk)
    await eventually(lambda: site.tuning.jobs.get(TENANT, job).waits_for_space)
    step = site.tuning.jobs.resumable(job)[0].metrics.step
    await eventually(lambda: [path.name for path in checkpoints.iterdir()] == [f"step-{step}"])
    filling.unlink()
    assert (await site.until(job))["status"] == "succeeded"


async def test_a_job_that_waits_for_space_is_paused_resumed_and_goes_on_after_a_restart(
    site: TuningSite, disk: Path
) -> None:
    site.engine.held = True
    job = (await site.create())["id"]
    await site.until(job, "running")
    filling = fill(disk)
    site.engine.held = False
    await site.until(job, "paused")
    assert (await site.steer(job, "pause")).status_code == 200
    filling.unlink()
    await asyncio.sleep(0.2)
    assert (await site.job(job))["status"] == "paused", "a job paused by its owner stays paused"
    site.engine.held = True
    assert (await site.steer(job, "resume")).json()["status"] == "queued"
    await site.until(job, "running")
    fill(disk)
    site.engine.held = False
    await eventually(lambda: site.tuning.jobs.get(TENANT, job).waits_for_space)
    await site.tuning.stop()
    (disk / "filling").unlink()
    await site.tuning.start()
    assert (await site.until(job))["status"] == "succeeded"


async def test_a_job_waits_for_a_database_that_another_process_holds(
    site: TuningSite, disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site.engine.held = True
    job = (await site.create())["id"]
    await site.until(job, "running")
    with held(disk / "data" / "finetuning.db"):
        site.engine.held = False
        await eventually(lambda: "another process holds finetuning.db" in caplog.text)
    assert (await site.until(job))["status"] == "succeeded"
