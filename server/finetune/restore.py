"""Recovery of the rows of files and jobs from the records beside their bytes, after a loss of the database; and
clean-up of job directories without a row."""

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


def write_record(directory: Path, name: str, record: Job | StoredCheckpoint) -> None:
    """Write a copy of a row into `directory`; a fault of the disk is ignored."""
    with contextlib.suppress(OSError):
        write_synced(directory / name, msgspec.json.encode(record))


def open_or_rebuild(data_dir: Path, busy_seconds: float) -> Database:
    """Open the database of a data directory; a damaged one is set aside, and rebuilt as far as possible.

    Raises the errors of `Database`, and OSError.
    """
    path = data_dir / "finetuning.db"
    try:
        return open_database(path, busy_seconds)
    except DatabaseDamaged as fault:
        aside = lost.set_aside_database(path)
        database = open_database(path, busy_seconds)
        kept = [*restore_files(database, lost.entries(data_dir / "files"))]
        jobs = [*restore_jobs(database, lost.entries(data_dir / "jobs"))]
        log.error("%s: set aside as %s; %d files and %d jobs were restored", fault, aside.name, len(kept), len(jobs))
        return database


def restore_files(database: Database, paths: Iterable[Path]) -> Iterable[str]:
    """Restore the rows of files in their place; yields the ids of restored files."""
    for path in paths:
        row = files.read_record(path.parent, path.name)
        if row is not None and row["id"] == path.name:
            with database.transaction() as connection:
                files.insert(connection, row)
            yield path.name


def restore_jobs(database: Database, directories: Iterable[Path]) -> Iterable[str]:
    """Restore the rows of jobs with these directories, paused; yields the ids of restored jobs."""
    jobs = JobStore(database)
    return (directory.name for directory in directories if restore_job(jobs, directory))


def restore_job(jobs: JobStore, directory: Path) -> bool:
    """Restore a job's rows; returns whether its directory had a readable record."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        job = msgspec.json.decode((directory / JOB).read_bytes(), type=Job)
        if job.id == directory.name:
            jobs.restore(job, list(_checkpoints(directory)))
            return True
    return False


def clean_up_at_start(jobs: JobStore, directory: Path, pending: lost.Pending) -> None:
    """Remove directories of finished jobs, set aside unknown ones, and restore unfinished jobs with unreadable rows."""
    aside = directory.parent / lost.LOST_AND_FOUND
    lost.ensure_directory(directory, aside)
    statuses, unfinished = jobs.statuses(), jobs.unfinished()
    readable = {job.id for job in unfinished}
    unreadable = [path for path in lost.entries(directory) if path.name in statuses.keys() - readable]
    for path in unreadable:
        if statuses[path.name] in FINAL:
            lost.remove(path)
        else:
            restore_job(jobs, path)
    unknown = [path for path in lost.entries(directory) if path.name not in statuses]
    lost.remove_or_set_aside(unknown, pending, aside / directory.name, jobs.database.path.name)
    for job in unfinished:
        write_record(directory / job.id, JOB, job)


def _checkpoints(directory: Path) -> Iterable[StoredCheckpoint]:
    for path in directory.rglob(CHECKPOINT):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            yield msgspec.json.decode(path.read_bytes(), type=StoredCheckpoint)
