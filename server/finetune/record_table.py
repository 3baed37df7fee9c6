"""Tables with one record per row, in JSON beside its id, tenant and status."""

import logging
from collections.abc import Collection, Sequence
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from adapters.storage.database import Database

log = logging.getLogger("lorakeet.finetune")


class Record(Protocol):
    """The fields of a record that its table needs."""

    @property
    def id(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def created_at(self) -> int: ...
    @property
    def has_work(self) -> bool: ...  # whether there is work to do


R = TypeVar("R", bound=Record)
S = TypeVar("S", bound=str)  # statuses


def encode(record: object) -> str:
    """Return a record as its row's JSON."""
    return msgspec.json.encode(record).decode()


class RecordTable(Generic[R, S]):
    """All records of one table, one tenant's at a time.

    Args:
        unknown: raised with a record's id when the tenant has no such record.
        statuses: all statuses.
        final: statuses of ended records.
    """

    def __init__(
        self,
        database: Database,
        table: str,
        kind: type[R],
        unknown: type[LookupError],
        statuses: Sequence[S],
        final: Collection[S],
    ) -> None:
        self.database = database
        self._table = table
        self._kind = kind
        # Made here, in one thread: concurrent first uses of a type crash msgspec.
        self._decoder = msgspec.json.Decoder(kind)
        self._unknown = unknown
        self._statuses = statuses
        self._final = sorted(final)

    def add(self, record: R, number: int | None = None) -> None:
        """Add a row; joins the current transaction, if any. `number`: its position in lists, the last by default."""
        with self.database.transaction() as connection:
            connection.execute(
                f"INSERT INTO {self._table} (number, id, tenant, status, record) VALUES (?, ?, ?, ?, ?)",
                (number, record.id, record.tenant, record.status, encode(record)),
            )

    def write(self, record: R) -> None:
        """Replace the row of a record."""
        with self.database.transaction() as connection:
            connection.execute(
                f"UPDATE {self._table} SET status = ?, record = ? WHERE id = ?",
                (record.status, encode(record), record.id),
            )

    def remove(self, id_: str) -> None:
        """Delete a row; possible on a full disk."""
        with self.database.transaction(removing=True) as connection:
            connection.execute(f"DELETE FROM {self._table} WHERE id = ?", (id_,))

    def get(self, tenant: str, id_: str) -> R:
        """Return a record. Raises `unknown`."""
        with self.database.reading() as connection:
            row = connection.execute(
                f"SELECT record FROM {self._table} WHERE id = ? AND tenant = ?", (id_, tenant)
            ).fetchone()
        if row is None:
            raise self._unknown(id_)
        return self._decoder.decode(row["record"])

    def page(self, tenant: str, *, limit: int, after: str | None = None) -> tuple[list[R], bool]:
        """Return a page of records, newest first, and whether more follow. Raises UnknownCursorError."""
        return self._page("tenant = ?", [tenant], limit, after)

    def _page(self, where: str, values: Sequence[str], limit: int, after: str | None) -> tuple[list[R], bool]:
        rows, more = self.database.page(self._table, where, values, limit=limit, after=after)
        return self._readable(rows), more

    def _readable(self, rows: Sequence[Any]) -> list[R]:
        """Return the records of rows, without unreadable ones."""
        found = []
        for row in rows:
            try:
                found.append(self._decoder.decode(row["record"]))
            except (msgspec.DecodeError, TypeError) as fault:
                log.error("skipped the unreadable row of %s: %s", row["id"], fault)
        return found

    def statuses(self) -> dict[str, S]:
        """Return the statuses of all records by id."""
        with self.database.reading() as connection:
            return {row["id"]: row["status"] for row in connection.execute(f"SELECT id, status FROM {self._table}")}

    def unfinished(self) -> list[R]:
        """Return every tenant's records that have not ended, oldest first."""
        marks = ", ".join("?" * len(self._final))
        with self.database.reading() as connection:
            rows = connection.execute(
                f"SELECT id, record FROM {self._table} WHERE status NOT IN ({marks}) ORDER BY number", self._final
            ).fetchall()
        return self._readable(rows)

    def claim(self, excluding: Collection[str] = ()) -> list[R]:
        """Return the records that this server should start work on, without the ids in `excluding`."""
        return [record for record in self.unfinished() if record.has_work and record.id not in excluding]

    def ended(self, record: R) -> bool:
        """Whether a record has ended."""
        return record.status in self._final

    def all(self) -> list[R]:
        """Return every tenant's records, oldest first."""
        with self.database.reading() as connection:
            rows = connection.execute(f"SELECT id, record FROM {self._table} ORDER BY number").fetchall()
        return self._readable(rows)

    def holds(self, id_: str) -> bool:
        """Whether this server may work on a record."""
        return True

    def counts(self) -> dict[S, int]:
        """Return the number of records in each status."""
        with self.database.reading() as connection:
            rows = connection.execute(f"SELECT status, COUNT(*) AS n FROM {self._table} GROUP BY status").fetchall()
        return dict.fromkeys(self._statuses, 0) | {row["status"]: row["n"] for row in rows}
