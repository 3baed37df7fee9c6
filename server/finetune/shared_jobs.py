"""Fine-tuning jobs that several servers have in an object store; the rows in the database here are a copy.

`jobs/<id>.json` is a job: its status, its lease, its checkpoints, its log. A server that holds the lease writes to its
database as it goes, and with each change of status, each checkpoint and each renewal sends what is new. Anybody may
change the status as a client asks for it; the holder hears of it. `job-files/<id>/<hash>` are the files that another
server needs to go on, `job-logs/` events that are too many for the record: both are there before the record names them.
"""

import contextlib
import json
import random
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from adapters.disk import StorageFull, sync
from adapters.storage.bucket import Conflict
from adapters.storage.database import Database, DatabaseBusy
from adapters.storage.leases import LeaseLost
from adapters.storage.versions import RemoteUnavailable
from server.finetune.checkpoints import file_hash
from server.finetune.jobs import (
    Job,
    JobSpec,
    JobStateError,
    JobStore,
    Status,
    StoredCheckpoint,
    UnknownJobError,
    event_row,
    level_of,
)
from server.finetune.records import encode
from server.messages.training import Metrics
from server.usage import Ledger

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket
    from adapters.storage.leases import Leases
    from adapters.storage.records import Content, Records

_TAIL = 64  # events in a job's record, before they become an object of their own
_DAMAGE = (ValueError, LookupError, TypeError)  # what reading a record raises when it is none


