"""Fine-tuning jobs as the database knows them: state machine, events, steps, checkpoints.

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
    """No job of that id for this tenant."""


class JobStateError(ValueError):
    """The job's status does not allow this."""


class JobError(msgspec.Struct, frozen=True):
    """Why a job failed, in OpenAI's shape."""

    code: str
    message: str
    param: str | None = None


class JobFailedError(Exception):
    """The job cannot go on."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.error = JobError(code, message, param)


class JobSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the client asked for, checked; what is "auto" is decided when the files have been read."""

    model: str  # as the client wrote it
    base: str
    adapter: str | None = None  # digest of the adapter version to go on from
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
    """One job now. `start` is what the engine is told; it is decided once, when the files were validated."""

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
    deaths: int = 0  # of engines that had it, since its last checkpoint
    stop_tokens: list[int] = []  # that ended the turns of its training data
    tool_format: str | None = None  # in which its calls of tools are written
    reasoning_format: str | None = None
    waits_for_space: bool = False  # paused by a full disk
    inputs: dict[str, str] = {}  # files in its directory that other servers need, too -> their hashes

    @property
    def goes_on(self) -> bool:
        """Whether there is work to do for it."""
        return self.status not in FINAL and (self.status != "paused" or self.waits_for_space)

    @property
    def model_name(self) -> str:
        """What the result is called. Whatever the base is called, that is a name which an adapter may have."""
        base = re.sub(r"[^A-Za-z0-9._/-]+", "-", self.spec.base)[:MAX_BASE_NAME]
        return f"ft:{base}:{self.spec.suffix}:{self.id.removeprefix('ftjob-')[:8]}"


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """`number` orders all events; `id` is what clients see."""

    number: int = 0
    id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class StoredCheckpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that can be resumed from (while its directory lasts) and, when it has a `name`, served."""

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
    """All jobs of one server. `SharedJobs` are those of several.

    Args:
        ledger: where trained tokens are counted.
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
        """`metadata`: only jobs that carry all of these pairs; None: only jobs that have none."""
        where, values = "tenant = ?", [tenant]
        if metadata is None:
            where += " AND json_extract(record, '$.spec.metadata') IS NULL"
        for key, value in (metadata or _ANY).items():
            where += " AND EXISTS (SELECT 1 FROM json_each(record, '$.spec.metadata') WHERE key = ? AND value = ?)"
            values += [key, value]
        return self._page(where, values, limit, after)

    def restore(self, job: Job, checkpoints: Sequence[StoredCheckpoint]) -> None:
        """Write the rows of a job that the database has lost or cannot read, paused where its last checkpoint is."""
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
            self.add_event(job.id, "The job's row was lost or damaged; it is known again, and paused", level="warn")

    def move(
        self, job: Job, status: Status, message: str | None = None, *, expected: Status | None = None, **changes: Any
    ) -> Job:
        """Change the status, and further fields with it; `message` becomes an event. Going on needs space on the disk,
        stopping does not.

        Raises:
            JobStateError: that step is not allowed from the status that the job has *now*, or that is not `expected`.
        """
        with self.database.transaction(removing=status not in _GOING_ON):
            moved = self.moved(self.get(job.tenant, job.id), status, expected, changes)
            self.write(moved)
            if message is not None:
                self.add_event(job.id, message, level=level_of(status))
        return moved

    def steer(self, job: Job, status: Status, message: str | None = None, **options: Any) -> Job:
        """`move` for who does not work on the job, but may say what becomes of it."""
        return self.move(job, status, message, **options)

    @staticmethod
    def moved(current: Job, status: Status, expected: Status | None, changes: Mapping[str, Any]) -> Job:
        """The job as `move` makes it; raises what that does."""
        if status not in _NEXT.get(current.status, ()) or expected not in (None, current.status):
            raise JobStateError(f"Job {current.id} is {current.status}; it cannot become {status}.")
        ended = {"finished_at": int(time.time())} if status in FINAL else {}
        return msgspec.structs.replace(current, status=status, **ended, **changes)

    def update(self, job: Job, **changes: Any) -> Job:
        """Change fields other than the status. Needs no space on the disk."""
        with self.database.transaction(removing=True):
            changed = msgspec.structs.replace(self.get(job.tenant, job.id), **changes)
            self.write(changed)
        return changed

    # --- what happens in a job -----------------------------------------------------------------------

    def add_event(
        self,
        job_id: str,
        message: str,
        *,
        level: Literal["info", "warn", "error"] = "info",
        data: dict[str, Any] | None = None,
    ) -> None:
        """Append to the job's log. An event with `data` is of type "metrics"."""
        event = event_row(message, level, data)
        with self.database.transaction() as connection:
            connection.execute(
                "INSERT INTO events (id, job, record) VALUES (?, ?, ?)",
                (event["id"], job_id, encode(event)),
            )

    def events(
        self, job_id: str, *, limit: int, after: str | None = None, newest_first: bool = True
    ) -> tuple[list[Event], bool]:
        """Raises UnknownCursorError."""
        rows, more = self.database.page(
            "events", "job = ?", [job_id], limit=limit, after=after, newest_first=newest_first
        )
        return [msgspec.structs.replace(_EVENTS.decode(row["record"]), number=row["number"]) for row in rows], more

    def record_step(self, job: Job, step: TrainingStep) -> None:
        """A step's metrics. A step that is repeated after a restart replaces itself, and makes no second event."""
        metrics = step.metrics
        if self._ledger is not None:
            self._ledger.train(job.tenant, job.model_name, job.id, step.trained_tokens, step.busy_seconds)
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
        """Every recorded step's metrics, in order."""
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
        """Record a checkpoint whose files are synced. A step repeated after a restart replaces its files alone."""
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
        """Those that can be served, newest first. Raises UnknownCursorError."""
        rows, more = self.database.page("checkpoints", "job = ? AND served", [job_id], limit=limit, after=after)
        return [_CHECKPOINTS.decode(row["record"]) for row in rows], more

    def resumable(self, job_id: str) -> Sequence[StoredCheckpoint]:
        """Every checkpoint, the latest step first."""
        with self.database.reading() as connection:
            rows = connection.execute(
                "SELECT record FROM checkpoints WHERE job = ? ORDER BY step DESC", (job_id,)
            ).fetchall()
        return [_CHECKPOINTS.decode(row["record"]) for row in rows]

    # --- working on one ------------------------------------------------------------------------------

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Several changes of a job that are on disk together, or not at all."""
        with self.database.transaction():
            yield

    def share(self, job: Job, directory: Path) -> None:
        """Make a new job known to other servers, with what is in its directory."""

    def put(self, job_id: str, root: Path, files: Mapping[str, str]) -> None:
        """Keep files of a job where other servers find them. `files`: paths below `root` -> hashes."""

    def fetch(self, job_id: str, root: Path, files: Mapping[str, str]) -> None:
        """See that these files are here, as far as they are kept."""

    def forget(self, job_id: str, but: Sequence[str] = ()) -> None:
        """Keep none of a job's files any more but those of these hashes."""


def event_row(message: str, level: str = "info", data: dict[str, Any] | None = None) -> dict[str, Any]:
    """A new event as it is stored."""
    return {
        "id": new_id("ftevent-"),
        "created_at": int(time.time()),
        "level": level,
        "message": message,
        "type": "message" if data is None else "metrics",
        "data": data,
    }


def level_of(status: Status) -> Literal["info", "error"]:
    """The level of the event that tells of a status."""
    return "error" if status == "failed" else "info"
