"""Fine-tuning jobs shared by several servers in an object store; the rows in the local database are a copy.

`jobs/<id>.json` is a job: its status, its lease, its checkpoints, its log. `job-files/<id>/<hash>` are the files that
another server needs to continue, `job-logs/` the events beyond the record's limit.
"""

import contextlib
import json
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from adapters.storage.bucket import Conflict
from adapters.storage.database import Database
from adapters.storage.leases import LeaseLost
from adapters.storage.versions import RemoteUnavailable
from server.finetune.checkpoints import file_hash
from server.finetune.jobs import Job, JobSpec, JobStateError, JobStore, Status, StoredCheckpoint, event_row, level_of
from server.finetune.orphans import remove_orphans
from server.finetune.record_table import encode
from server.finetune.shared import Shared, list_position
from server.messages.training import Metrics
from server.usage import Ledger

if TYPE_CHECKING:
    from adapters.storage.records import Content

_TAIL = 64  # most events in a job's record; more become an object of their own


class SharedJobs(Shared[Job, Status], JobStore):
    """All jobs of the servers on one object store."""

    files = "job-files"
    stopped = JobStateError

    def __init__(self, database: Database, ledger: Ledger | None = None) -> None:
        super().__init__(database, ledger)
        self._sent: dict[str, int] = {}  # job -> number of its last event in the store

    def create(self, tenant: str, spec: JobSpec, *, number: int | None = None) -> Job:
        return super().create(tenant, spec, number=number or list_position())

    def share(self, job: Job, directory: Path) -> None:
        """Upload a new job for other servers; its rows are removed if that fails."""
        try:
            self._share(job, directory)
        except BaseException:
            self._remove_unshared(job.id)
            raise

    def remove(self, id_: str) -> None:
        with self.database.transaction(removing=True) as connection:
            connection.execute("DELETE FROM events WHERE job = ?", (id_,))
            super().remove(id_)

    def share_all(self, directory: Path) -> None:
        """Upload jobs created before the server used a store. `directory` holds their directories."""
        for job in self.unshared_records():
            self._share(job, directory / job.id)

    def _share(self, job: Job, directory: Path) -> None:
        inputs = hash_files(directory, excluding=("job.json",))
        self.upload_files(job.id, directory, inputs)
        self.update(job, inputs=inputs)
        self._upload_new(job.id, segments=[], tail=[])

    def delete_files(self, id_: str, keep: Sequence[str] = ()) -> None:
        """Also delete log objects that the job's record does not name, left by failed attempts."""
        super().delete_files(id_, keep)
        with contextlib.suppress(RemoteUnavailable), self._writing[id_]:
            existing = [entry.path for entry in self._bucket.list(f"job-logs/{id_}")]
            if self.leases.seconds_left(id_) > 0 and (found := self._stored.fetch(id_).content) is not None:
                named = {segment["name"] for segment in found["segments"]}
                self._bucket.delete([path for path in existing if path not in named])

    def remove_orphans(self, seconds: float) -> int:
        def named(content: "Content | None") -> list[str]:
            return [] if content is None else [segment["name"] for segment in content["segments"]]

        count = remove_orphans(self._bucket, "job-logs", self._stored, named, seconds)
        return count + super().remove_orphans(seconds)

    def claim(self, excluding: Collection[str] = ()) -> list[Job]:
        claimed = super().claim(excluding)
        if self._ledger is not None:
            for job in claimed:
                self._ledger.note_trained(job.id, job.trained_tokens or 0)
        return claimed

    def move(
        self, job: Job, status: Status, message: str | None = None, *, expected: Status | None = None, **changes: Any
    ) -> Job:
        change = self._moving(status, message, expected, changes)
        return self._change(job, change, changes)

    def move_for_client(
        self, job: Job, status: Status, message: str | None = None, *, expected: Status | None = None, **changes: Any
    ) -> Job:
        change = self._moving(status, message, expected, changes)
        return self._change(job, change, changes, by_any_server=True)

    def _moving(
        self, status: Status, message: str | None, expected: Status | None, changes: Mapping[str, Any]
    ) -> Callable[["Content"], "Content"]:
        def change(content: "Content") -> "Content":
            job = self.moved(self._read(content), status, expected, changes)
            tail = content["tail"] if message is None else [*content["tail"], event_row(message, level_of(status))]
            return content | {"record": msgspec.to_builtins(job), "tail": tail}

        return change

    def add_checkpoint(self, job: Job, **fields: Any) -> None:
        super().add_checkpoint(job, **fields)
        try:
            self.send(job.id)
        except LeaseLost:
            raise JobStateError(f"{job.id} is now held by another server.") from None

    @contextlib.contextmanager
    def grouped_changes(self) -> Iterator[None]:
        """Group several changes of a job; the last one uploads all of them."""
        yield

    # --- a record and its rows -----------------------------------------------------------------------

    def _merged(self, job_id: str, content: "Content") -> "Content":
        with self.database.reading() as connection:
            row = connection.execute("SELECT record FROM jobs WHERE id = ?", (job_id,)).fetchone()
            new = connection.execute(
                "SELECT id, record FROM events WHERE job = ? AND number > ? ORDER BY number",
                (job_id, self._sent.get(job_id, 0)),
            ).fetchall()
            checkpoints = connection.execute("SELECT record FROM checkpoints WHERE job = ? ORDER BY number", (job_id,))
            made = [json.loads(one["record"]) for one in checkpoints]
        job = self._decoder.decode(row["record"])
        if "record" in content:
            job = _with_status_of(job, self._read(content))
        stored = {event["id"] for event in content["tail"]} | {segment["last"] for segment in content["segments"]}
        sent = max((count for count, event in enumerate(new, start=1) if event["id"] in stored), default=0)
        tail = [*content["tail"], *(json.loads(event["record"]) for event in new[sent:])]
        segments = content["segments"]
        if len(tail) > _TAIL:
            name = f"job-logs/{job_id}/{uuid.uuid4().hex}.json"
            with contextlib.suppress(Conflict):  # from a retry of this upload
                self._bucket.put_if(name, json.dumps(tail).encode(), None)
            segments, tail = [*segments, {"name": name, "count": len(tail), "last": tail[-1]["id"]}], []
        changed = {"record": msgspec.to_builtins(job), "checkpoints": made, "segments": segments, "tail": tail}
        return content | changed

    def _copy(self, content: "Content", changes: Mapping[str, Any] | None = None, *, claimed: bool = False) -> bool:
        stored = self._read(content)
        self.leases.observe(stored.id, content)
        ours = self.leases.holds(stored.id) and not claimed
        segments = {} if ours else self._missing(stored.id, content)
        with self.database.transaction(removing=True) as connection:
            row = connection.execute("SELECT status, record FROM jobs WHERE id = ?", (stored.id,)).fetchone()
            job = stored
            if row is None:
                self.add(job, content["number"])
            else:
                if ours:
                    here = self._decoder.decode(row["record"])
                    job = msgspec.structs.replace(_with_status_of(here, stored), **changes or {})
                self.write(job)
            if not ours:
                self._copy_checkpoints(stored.id, content["checkpoints"])
            self._copy_events(stored.id, content, segments, ours=ours)
        return row is not None and row["status"] != stored.status and changes is None

    def _missing(self, job_id: str, content: "Content") -> dict[str, list[dict[str, Any]]]:
        """Return the log segments missing from the rows, by name, from the first difference on."""
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
        """Copy the record's events, in its order; with `ours`, local events not yet in the record follow."""
        with self.database.transaction(removing=True) as connection:
            query = "SELECT number, id, record FROM events WHERE job = ? ORDER BY number"
            found = connection.execute(query, (job_id,)).fetchall()
            complete = [one["count"] for one in content["segments"] if one["name"] not in segments]
            at = sum(complete)
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
        """Rebuild a job's steps from its events."""
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


def _with_status_of(job: Job, stored: Job) -> Job:
    """Return a holder's job with the record's status, which every server may change."""
    return msgspec.structs.replace(
        job, status=stored.status, finished_at=stored.finished_at, waits_for_space=stored.waits_for_space
    )


def hash_files(directory: Path, excluding: Sequence[str] = ()) -> dict[str, str]:
    """Return the files below a directory, as relative path -> hash."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in excluding]
    return {path.relative_to(directory).as_posix(): file_hash(path) for path in paths}
