"""One SQLite file: a connection that writes, a connection that reads, and a layout that migrates.

A transaction that has returned is on disk (`synchronous=FULL`). Reads take a snapshot of the write-ahead log and never
wait for a writer or its fsync. SQLite before 3.51.3 can damage the log when two connections write or checkpoint at the
same instant; the second one here is opened read-only, does neither, and is closed first.
"""

import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adapters.disk import full_disk_named

RESERVE_BYTES = 256 * 1024  # beside the file, so that a full disk lets go

Migration = Callable[[sqlite3.Connection], object]  # from the layout before it to the next


class NewerLayoutError(RuntimeError):
    """The file was written by a newer release."""


class UnknownCursorError(LookupError):
    """`after` names no row of the list."""


def script(sql: str) -> Migration:
    """A migration of SQL statements, none of which holds a semicolon."""

    def run(connection: sqlite3.Connection) -> None:
        for statement in sql.split(";"):
            connection.execute(statement)

    return run


class Database:
    """The two connections and their locks; used from any thread.

    Args:
        path: the database file; its directory must exist.
        migrations: the first makes the tables, each further one changes them. `PRAGMA user_version` counts those that
            the file has been through; the first must also accept a file of the time before they were counted.

    Raises:
        NewerLayoutError: the file has been through more migrations than there are.
    """

    def __init__(self, path: Path, migrations: Sequence[Migration]) -> None:
        self._lock = threading.RLock()
        self._read_lock = threading.Lock()
        self._writer: int | None = None  # the thread whose transaction is open
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            self._connection.execute(f"PRAGMA {pragma}")
        try:
            self._migrate(path, migrations)
        except BaseException:
            self._connection.close()
            raise
        self._reader = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
        )
        self._reader.row_factory = sqlite3.Row
        self._reserve = path.with_name(f"{path.name}-reserve")
        self._keep_back()

    def _migrate(self, path: Path, migrations: Sequence[Migration]) -> None:
        with self.transaction() as connection:
            done: int = connection.execute("PRAGMA user_version").fetchone()[0]
            if done > len(migrations):
                raise NewerLayoutError(f"{path.name} was written by a newer release (layout {done})")
            for migrate in migrations[done:]:
                migrate(connection)
            connection.execute(f"PRAGMA user_version = {len(migrations)}")

    @contextmanager
    def transaction(self, *, removing: bool = False) -> Iterator[sqlite3.Connection]:
        """All or nothing, on disk on return. Nested use joins the outer transaction.

        Args:
            removing: it will free space: on a full disk it takes what is kept back for that.

        Raises StorageFull.
        """
        with self._lock, full_disk_named():
            if self._writer is not None:
                yield self._connection
                return
            if removing:
                self._reserve.write_bytes(b"")
            self._connection.execute("BEGIN IMMEDIATE")
            self._writer = threading.get_ident()
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # SQLite may have rolled back by itself
                    self._connection.execute("ROLLBACK")
                raise
            finally:
                self._writer = None
                if removing:
                    self._keep_back()

    def _keep_back(self) -> None:
        """Take from the disk what removing needs, or as much of it as there is."""
        with suppress(OSError, sqlite3.Error):
            try:
                self._reserve.write_bytes(bytes(RESERVE_BYTES))
            except OSError:
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                self._reserve.write_bytes(bytes(RESERVE_BYTES))

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The last committed state, one for the whole block; inside a transaction, what that has written."""
        if self._writer == threading.get_ident():
            yield self._connection
            return
        with self._read_lock:
            self._reader.execute("BEGIN")
            try:
                yield self._reader
            finally:
                self._reader.execute("ROLLBACK")

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
        with self.reading() as connection:
            if after is not None:
                cursor = connection.execute(f"{query} AND id = ?", (*arguments, after)).fetchone()
                if cursor is None:
                    raise UnknownCursorError(after)
                query += f" AND number {beyond} ?"
                arguments.append(cursor["number"])
            rows = connection.execute(f"{query} ORDER BY number {order} LIMIT ?", (*arguments, limit + 1)).fetchall()
        return rows[:limit], len(rows) > limit

    def close(self) -> None:
        """Wait for what is under way, then close both connections."""
        with self._read_lock:
            self._reader.close()
        with self._lock:
            self._connection.close()
