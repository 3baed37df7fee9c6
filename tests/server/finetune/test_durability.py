"""Acknowledged data survives a power cut: file contents and directory entries are synced, in this order.

Syncing rows is left to SQLite; tests/adapters/storage/test_database.py checks that it is configured to do so.
"""

from pathlib import Path

import pytest

from adapters.peft_format import record
from adapters.peft_format.directory import CONFIG_NAME, SPEC_NAME, WEIGHTS_NAME
from adapters.storage.entries import NAMES
from server.finetune import restore
from server.finetune.checkpoints import _sync_and_hash
from server.finetune.database import open_database
from server.finetune.files import FileStore
from server.finetune.jobs import JobSpec, Status
from server.services import TENANT
from tests.support.power_cut import Synced
from tests.support.publishing import Box, put
from tests.support.scripted import serving


def test_published_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = Synced(monkeypatch)
    box = Box(tmp_path)
    for content in ("one", "two"):
        version, _ = put(box.store, "x", content)
        lost = synced.lost_below(tmp_path / "adapters", version.path)
        assert not [path for path in lost if path.is_file() and path.parent.name != NAMES]  # rewritten at a start
        assert not synced.lost(tmp_path / "adapters", version.path / WEIGHTS_NAME)
    box.names.close()


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = open_database(tmp_path / "db")
    store, synced = FileStore(tmp_path / "files", database), Synced(monkeypatch)
    with store.staging() as staging:
        (staging / "upload").write_bytes(b"content")
        stored = store.add(TENANT, staging / "upload", filename="a", purpose="fine-tune")
    assert not synced.lost(tmp_path / "files", stored.path)
    database.close()


def test_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "job" / "step-1"
    directory.mkdir(parents=True)
    for name in ("state", WEIGHTS_NAME):
        (directory / name).write_bytes(b"content")
    synced = Synced(monkeypatch)
    assert _sync_and_hash(directory).keys() == {"state", WEIGHTS_NAME}
    assert not synced.lost_below(tmp_path / "job", directory)


async def test_the_adapter_that_a_job_starts_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    initial = tmp_path / "initial"
    initial.mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME, SPEC_NAME):
        (initial / name).write_text(name)
    record.write(initial)
    async with serving(tmp_path) as served:
        synced = Synced(monkeypatch)
        spec = JobSpec(model="m", base="m", training_file="file-x", seed=0)
        job = served.services.tuning.manager._create(TENANT, spec, initial)
        assert not synced.lost_below(tmp_path / "jobs", tmp_path / "jobs" / job.id)


@pytest.mark.parametrize(("status", "kept"), [("queued", True), ("failed", False)])
async def test_a_job_whose_row_cannot_be_read_keeps_its_directory(tmp_path: Path, status: Status, kept: bool) -> None:
    async with serving(tmp_path) as served:
        manager = served.services.tuning.manager
        job = manager._create(TENANT, JobSpec(model="m", base="m", training_file="file-x", seed=0), None)
        if status != "queued":
            manager._jobs.move(job, status)
        directory = tmp_path / "jobs" / job.id
        directory.mkdir(exist_ok=True)
        restore.write_record(directory, restore.JOB, job)
        with manager._database.transaction() as connection:
            connection.execute("UPDATE jobs SET record = '{' || record")
        restore.clean_up_at_start(manager._jobs, manager._directory, manager._pending)
        assert directory.exists() is kept
        if kept:
            assert manager._jobs.get(TENANT, job.id).status == "paused"
