"""Fine-tuning jobs in the database: state machine, events, steps, checkpoints.

Every change is on disk when the call returns.

    validating_files -> queued -> running -> succeeded | failed | cancelled
                     any of these -> (pausing ->) paused -> validating_files | queued
                                      pausing -> running: resumed before it had stopped
"""

import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar, get_args

import msgspec

from adapters.storage.database import Database
from adapters.storage.versions import MAX_BASE_NAME
from server.finetune.files import new_id
from server.finetune.hyperparameters import Hyperparameters, LoraOptions, TrainingOptions
from server.finetune.record_table import RecordTable, encode
from server.messages.training import Metrics, StartJob, TrainingStep
from server.usage import Ledger

Status = Literal["validating_files", "queued", "running", "pausing", "paused", "succeeded", "failed", "cancelled"]
log = logging.getLogger("lorakeet.finetune")

T = TypeVar("T")

FINAL: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})
_GOING_ON: frozenset[Status] = frozenset({"validating_files", "queued", "running"})
_ANY: Mapping[str, str] = MappingProxyType({})  # metadata
_NEXT: dict[Status, set[Status]] = {
    "validating_files": {"queued", "paused", "failed", "cancelled"},
    "queued": {"running", "paused", "failed", "cancelled"},
    "running": {"queued", "pausing", "paused", "succeeded", "failed", "cancelled"},
    "pausing": {"paused", "running", "succeeded", "failed", "cancelled"},
    "paused": {"validating_files", "queued", "cancelled"},
}


class UnknownJobError(LookupError):
    """The tenant has no job with this id."""


class JobStateError(ValueError):
    """The job's status does not allow the operation."""


class JobError(msgspec.Struct, frozen=True):
    """The reason of a job's failure, in OpenAI's shape."""

    code: str
    message: str
    param: str | None = None


