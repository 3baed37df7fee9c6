"""One SQLite file, one connection, used from any thread: what fine-tuning must not forget.

A transaction that has returned is on disk (`synchronous=FULL`). One connection only, guarded by a lock: SQLite's
write-ahead log has had faults with several.
"""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UnknownCursorError(LookupError):
    """`after` names no row of the list."""


class Database:
    """The connection and its lock.

    Args:
        path: the database file; its directory must exist.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        self._connection.execute("PRAGMA foreign_keys=ON")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing. Nested use joins the outer transaction."""
        with self._lock:
            if self._connection.in_transaction:
                yield self._connection
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def page(
        self,
        table: str,
        where: str,
        values: Sequence[Any],
        *,
        limit: int,
        after: str | None = None,
        newest_first: bool = True,
    ) -> tuple[list[sqlite3.Row], bool]:
        """Rows of a table in the order of its `number` column, at most `limit` of them, and whether more follow.

        `after` is the id of the row before the page. Raises UnknownCursorError when no row `where` has that id.
        """
        order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
        query, arguments = f"SELECT * FROM {table} WHERE {where}", list(values)
        with self.transaction() as connection:
            if after is not None:
                cursor = connection.execute(f"{query} AND id = ?", (*arguments, after)).fetchone()
                if cursor is None:
                    raise UnknownCursorError(after)
                query += f" AND number {beyond} ?"
                arguments.append(cursor["number"])
            rows = connection.execute(f"{query} ORDER BY number {order} LIMIT ?", (*arguments, limit + 1)).fetchall()
        return rows[:limit], len(rows) > limit

    def close(self) -> None:
        with self._lock:
            self._connection.close()
