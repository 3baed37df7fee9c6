"""Batches as the database knows them.

Every change is on disk when the call returns.

    validating -> in_progress -> finalizing -> completed
                  in_progress -> expired
    validating, in_progress -> cancelling -> cancelled
    any of these -> failed
"""

import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

import msgspec

from adapters.storage.database import Database
from server.finetune.files import new_id
from server.finetune.jobs import readable

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
WINDOW_SECONDS = 24 * 3600

FINAL: frozenset[Status] = frozenset({"failed", "completed", "expired", "cancelled"})
_NEXT: dict[Status, set[Status]] = {
    "validating": {"in_progress", "failed", "cancelling"},
    "in_progress": {"finalizing", "failed", "expired", "cancelling"},
    "finalizing": {"completed", "failed"},
    "cancelling": {"cancelled", "failed"},
}


class UnknownBatchError(LookupError):
    """No batch of that id for this tenant."""


class BatchStateError(ValueError):
    """The batch's status does not allow this."""


class Fault(msgspec.Struct, frozen=True):
    """A fault of the input file, in OpenAI's shape."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """One batch now. `times`: when it got each status, in Unix time."""

    id: str
    tenant: str
    status: Status
    endpoint: str
    input_file: str
    metadata: dict[str, str] | None = None
    times: dict[Status, int]
    total: int = 0
    completed: int = 0
    failed: int = 0
    faults: list[Fault] = []
    output_file: str | None = None
    error_file: str | None = None

    @property
    def created_at(self) -> int:
        return self.times["validating"]

    @property
    def expires_at(self) -> int:
        return self.created_at + WINDOW_SECONDS


class BatchStore:
    """All batches, one tenant's at a time."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(self, tenant: str, endpoint: str, input_file: str, metadata: dict[str, str] | None) -> Batch:
        """A new row; join a transaction to do more with it."""
        batch = Batch(
            id=new_id("batch_"),
            tenant=tenant,
            status="validating",
            endpoint=endpoint,
            input_file=input_file,
            metadata=metadata,
            times={"validating": int(time.time())},
        )
        with self.database.transaction() as connection:
            connection.execute(
                "INSERT INTO batches (id, tenant, status, record) VALUES (?, ?, ?, ?)",
                (batch.id, tenant, batch.status, msgspec.json.encode(batch).decode()),
            )
        return batch

    def get(self, tenant: str, batch_id: str) -> Batch:
        """Raises UnknownBatchError."""
        with self.database.reading() as connection:
            row = connection.execute(
                "SELECT record FROM batches WHERE id = ? AND tenant = ?", (batch_id, tenant)
            ).fetchone()
        if row is None:
            raise UnknownBatchError(batch_id)
        return msgspec.json.decode(row["record"], type=Batch)

    def page(self, tenant: str, *, limit: int, after: str | None = None) -> tuple[list[Batch], bool]:
        """Newest first. Raises UnknownCursorError."""
        rows, more = self.database.page("batches", "tenant = ?", [tenant], limit=limit, after=after)
        return readable(rows, Batch), more

    def statuses(self) -> dict[str, Status]:
        """Of all batches, by id."""
        with self.database.reading() as connection:
            return {row["id"]: row["status"] for row in connection.execute("SELECT id, status FROM batches")}

    def unfinished(self) -> Sequence[Batch]:
        """Every tenant's batches that are not at an end, oldest first."""
        marks = ", ".join("?" * len(FINAL))
        with self.database.reading() as connection:
            rows = connection.execute(
                f"SELECT id, record FROM batches WHERE status NOT IN ({marks}) ORDER BY number", sorted(FINAL)
            ).fetchall()
        return readable(rows, Batch)

    def counts(self) -> dict[Status, int]:
        """How many batches are in each status."""
        with self.database.reading() as connection:
            rows = connection.execute("SELECT status, COUNT(*) AS n FROM batches GROUP BY status").fetchall()
        return dict.fromkeys(get_args(Status), 0) | {row["status"]: row["n"] for row in rows}

    def move(self, batch: Batch, status: Status, **changes: Any) -> Batch:
        """Change the status, and further fields with it. Raises BatchStateError when its status *now* forbids that."""
        with self.database.transaction(removing=True) as connection:
            now = self.get(batch.tenant, batch.id)
            if status not in _NEXT.get(now.status, ()):
                raise BatchStateError(f"Batch {batch.id} is {now.status}; it cannot become {status}.")
            times = now.times | {status: int(time.time())}
            moved = msgspec.structs.replace(now, status=status, times=times, **changes)
            connection.execute(
                "UPDATE batches SET status = ?, record = ? WHERE id = ?",
                (status, msgspec.json.encode(moved).decode(), batch.id),
            )
        return moved