class JobFailedError(Exception):
    """A fault that ends the job."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.error = JobError(code, message, param)


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The client's validated request; "auto" values are decided once the files have been read."""

    model: str  # as named by the client
    base: str
    adapter: str | None = None  # digest of the adapter version to continue from
    training_file: str
    validation_file: str | None = None
    suffix: str = ""
    seed: int
    metadata: dict[str, str] | None = None
    hyperparameters: Hyperparameters = Hyperparameters()
    lora: LoraOptions = LoraOptions()
    training: TrainingOptions = TrainingOptions()
    integrations: list[dict[str, Any]] | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One job. `start` is the engine's order; it is decided once, when the files have been validated."""

    id: str
    tenant: str
    status: Status
    created_at: int
    spec: JobSpec
    start: StartJob | None = None
    finished_at: int | None = None
    error: JobError | None = None
    fine_tuned_model: str | None = None
    trained_tokens: int | None = None
    result_files: list[str] = []
    step: int = 0
    total_steps: int = 0
    deaths: int = 0  # of engines training it, since its last checkpoint
    stop_tokens: list[int] = []  # at the ends of turns in its training data
    tool_format: str | None = None  # of tool calls in its training data
    reasoning_format: str | None = None
    waits_for_space: bool = False  # paused by a full disk
    inputs: dict[str, str] = {}  # files in its directory that other servers need -> hashes

    @property
    def has_work(self) -> bool:
        """Whether there is work to do, now or once there is space."""
        return self.status not in FINAL and (self.status != "paused" or self.waits_for_space)

    @property
    def model_name(self) -> str:
        """The name of the resulting adapter, valid for every name of a base."""
        base = re.sub(r"[^A-Za-z0-9._/-]+", "-", self.spec.base)[:MAX_BASE_NAME]
        return f"ft:{base}:{self.spec.suffix}:{self.id.removeprefix('ftjob-')[:8]}"


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of a job's log. `number` orders all events; clients see the `id`."""

    number: int = 0
    id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class StoredCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint to resume from (while its directory exists) and, when it has a `name`, to serve."""

    id: str
    created_at: int
    name: str | None
    metrics: Metrics
    trained_tokens: int
    directory: str
    hashes: dict[str, str]  # file name -> blake2b of its content


# Made here, in one thread: see `RecordTable`.
_EVENTS = msgspec.json.Decoder(Event)
_METRICS = msgspec.json.Decoder(Metrics)
_CHECKPOINTS = msgspec.json.Decoder(StoredCheckpoint)


class JobStore(RecordTable[Job, Status]):
    """All jobs of one server; `SharedJobs` is for several servers.

    Args:
        ledger: counts trained tokens.
    """

    def __init__(self, database: Database, ledger: Ledger | None = None) -> None:
        self._ledger = ledger
        super().__init__(database, "jobs", Job, UnknownJobError, get_args(Status), FINAL)

    # --- jobs --------------------------------------------------------------------------------------

    def create(self, tenant: str, spec: JobSpec, *, number: int | None = None) -> Job:
        job = Job(id=new_id("ftjob-"), tenant=tenant, status="validating_files", created_at=int(time.time()), spec=spec)
        with self.database.transaction():
            self.add(job, number)
            self.add_event(job.id, f"Created fine-tuning job: {job.id}")
        return job

    def page(
        self, tenant: str, *, limit: int, after: str | None = None, metadata: Mapping[str, str] | None = _ANY
    ) -> tuple[list[Job], bool]:
        """Return a page of jobs. `metadata`: only jobs with all of these pairs; None: only jobs without metadata."""
        where, values = "tenant = ?", [tenant]
        if metadata is None:
            where += " AND json_extract(record, '$.spec.metadata') IS NULL"
        for key, value in (metadata or _ANY).items():
            where += " AND EXISTS (SELECT 1 FROM json_each(record, '$.spec.metadata') WHERE key = ? AND value = ?)"
            values += [key, value]
        return self._page(where, values, limit, after)

    def restore(self, job: Job, checkpoints: Sequence[StoredCheckpoint]) -> None:
        """Rewrite a job's lost or unreadable rows; it is then paused at its last checkpoint."""
        last = max(checkpoints, key=lambda checkpoint: checkpoint.metrics.step, default=None)
        step = {} if last is None else {"step": last.metrics.step, "trained_tokens": last.trained_tokens}
        job = msgspec.structs.replace(job, status="paused", waits_for_space=False, **step)
        with self.database.transaction() as connection:
            insert = (
                "INSERT INTO jobs (id, tenant, status, record) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET status = excluded.status, record = excluded.record"
            )
            connection.execute(insert, (job.id, job.tenant, job.status, encode(job)))
            insert = "INSERT OR IGNORE INTO checkpoints (id, job, step, served, record) VALUES (?, ?, ?, ?, ?)"
            for one in checkpoints:
                connection.execute(insert, (one.id, job.id, one.metrics.step, one.name is not None, encode(one)))
            self.add_event(job.id, "The job's row was lost or damaged; it was restored, and is paused", level="warn")

    def move(
        self, job: Job, status: Status, message: str | None = None, *, expected: Status | None = None, **changes: Any
    ) -> Job:
        """Change the status, and other fields with it; `message` becomes an event. Continuing a job needs disk space,
        stopping it does not.

        Raises:
            JobStateError: the *stored* status does not allow the change, or is not `expected`.
        """
        with self.database.transaction(removing=status not in _GOING_ON):
            moved = self.moved(self.get(job.tenant, job.id), status, expected, changes)
            self.write(moved)
            if message is not None:
                self.add_event(job.id, message, level=level_of(status))
        return moved

    def move_for_client(self, job: Job, status: Status, message: str | None = None, **options: Any) -> Job:
        """Change the status on a client's behalf, even if another server works on the job."""
        return self.move(job, status, message, **options)

    @staticmethod
    def moved(current: Job, status: Status, expected: Status | None, changes: Mapping[str, Any]) -> Job:
        """Return the job with the changes of `move`. Raises JobStateError."""
        if status not in _NEXT.get(current.status, ()) or expected not in (None, current.status):
            raise JobStateError(f"Job {current.id} is {current.status}; it cannot become {status}.")
        ended = {"finished_at": int(time.time())} if status in FINAL else {}
        return msgspec.structs.replace(current, status=status, **ended, **changes)

    def update(self, job: Job, **changes: Any) -> Job:
        """Change fields other than the status; possible on a full disk."""
        with self.database.transaction(removing=True):
            changed = msgspec.structs.replace(self.get(job.tenant, job.id), **changes)
            self.write(changed)
        return changed

    # --- events and metrics --------------------------------------------------------------------------

    def add_event(
        self,
        job_id: str,
        message: str,
        *,
        level: Literal["info", "warn", "error"] = "info",
        data: dict[str, Any] | None = None,
    ) -> None:
        """Append an event to the job's log. With `data` it is of type "metrics"."""
        event = event_row(message, level, data)
        with self.database.transaction() as connection:
            connection.execute(
                "INSERT INTO events (id, job, record) VALUES (?, ?, ?)",
                (event["id"], job_id, encode(event)),
            )

    def events(
        self, job_id: str, *, limit: int, after: str | None = None, newest_first: bool = True
    ) -> tuple[list[Event], bool]:
        """Return a page of events, and whether more follow. Raises UnknownCursorError."""
        rows, more = self.database.page(
            "events", "job = ?", [job_id], limit=limit, after=after, newest_first=newest_first
        )
        return [msgspec.structs.replace(_EVENTS.decode(row["record"]), number=row["number"]) for row in rows], more

    def record_step(self, job: Job, step: TrainingStep) -> None:
        """Record a step's metrics. A step repeated after a restart is replaced, without a second event."""
        metrics = step.metrics
        if self._ledger is not None:
            self._ledger.add_training(job.tenant, job.model_name, job.id, step.trained_tokens, step.busy_seconds)
        with self.database.transaction() as connection:
            known = connection.execute(
                "SELECT 1 FROM steps WHERE job = ? AND step = ?", (job.id, metrics.step)
            ).fetchone()
            connection.execute(
                "INSERT OR REPLACE INTO steps (job, step, record) VALUES (?, ?, ?)",
                (job.id, metrics.step, encode(metrics)),
            )
            self.update(job, step=metrics.step, total_steps=step.total_steps, trained_tokens=step.trained_tokens)
            if known is None:
                loss = "not finite" if metrics.train_loss is None else f"{metrics.train_loss:.4f}"
                message = f"Step {metrics.step}/{step.total_steps}: training loss={loss}"
                if metrics.full_valid_loss is not None:
                    message += f", full validation loss={metrics.full_valid_loss:.4f}"
                more = {name: getattr(step, name) for name in ("total_steps", "trained_tokens", "learning_rate")}
                norm = step.grad_norm if math.isfinite(step.grad_norm) else None
                self.add_event(job.id, message, data=msgspec.to_builtins(metrics) | more | {"grad_norm": norm})

    def steps(self, job_id: str) -> Sequence[Metrics]:
        """Return the metrics of all recorded steps, in order."""
        with self.database.reading() as connection:
            rows = connection.execute("SELECT record FROM steps WHERE job = ? ORDER BY step", (job_id,)).fetchall()
        return [_METRICS.decode(row["record"]) for row in rows]

    # --- checkpoints -----------------------------------------------------------------------------------

    def add_checkpoint(
        self,
        job: Job,
        *,
        metrics: Metrics,
        name: str | None,
        directory: str,
        hashes: dict[str, str],
        trained_tokens: int,
    ) -> None:
        """Record a checkpoint with synced files. A step repeated after a restart keeps its id, date and name."""
        with self.database.transaction() as connection:
            row = connection.execute(
                "SELECT record FROM checkpoints WHERE job = ? AND step = ?", (job.id, metrics.step)
            ).fetchone()
            known = None if row is None else _CHECKPOINTS.decode(row["record"])
            checkpoint = StoredCheckpoint(
                id=new_id("ftckpt-") if known is None else known.id,
                created_at=int(time.time()) if known is None else known.created_at,
                name=name if known is None else name or known.name,
                metrics=metrics,
                trained_tokens=trained_tokens,
                directory=directory,
                hashes=hashes,
            )
            connection.execute(
                "INSERT INTO checkpoints (id, job, step, served, record) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET served = excluded.served, record = excluded.record",
                (checkpoint.id, job.id, metrics.step, checkpoint.name is not None, encode(checkpoint)),
            )
            self.update(job, deaths=0)
            if checkpoint.name is not None and (known is None or known.name is None):
                self.add_event(job.id, f"Checkpoint created at step {metrics.step}: {checkpoint.name}")

    def checkpoints(self, job_id: str, *, limit: int, after: str | None = None) -> tuple[list[StoredCheckpoint], bool]:
        """Return a page of served checkpoints, newest first. Raises UnknownCursorError."""
        rows, more = self.database.page("checkpoints", "job = ? AND served", [job_id], limit=limit, after=after)
        return [_CHECKPOINTS.decode(row["record"]) for row in rows], more

    def resumable(self, job_id: str) -> Sequence[StoredCheckpoint]:
        """Return all checkpoints, the latest step first."""
        with self.database.reading() as connection:
            rows = connection.execute(
                "SELECT record FROM checkpoints WHERE job = ? ORDER BY step DESC", (job_id,)
            ).fetchall()
        return [_CHECKPOINTS.decode(row["record"]) for row in rows]

    # --- sharing among servers: overridden by `SharedJobs` -------------------------------------------

    @contextmanager
    def grouped_changes(self) -> Iterator[None]:
        """Group several changes of a job into one transaction."""
        with self.database.transaction():
            yield

    def share(self, job: Job, directory: Path) -> None:
        """Upload a new job, with the files in its directory, for other servers."""

    def upload_files(self, job_id: str, root: Path, files: Mapping[str, str]) -> None:
        """Upload files of a job for other servers. `files`: paths below `root` -> hashes."""

    def download_files(self, job_id: str, root: Path, files: Mapping[str, str]) -> None:
        """Download a job's files that are missing here, as far as they are stored."""

    def delete_files(self, job_id: str, keep: Sequence[str] = ()) -> None:
        """Delete a job's uploaded files, except those with the hashes in `keep`."""


def event_row(message: str, level: str = "info", data: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a new event in stored form."""
    return {
        "id": new_id("ftevent-"),
        "created_at": int(time.time()),
        "level": level,
        "message": message,
        "type": "message" if data is None else "metrics",
        "data": data,
    }


def level_of(status: Status) -> Literal["info", "error"]:
    """Return the level of the event for a status."""
    return "error" if status == "failed" else "info"
