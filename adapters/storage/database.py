"""One SQLite file: a connection that writes, a connection that reads, and a layout that migrates.

A transaction that has returned is on disk (`synchronous=FULL`). Reads take a snapshot of the write-ahead log and never
wait for a writer or its fsync. SQLite before 3.51.3 can damage the log when two connections write or checkpoint at the
same time; the second one here is opened read-only, does neither, and is closed first.
"""

import errno
import logging
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from adapters.disk import StorageFull, raising_storage_full

Migration = Callable[[sqlite3.Connection], object]  # from one layout to the next

BUSY_SECONDS = 5.0
RESERVE_BYTES = 256 * 1024  # beside the file, so that removing works on a full disk
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_UNOPENED = frozenset({sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN})  # for example for lack of disk space

log = logging.getLogger(__name__)


class NewerLayoutError(RuntimeError):
    """The file was written by a newer release."""


class DatabaseBusy(Exception):
    """Another process or thread holds the file for longer than the time limit."""


class DatabaseDamaged(Exception):
    """The file is no SQLite database, or an incomplete one."""


class UnknownCursorError(LookupError):
    """`after` is not the id of a row of the list."""


def sql_migration(sql: str) -> Migration:
    """A migration of SQL statements without semicolons inside."""

    def run(connection: sqlite3.Connection) -> None:
        for statement in sql.split(";"):
            connection.execute(statement)

    return run


