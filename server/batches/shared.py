"""Batches shared by several servers in an object store; the rows in the local database are a copy.

`batches/<id>.json` is a batch, its lease, and the list of its answers' parts; `batch-files/<id>/` has its file and
these parts. The next lease holder runs only rows without an answer in any part.
"""

import contextlib
import os
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from adapters.storage.bucket import Conflict
from adapters.storage.database import Database
from adapters.storage.leases import LeaseLost
from adapters.storage.versions import RemoteUnavailable
from server.batches.rows import ANSWERS, INPUT
from server.batches.store import FINAL, Batch, BatchStateError, BatchStore, Status
from server.finetune.shared import Shared, list_position
from server.tenants.caller import Caller

if TYPE_CHECKING:
    from adapters.storage.records import Content

_PART_BYTES = 256 * 1024  # of answers per part
_PART_RENEWALS = 6  # renewals of the lease after which a smaller part is sent


class SharedBatches(Shared[Batch, Status], BatchStore):
    """All batches of the servers on one object store.

    Args:
        directory: holds the files of batches while they run.
    """

    files = "batch-files"
    stopped = BatchStateError

    def __init__(self, database: Database, directory: Path) -> None:
        super().__init__(database)
        self._directory = directory
        self._prepared: set[str] = set()  # held batches with the store's answers copied to this server
        self._answered: set[str] = set()  # batches with all answers

    def create(
        self,
        caller: Caller,
        endpoint: str,
        input_file: str,
        metadata: dict[str, str] | None,
        *,
        number: int | None = None,
    ) -> Batch:
        return super().create(caller, endpoint, input_file, metadata, number=number or list_position())

    def share(self, batch: Batch, directory: Path) -> None:
        """Upload a new batch for other servers; its row is removed if that fails."""
        try:
            self._bucket.put_file(self._object(batch.id, INPUT), directory / INPUT)
            self._upload_new(batch.id, parts=[])
        except BaseException:
            self._remove_unshared(batch.id)
            raise

    def share_all(self) -> None:
        """Upload batches created before the server used a store, with their answers so far."""
        for batch in self.unshared_records():
            directory, parts = self._directory / batch.id, list[dict[str, Any]]()
            if batch.has_work:
                self._bucket.put_file(self._object(batch.id, INPUT), directory / INPUT)
                parts = [part for name in ANSWERS.values() if (part := self._part(batch.id, name, 0, 1)) is not None]
            self._upload_new(batch.id, parts=parts)

    def move(self, batch: Batch, status: Status, **changes: Any) -> Batch:
        """Change the status. All answers are in the store before it is `finalizing`: a successor has no rows to run."""
        if status == "finalizing":
            self._answered.add(batch.id)
        return self._change(batch, self._moving(status, changes), changes)

    def move_for_client(self, batch: Batch, status: Status) -> Batch:
        return self._change(batch, self._moving(status, {}), {}, by_any_server=True)

    def complete(self, batch: Batch) -> None:
        """Upload all answers first, so that another lease holder writes the same files."""
        self._answered.add(batch.id)
        try:
            self.send(batch.id)
        except LeaseLost:
            raise BatchStateError(f"{batch.id} is now held by another server.") from None

    def _moving(self, status: Status, changes: Mapping[str, Any]) -> Callable[["Content"], "Content"]:
        def change(content: "Content") -> "Content":
            return content | {"record": msgspec.to_builtins(self.moved(self._read(content), status, changes))}

        return change

    def claim(self, excluding: Collection[str] = ()) -> list[Batch]:
        claimed = super().claim(excluding)
        for batch in claimed:
            self._prepared.discard(batch.id)
        return claimed

    def prepare(self, batch: Batch, directory: Path) -> None:
        """Copy the answers from the store, once for each lease: other servers may have added some."""
        if batch.id in self._prepared:
            return
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / INPUT).exists():
            copy = directory / f".{INPUT}"
            copy.unlink(missing_ok=True)
            self._bucket.get_file(self._object(batch.id, INPUT), copy)
            copy.rename(directory / INPUT)
        found = self._stored.fetch(batch.id).content
        assert found is not None
        for name in ANSWERS.values():
            with (directory / name).open("wb") as file:
                for part in found["parts"]:
                    if part["file"] == name:
                        if (read := self._bucket.read(self._object(batch.id, part["name"]))) is None:
                            raise RemoteUnavailable(f"{part['name']} of {batch.id} is missing")
                        file.write(read.content)
                os.fsync(file.fileno())
        self._prepared.add(batch.id)

    def _merged(self, id_: str, content: "Content") -> "Content":
        if "record" not in content:
            return content | {"record": self._row(id_)["record"]}
        if id_ not in self._prepared or content["record"]["status"] in FINAL:
            return content
        parts = list(content["parts"])
        flush = id_ in self._answered or content["lease"]["count"] % _PART_RENEWALS == 0
        for name in ANSWERS.values():
            sent = sum(part["bytes"] for part in parts if part["file"] == name)
            if (part := self._part(id_, name, sent, 1 if flush else _PART_BYTES)) is not None:
                parts.append(part)
        counts = {
            key: sum(part["lines"] for part in parts if part["file"] == ANSWERS[good])
            for key, good in (("completed", True), ("failed", False))
        }
        return content | {"parts": parts, "record": content["record"] | counts}

    def _part(self, id_: str, name: str, sent: int, min_bytes: int) -> dict[str, Any] | None:
        """Upload the complete lines after the first `sent` bytes of a file; None below `min_bytes`."""
        path = self._directory / id_ / name
        if not path.exists() or path.stat().st_size - sent < min_bytes:
            return None
        with path.open("rb") as file:
            file.seek(sent)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        part = {"file": name, "name": uuid.uuid4().hex, "bytes": len(new), "lines": new.count(b"\n")}
        with contextlib.suppress(Conflict):  # from a retry of this upload
            self._bucket.put_if(self._object(id_, str(part["name"])), new, None)
        return part

    def _copy(self, content: "Content", changes: Mapping[str, Any] | None = None, *, claimed: bool = False) -> bool:
        return self._copy_row(content, changes)

    def delete_files(self, id_: str, keep: Sequence[str] = ()) -> None:
        self._answered.discard(id_)
        if self.leases.holds(id_):
            super().delete_files(id_, keep)
