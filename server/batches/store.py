"""Batches in the database, and their state machine.

Every change is on disk when the call returns.

    validating -> in_progress -> finalizing -> completed
                  in_progress -> expired
    validating, in_progress -> cancelling -> cancelled
    any of these -> failed
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from adapters.storage.database import Database
from server.finetune.files import new_id
from server.finetune.record_table import RecordTable
from server.tenants.caller import Caller

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
    """The tenant has no batch with this id."""


class BatchStateError(ValueError):
    """The batch's status does not allow the operation."""


class Fault(msgspec.Struct, frozen=True):
    """A fault of the input file, in OpenAI's shape."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """One batch. `times`: Unix time of each status it has had."""

    id: str
    tenant: str
    status: Status
    endpoint: str
    input_file: str
    metadata: dict[str, str] | None = None
    adapters: list[str] | None = None  # of the bound key that created it
    times: dict[Status, int]
    total: int = 0
    completed: int = 0
    failed: int = 0
    faults: list[Fault] = []
    output_file: str | None = None
    error_file: str | None = None

    @property
    def has_work(self) -> bool:
        """Whether it is unfinished."""
        return self.status not in FINAL

    @property
    def created_at(self) -> int:
        return self.times["validating"]

    @property
    def caller(self) -> Caller:
        """The caller of its requests."""
        bound = None if self.adapters is None else frozenset(self.adapters)
        return Caller(self.tenant, roles=frozenset({"serve"}), adapters=bound)

    @property
    def expires_at(self) -> int:
        return self.created_at + WINDOW_SECONDS


class BatchStore(RecordTable[Batch, Status]):
    """All batches."""

    def __init__(self, database: Database) -> None:
        super().__init__(database, "batches", Batch, UnknownBatchError, get_args(Status), FINAL)

    def create(
        self,
        caller: Caller,
        endpoint: str,
        input_file: str,
        metadata: dict[str, str] | None,
        *,
        number: int | None = None,
    ) -> Batch:
        """Add a new batch; joins the current transaction, if any."""
        batch = Batch(
            id=new_id("batch_"),
            tenant=caller.tenant,
            adapters=None if caller.adapters is None else sorted(caller.adapters),
            status="validating",
            endpoint=endpoint,
            input_file=input_file,
            metadata=metadata,
            times={"validating": int(time.time())},
        )
        self.add(batch, number)
        return batch

    def move(self, batch: Batch, status: Status, **changes: Any) -> Batch:
        """Change the status, and other fields with it. Raises BatchStateError when the *stored* status forbids that."""
        with self.database.transaction(removing=True):
            moved = self.moved(self.get(batch.tenant, batch.id), status, changes)
            self.write(moved)
        return moved

    @staticmethod
    def moved(now: Batch, status: Status, changes: Mapping[str, Any]) -> Batch:
        """Return the batch with the changes of `move`. Raises BatchStateError."""
        if status not in _NEXT.get(now.status, ()):
            raise BatchStateError(f"Batch {now.id} is {now.status}; it cannot become {status}.")
        times = now.times | {status: int(time.time())}
        return msgspec.structs.replace(now, status=status, times=times, **changes)

    # --- sharing among servers: overridden by `SharedBatches` -----------------------------------------

    def move_for_client(self, batch: Batch, status: Status) -> Batch:
        """Change the status on a client's behalf, even if another server runs the batch."""
        return self.move(batch, status)

    def share(self, batch: Batch, directory: Path) -> None:
        """Upload a new batch, with the files in its directory, for other servers."""

    def prepare(self, batch: Batch, directory: Path) -> None:
        """Download the files needed to continue into the batch's directory."""

    def complete(self, batch: Batch) -> None:
        """Prepare to publish the files, once every request has its line. Raises BatchStateError."""

    def delete_files(self, id_: str) -> None:
        """Delete the files uploaded from the batch's directory."""