class SharedJobs(JobStore):
    """Whatever waits for the object store raises RemoteUnavailable.

    Args:
        records: of the jobs.
        bucket: where their files are.
        most: jobs that this server works on at once.
    """

    def __init__(
        self, database: Database, ledger: Ledger, records: "Records", bucket: "Bucket", leases: "Leases", most: int
    ) -> None:
        super().__init__(database, ledger)
        self.leases = leases
        self._records = records
        self._bucket = bucket
        self._most = most
        self._sent: dict[str, int] = {}  # job that is held -> number of its last event in the store
        self._writing: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)

    # --- what others do ------------------------------------------------------------------------------

    def follow(self) -> list[Job]:
        """Take over what other servers changed; jobs held here whose status is another now."""
        moved = []
        for record in sorted(self._records.news(), key=lambda record: (record.content or {}).get("number", 0)):
            try:
                with self._writing[record.key]:
                    if self._records.note(record) and record.content is not None and self._copy(record.content):
                        moved.append(msgspec.convert(record.content["job"], Job))
            except _DAMAGE as fault:
                self._records.damage(record.key, fault)
            except (RemoteUnavailable, StorageFull, DatabaseBusy):
                self._records.forget(record.key)
                raise
        return [job for job in moved if self.leases.holds(job.id)]

    def get(self, tenant: str, id_: str) -> Job:
        try:
            return super().get(tenant, id_)
        except UnknownJobError:
            record = self._records.miss(id_)
            if record is None or record.content is None:
                raise
            with self._writing[id_]:
                if self._records.note(record):
                    self._copy(record.content)
            return super().get(tenant, id_)

    def steer(
        self, job: Job, status: Status, message: str | None = None, *, expected: Status | None = None, **changes: Any
    ) -> Job:
        with self._writing[job.id]:
            if self.leases.holds(job.id):
                with contextlib.suppress(LeaseLost):
                    return self._moved(job, status, message, expected, changes)

            def steered(content: "Content | None") -> "Content":
                if content is None:
                    raise UnknownJobError(job.id)
                return self._with(content, status, message, expected, changes)

            content = self._records.change(job.id, steered).content
            assert content is not None
            self._copy(content)
        return super().get(job.tenant, job.id)

    # --- working on one ------------------------------------------------------------------------------

    def create(self, tenant: str, spec: JobSpec, *, number: int | None = None) -> Job:
        return super().create(tenant, spec, number=number or time.time_ns())

    def share(self, job: Job, directory: Path) -> None:
        """Its rows go again when it cannot be."""
        try:
            self._share(job, directory)
        except BaseException:
            with self.database.transaction(removing=True) as connection:
                for table, column in (("events", "job"), ("jobs", "id")):
                    connection.execute(f"DELETE FROM {table} WHERE {column} = ?", (job.id,))
            raise

    def share_all(self, directory: Path) -> None:
        """Give the store what it does not have: jobs from a time without one, whose directories lie in this one."""
        for job in self.all():
            if not self._records.knows(job.id) and self._records.look(job.id).version is None:
                number = job.created_at * 10**9 + random.randrange(10**9)
                with self.database.transaction() as connection:
                    connection.execute("UPDATE jobs SET number = ? WHERE id = ?", (number, job.id))
                self._share(job, directory / job.id)

    def _share(self, job: Job, directory: Path) -> None:
        inputs = hashes(directory, but=("job.json",))
        self.put(job.id, directory, inputs)
        with self.database.transaction() as connection:
            self.update(job, inputs=inputs)
            number = connection.execute("SELECT number FROM jobs WHERE id = ?", (job.id,)).fetchone()["number"]
        fresh: Content = {"number": number, "lease": None, "segments": [], "tail": []}
        with self._writing[job.id]:
            content = self._records.change(job.id, lambda old: old or self._merged(job.id, fresh)).content
            assert content is not None
            self.leases.see(job.id, content)

    def take_up(self) -> list[Job]:
        """Claim jobs that nobody works on, as many as there is room for: first for who has the fewest here."""
        waiting, taken = [job for job in self.unfinished() if job.goes_on and self.leases.free(job.id)], []
        at_work = Counter(job.tenant for job in self.unfinished() if self.leases.holds(job.id))
        while waiting and len(self.leases.held()) < self._most:
            waiting.remove(job := min(waiting, key=lambda job: at_work[job.tenant]))
            with contextlib.suppress(LeaseLost), self._writing[job.id]:
                content = self.leases.claim(job.id)
                self._copy(content, claimed=True)
                at_work[job.tenant] += 1
                taken.append(job := super().get(job.tenant, job.id))
                if self._ledger is not None:
                    self._ledger.counted(job.id, job.trained_tokens or 0)
        return taken

    def move(
        self, job: Job, status: Status, message: str | None = None, *, expected: Status | None = None, **changes: Any
    ) -> Job:
        try:
            with self._writing[job.id]:
                return self._moved(job, status, message, expected, changes)
        except LeaseLost:
            raise JobStateError(f"Job {job.id} is another server's now.") from None

    def send(self, job_id: str, *, release: bool = False) -> Job | None:
        """Renew the lease, or end it, and send what is new; the job when somebody has changed its status.

        Raises LeaseLost.
        """
        with self._writing[job_id]:
            content = self.leases.change(job_id, lambda content: self._merged(job_id, content), release=release)
            return msgspec.convert(content["job"], Job) if self._copy(content) else None

    def refresh(self, job_id: str) -> None:
        """Let the rows here be what the store says."""
        with self._writing[job_id]:
            record = self._records.look(job_id)
            if record.content is not None:
                self._records.note(record)
                self._copy(record.content)

    def add_checkpoint(self, job: Job, **fields: Any) -> None:
        super().add_checkpoint(job, **fields)
        try:
            self.send(job.id)
        except LeaseLost:
            raise JobStateError(f"Job {job.id} is another server's now.") from None

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """The last change sends all of them."""
        yield

    # --- files ---------------------------------------------------------------------------------------

    def put(self, job_id: str, root: Path, files: Mapping[str, str]) -> None:
        for name, hash_ in files.items():
            self._bucket.put_file(_object(job_id, hash_), root / name)

    def fetch(self, job_id: str, root: Path, files: Mapping[str, str]) -> None:
        root.mkdir(parents=True, exist_ok=True)
        for name, hash_ in files.items():
            file = root / name
            if file.exists() and file_hash(file) == hash_:
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f".{file.name}.part")
            part.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._bucket.get_file(_object(job_id, hash_), part, missing=False)
                sync(part)
                part.rename(file)

    def forget(self, job_id: str, but: Sequence[str] = ()) -> None:
        kept = {_object(job_id, hash_) for hash_ in but}
        with contextlib.suppress(RemoteUnavailable):  # the next time will do
            there = [entry.path for entry in self._bucket.list(_object(job_id, "").rstrip("/"))]
            self._bucket.delete([path for path in there if path not in kept])

    # --- a record and its rows -----------------------------------------------------------------------

    def _moved(
        self, job: Job, status: Status, message: str | None, expected: Status | None, changes: Mapping[str, Any]
    ) -> Job:
        """Move a job that is held here. Raises LeaseLost."""

        def moved(content: "Content") -> "Content":
            return self._with(self._merged(job.id, content), status, message, expected, changes)

        try:
            self._copy(self.leases.change(job.id, moved), changes)
        except JobStateError:
            self.refresh(job.id)
            raise
        return super().get(job.tenant, job.id)

    def _with(
        self,
        content: "Content",
        status: Status,
        message: str | None,
        expected: Status | None,
        changes: Mapping[str, Any],
    ) -> "Content":
        job = self.moved(msgspec.convert(content["job"], Job), status, expected, changes)
        tail = content["tail"] if message is None else [*content["tail"], event_row(message, level_of(status))]
        return content | {"job": msgspec.to_builtins(job), "tail": tail}

    def _merged(self, job_id: str, content: "Content") -> "Content":
        """A record with what its holder's rows have that it has not. Statuses are the record's."""
        with self.database.reading() as connection:
            row = connection.execute("SELECT record FROM jobs WHERE id = ?", (job_id,)).fetchone()
            new = connection.execute(
                "SELECT id, record FROM events WHERE job = ? AND number > ? ORDER BY number",
                (job_id, self._sent.get(job_id, 0)),
            ).fetchall()
            checkpoints = connection.execute("SELECT record FROM checkpoints WHERE job = ? ORDER BY number", (job_id,))
            made = [json.loads(one["record"]) for one in checkpoints]
        job = msgspec.json.decode(row["record"], type=Job)
        if "job" in content:
            job = _standing(job, msgspec.convert(content["job"], Job))
        there = {event["id"] for event in content["tail"]} | {segment["last"] for segment in content["segments"]}
        known = max((place for place, event in enumerate(new, start=1) if event["id"] in there), default=0)
        tail = [*content["tail"], *(json.loads(event["record"]) for event in new[known:])]
        segments = content["segments"]
        if len(tail) > _TAIL:
            name = f"job-logs/{job_id}/{uuid.uuid4().hex}.json"
            with contextlib.suppress(Conflict):  # a second try of its own
                self._bucket.put_if(name, json.dumps(tail).encode(), None)
            segments, tail = [*segments, {"name": name, "count": len(tail), "last": tail[-1]["id"]}], []
        changed = {"job": msgspec.to_builtins(job), "checkpoints": made, "segments": segments, "tail": tail}
        return content | changed

    def _copy(self, content: "Content", changes: Mapping[str, Any] | None = None, *, claimed: bool = False) -> bool:
        """Let the rows be what a record says, with what its holder has added since; whether the status is another.

        Args:
            changes: what the holder changed just now, itself.
            claimed: it holds the job only now: its rows have nothing that counts.
        """
        stored = msgspec.convert(content["job"], Job)
        self.leases.see(stored.id, content)
        ours = self.leases.holds(stored.id) and not claimed
        segments = {} if ours else self._missing(stored.id, content)
        with self.database.transaction(removing=True) as connection:
            row = connection.execute("SELECT status, record FROM jobs WHERE id = ?", (stored.id,)).fetchone()
            job = stored
            if row is None:
                self.add(job, content["number"])
            else:
                if ours:
                    here = msgspec.json.decode(row["record"], type=Job)
                    job = msgspec.structs.replace(_standing(here, stored), **changes or {})
                self.write(job)
            if not ours:
                self._copy_checkpoints(stored.id, content["checkpoints"])
            self._copy_events(stored.id, content, segments, ours=ours)
        return row is not None and row["status"] != stored.status and changes is None

    def _missing(self, job_id: str, content: "Content") -> dict[str, list[dict[str, Any]]]:
        """Segments of the log that the rows do not begin with, by name."""
        with self.database.reading() as connection:
            found = connection.execute("SELECT id FROM events WHERE job = ? ORDER BY number", (job_id,)).fetchall()
        end = 0
        missing: dict[str, list[dict[str, Any]]] = {}
        for segment in content["segments"]:
            end += segment["count"]
            if missing or len(found) < end or found[end - 1]["id"] != segment["last"]:
                read = self._bucket.read(segment["name"])
                if read is None:
                    raise LookupError(segment["name"])
                missing[segment["name"]] = json.loads(read.content)
        return missing

    def _copy_events(
        self, job_id: str, content: "Content", segments: Mapping[str, list[dict[str, Any]]], *, ours: bool
    ) -> None:
        """Those of the record, in its order; then, where the job is ours, those that it has not."""
        with self.database.transaction(removing=True) as connection:
            query = "SELECT number, id, record FROM events WHERE job = ? ORDER BY number"
            found = connection.execute(query, (job_id,)).fetchall()
            whole = [one["count"] for one in content["segments"] if one["name"] not in segments]
            at = sum(whole)
            wanted = [event for rows in segments.values() for event in rows] + content["tail"]
            same = 0
            for event, row in zip(wanted, found[at:], strict=False):
                if event["id"] != row["id"]:
                    break
                same += 1
            new, stale = wanted[same:], found[at + same :]
            ids = {event["id"] for event in new}
            extra = [json.loads(row["record"]) for row in stale if ours and row["id"] not in ids]
            if new or (stale and not ours):
                connection.executemany("DELETE FROM events WHERE number = ?", [(row["number"],) for row in stale])
                rows = [(event["id"], job_id, encode(event)) for event in [*new, *extra]]
                connection.executemany("INSERT INTO events (id, job, record) VALUES (?, ?, ?)", rows)
                if not ours:
                    self._copy_steps(job_id)
            count = at + len(wanted)
            last = connection.execute(f"{query} LIMIT 1 OFFSET ?", (job_id, count - 1)).fetchone()
            self._sent[job_id] = last["number"] if count else 0

    def _copy_steps(self, job_id: str) -> None:
        """Steps as the events tell of them."""
        with self.database.transaction(removing=True) as connection:
            connection.execute("DELETE FROM steps WHERE job = ?", (job_id,))
            for row in connection.execute("SELECT record FROM events WHERE job = ?", (job_id,)).fetchall():
                if (data := json.loads(row["record"])["data"]) is not None:
                    metrics = msgspec.convert(data, Metrics)
                    values = (job_id, metrics.step, encode(metrics))
                    connection.execute("INSERT OR REPLACE INTO steps (job, step, record) VALUES (?, ?, ?)", values)

    def _copy_checkpoints(self, job_id: str, checkpoints: list[dict[str, Any]]) -> None:
        with self.database.transaction(removing=True) as connection:
            query = "SELECT record FROM checkpoints WHERE job = ? ORDER BY number"
            if [json.loads(row["record"]) for row in connection.execute(query, (job_id,))] == checkpoints:
                return
            connection.execute("DELETE FROM checkpoints WHERE job = ?", (job_id,))
            for found in checkpoints:
                one = msgspec.convert(found, StoredCheckpoint)
                values = (one.id, job_id, one.metrics.step, one.name is not None, encode(one))
                insert = "INSERT INTO checkpoints (id, job, step, served, record) VALUES (?, ?, ?, ?, ?)"
                connection.execute(insert, values)


def _standing(job: Job, stored: Job) -> Job:
    """A holder's job, standing as the record says: anybody may change that."""
    return msgspec.structs.replace(
        job, status=stored.status, finished_at=stored.finished_at, waits_for_space=stored.waits_for_space
    )


def hashes(directory: Path, but: Sequence[str] = ()) -> dict[str, str]:
    """The files below a directory, by their paths in it -> their hashes."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in but]
    return {path.relative_to(directory).as_posix(): file_hash(path) for path in paths}


def _object(job_id: str, hash_: str) -> str:
    return f"job-files/{job_id}/{hash_}"
