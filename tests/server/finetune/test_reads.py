"""Reads of jobs, files and evaluations do not wait for a writer, and never run on the event loop."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from adapters.storage.database import Database
from server.finetune.jobs import JobSpec
from server.services import TENANT
from tests.support.scripted import serving


async def test_reads_wait_for_no_writer_and_run_in_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as served:
        jobs = served.services.tuning.jobs
        job = jobs.create(TENANT, JobSpec(model="m", base="m", training_file="file-x", seed=0))
        (tmp_path / "upload").write_bytes(b"{}")
        file = served.services.tuning.files.add(TENANT, tmp_path / "upload", filename="a", purpose="fine-tune")
        readers: set[int] = set()
        reading = Database.reading

        @contextmanager
        def watched(database: Database) -> Iterator[sqlite3.Connection]:
            readers.add(threading.get_ident())
            with reading(database) as connection:
                yield connection

        monkeypatch.setattr(Database, "reading", watched)
        with closing(sqlite3.connect(tmp_path / "finetuning.db", isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            writer.execute("UPDATE jobs SET status = 'failed'")
            for path in (
                *(f"/v1/fine_tuning/jobs{part}" for part in ("", f"/{job.id}", f"/{job.id}/events")),
                f"/v1/fine_tuning/jobs/{job.id}/checkpoints",
                *("/v1/files", f"/v1/files/{file.id}", f"/v1/files/{file.id}/content", "/v1/evaluations", "/metrics"),
            ):
                # A read that waited for the writer would fail after SQLite's five seconds.
                response = await served.client.get(path, timeout=4)
                assert response.status_code == 200, (path, response.text)
            assert 'finetune_jobs{status="validating_files"} 1.0' in response.text
            writer.execute("ROLLBACK")
        assert readers
        assert threading.get_ident() not in readers