def find_damage(path: Path) -> str | None:
    """The fault of a database file, which is opened read-only; None when it is whole."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            found: str = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.DatabaseError as fault:
        return str(fault)
    return None if found == "ok" else " ".join(found.split())


class Database:
    """The two connections and their locks; used from any thread.

    While another process holds the file, or its disk is full, it is read from a copy in memory; each transaction tries
    to open it for writing.

    Args:
        path: the database file; its directory must exist.
        migrations: the first makes the tables, each further one changes them. `PRAGMA user_version` counts those
            already applied to the file; the first must also accept a file from before they were counted.
        busy_seconds: how long a change waits for others, in this process and in another.

    Raises:
        NewerLayoutError: more migrations were applied to the file than there are.
        DatabaseDamaged: the file is damaged.
    """

    def __init__(self, path: Path, migrations: Sequence[Migration], busy_seconds: float = BUSY_SECONDS) -> None:
        self.path = path
        self._migrations = migrations
        self._busy_seconds = busy_seconds
        self._lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._owner: int | None = None  # the thread with the open transaction
        self._after_commit: list[Callable[[], object]] = []  # calls that follow its commit
        self._connection: sqlite3.Connection | None = None
        self._reserve = path.with_name(f"{path.name}-reserve")
        try:
            self._open()
            self._write_reserve()
        except (DatabaseBusy, StorageFull) as fault:
            log.warning("%s: %s; it is read only, until it can be written", path, fault)
            self._reader = self._copy_to_memory()

    def _open(self) -> None:
        with self._translated_errors(full=_UNOPENED):
            connection = sqlite3.connect(
                self.path, timeout=self._busy_seconds, isolation_level=None, check_same_thread=False
            )
            try:
                # A mebibyte: without a limit the journal keeps its largest size ever, and the disk may be small.
                journal = ("journal_mode=WAL", "wal_autocheckpoint=256", "journal_size_limit=1048576")
                for pragma in (*journal, "synchronous=FULL", "foreign_keys=ON"):
                    connection.execute(f"PRAGMA {pragma}")
                self._prepare(connection)
                reader = sqlite3.connect(
                    f"{self.path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
                )
            except BaseException:
                connection.close()
                raise
        connection.row_factory = reader.row_factory = sqlite3.Row
        self._connection = connection
        with self._read_lock:
            copy, self._reader = getattr(self, "_reader", None), reader
        if copy is not None:
            copy.close()
            log.info("%s can be written again", self.path)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Check that the file is whole, and migrate it to the newest layout."""
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise DatabaseDamaged(f"{self.path.name} is damaged: {' '.join(found.split())}")
        done: int = connection.execute("PRAGMA user_version").fetchone()[0]
        if done > len(self._migrations):
            raise NewerLayoutError(f"{self.path.name} was written by a newer release (layout {done})")
        if done == len(self._migrations):
            return
        connection.execute("BEGIN IMMEDIATE")
        try:
            for migrate in self._migrations[done:]:
                migrate(connection)
            connection.execute(f"PRAGMA user_version = {len(self._migrations)}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _copy_to_memory(self) -> sqlite3.Connection:
        """A copy in memory of the file and its write-ahead log."""
        memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        memory.row_factory = sqlite3.Row
        with self._translated_errors(), tempfile.TemporaryDirectory(prefix="lorakeet-") as directory:
            copy = Path(directory) / "copy"
            for suffix in ("", "-wal"):
                source = self.path.with_name(self.path.name + suffix)
                if source.exists():
                    shutil.copyfile(source, copy.with_name(copy.name + suffix))
            opened = sqlite3.connect(copy)
            opened.backup(memory)
            opened.close()
            self._prepare(memory)
        return memory

    @contextmanager
    def _translated_errors(self, full: frozenset[int] = frozenset()) -> Iterator[None]:
        """Turn SQLite's errors for a busy file, a damaged file or a full disk into DatabaseBusy, DatabaseDamaged,
        StorageFull.

        `full`: further error codes that mean a full disk here.
        """
        try:
            with raising_storage_full():
                yield
        except sqlite3.DatabaseError as fault:
            code = getattr(fault, "sqlite_errorcode", 0) & 0xFF
            if code in _BUSY:
                raise DatabaseBusy(f"another process holds {self.path.name}") from None
            if code in _DAMAGED:
                raise DatabaseDamaged(f"{self.path.name} is damaged: {fault}") from None
            if code in full:
                raise StorageFull(errno.ENOSPC, f"no disk space for {self.path.name}: {fault}") from None
            raise

    @contextmanager
    def transaction(self, *, removing: bool = False) -> Iterator[sqlite3.Connection]:
        """Commit all or nothing, on disk on return. Nested use joins the outer transaction.

        Args:
            removing: it will free space: on a full disk it takes the reserve.

        Raises DatabaseBusy, DatabaseDamaged, StorageFull; nothing has changed then.
        """
        if self._owner == threading.get_ident():
            assert self._connection is not None
            yield self._connection
            return
        if not self._lock.acquire(timeout=self._busy_seconds):
            raise DatabaseBusy(f"another change holds {self.path.name}")
        try:
            if removing:
                with suppress(OSError):
                    self._reserve.write_bytes(b"")
            if self._connection is None:
                self._open()
            connection = self._connection
            assert connection is not None
            with self._translated_errors():
                connection.execute("BEGIN IMMEDIATE")
                self._owner = threading.get_ident()
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    self._after_commit.clear()
                    if connection.in_transaction:  # SQLite may have rolled back by itself
                        connection.execute("ROLLBACK")
                    raise
                finally:
                    self._owner = None
            callbacks, self._after_commit = self._after_commit, []
            for callback in callbacks:
                callback()
        finally:
            if removing:
                self._write_reserve()
            self._lock.release()

    def _write_reserve(self) -> None:
        """Write the reserve for removals, or as much of it as the disk has room for."""
        with suppress(OSError, sqlite3.Error):
            try:
                self._reserve.write_bytes(bytes(RESERVE_BYTES))
            except OSError:
                if self._connection is not None:
                    self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                self._reserve.write_bytes(bytes(RESERVE_BYTES))

    def after_commit(self, callback: Callable[[], object]) -> None:
        """Call `callback` once the open transaction is on disk, and never if it fails."""
        self._after_commit.append(callback)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The last committed state, one for the whole block; inside a transaction, its own writes as well.

        Raises DatabaseBusy, DatabaseDamaged.
        """
        if self._owner == threading.get_ident():
            assert self._connection is not None
            yield self._connection
            return
        with self._read_lock, self._translated_errors():
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
        order, comparison = ("DESC", "<") if newest_first else ("ASC", ">")
        query, arguments = f"SELECT * FROM {table} WHERE {where}", list(values)
        with self.reading() as connection:
            if after is not None:
                cursor = connection.execute(f"{query} AND id = ?", (*arguments, after)).fetchone()
                if cursor is None:
                    raise UnknownCursorError(after)
                query += f" AND number {comparison} ?"
                arguments.append(cursor["number"])
            rows = connection.execute(f"{query} ORDER BY number {order} LIMIT ?", (*arguments, limit + 1)).fetchall()
        return rows[:limit], len(rows) > limit

    def close(self) -> None:
        """Wait for operations in progress, then close both connections."""
        with self._read_lock:
            self._reader.close()
        with self._lock:
            if self._connection is not None:
                self._connection.close()
