"""Rows of files and jobs made anew from what lies beside their bytes, for a database that has lost them; and what
lies there that no row knows."""

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec

from adapters.disk import write_synced
from adapters.storage import lost
from adapters.storage.database import Database, DatabaseDamaged
from server.finetune import files
from server.finetune.database import open_database
from server.finetune.jobs import FINAL, Job, JobStore, StoredCheckpoint

JOB, CHECKPOINT = "job.json", "checkpoint.json"

log = logging.getLogger(__name__)


def note(directory: Path, name: str, record: Job | StoredCheckpoint) -> None:
    """Write a row beside what it describes; a disk that does not take it goes without."""
    with contextlib.suppress(OSError):
        write_synced(directory / name, msgspec.json.encode(record))


def opened(data_dir: Path, busy_seconds: float) -> Database:
    """The database of a data directory; a damaged one is set aside, and made anew as far as can be. Raises what
    `Database` does, and OSError."""
    path = data_dir / "finetuning.db"
    try:
        return open_database(path, busy_seconds)
    except DatabaseDamaged as fault:
        aside = lost.set_aside_database(path)
        database = open_database(path, busy_seconds)
        kept = [*restore_files(database, lost.entries(data_dir / "files"))]
        jobs = [*restore_jobs(database, lost.entries(data_dir / "jobs"))]
        log.error("%s: set aside as %s; %d files and %d jobs are known again", fault, aside.name, len(kept), len(jobs))
        return database


def restore_files(database: Database, paths: Iterable[Path]) -> Iterable[str]:
    """Rows for these files, which lie in their place; the ids of those that could be restored."""
    for path in paths:
        row = files.recorded(path.parent, path.name)
        if row is not None and row["id"] == path.name:
            with database.transaction() as connection:
                files.insert(connection, row)
            yield path.name


def restore_jobs(database: Database, directories: Iterable[Path]) -> Iterable[str]:
    """Rows for jobs with these directories, paused where they stood; the ids of those that could be restored."""
    jobs = JobStore(database)
    return (directory.name for directory in directories if restore_job(jobs, directory))


def restore_job(jobs: JobStore, directory: Path) -> bool:
    """Write a job's rows anew, as `restore_jobs` does; whether its directory told enough."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        job = msgspec.json.decode((directory / JOB).read_bytes(), type=Job)
        if job.id == directory.name:
            jobs.restore(job, list(_checkpoints(directory)))
            return True
    return False


def sort_out(jobs: JobStore, directory: Path, pending: lost.Pending) -> None:
    """Of jobs' directories, remove those of finished jobs, and set aside those that the database does not know."""
    aside = directory.parent / lost.LOST_AND_FOUND
    lost.directory_at(directory, aside)
    statuses, unfinished = jobs.statuses(), jobs.unfinished()
    readable = {job.id for job in unfinished}
    unreadable = [path for path in lost.entries(directory) if path.name in statuses.keys() - readable]
    for path in unreadable:
        if statuses[path.name] in FINAL:
            lost.remove(path)
        else:
            restore_job(jobs, path)
    unknown = [path for path in lost.entries(directory) if path.name not in statuses]
    lost.sort_out(unknown, pending, aside / directory.name, jobs.database.path.name)
    for job in unfinished:
        note(directory / job.id, JOB, job)


def _checkpoints(directory: Path) -> Iterable[StoredCheckpoint]:
    for path in directory.rglob(CHECKPOINT):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            yield msgspec.json.decode(path.read_bytes(), type=StoredCheckpoint)
