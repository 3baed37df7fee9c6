"""The SQLite layer: commits are durable, readers never wait, old layouts are migrated and newer ones refused."""

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from adapters.storage.database import Database, NewerLayoutError, sql_migration

TABLE = sql_migration("CREATE TABLE IF NOT EXISTS things (number INTEGER PRIMARY KEY, id TEXT)")
COLOUR = sql_migration("ALTER TABLE things ADD COLUMN colour TEXT DEFAULT 'green'")


def ids(database: Database) -> list[str]:
    with database.reading() as connection:
        return [row["id"] for row in connection.execute("SELECT id FROM things ORDER BY number")]


def add(database: Database, id_: str) -> None:
    with database.transaction() as connection:
        connection.execute("INSERT INTO things (id) VALUES (?)", (id_,))


def test_a_file_of_the_time_before_versions_is_migrated_once(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "db", isolation_level=None)) as old:
        old.execute("CREATE TABLE things (number INTEGER PRIMARY KEY, id TEXT)")
        old.execute("INSERT INTO things (id) VALUES ('a')")
    for _ in range(2):
        with closing(Database(tmp_path / "db", [TABLE, COLOUR])) as database, database.reading() as connection:
            assert [tuple(row) for row in connection.execute("SELECT id, colour FROM things")] == [("a", "green")]
            assert connection.execute("PRAGMA user_version").fetchone()[0] == 2
    with pytest.raises(NewerLayoutError, match="newer release"):
        Database(tmp_path / "db", [TABLE])


def test_a_migration_that_fails_leaves_the_layout_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError):
        Database(tmp_path / "db", [TABLE, COLOUR, sql_migration("SELECT nothing FROM nowhere")])
    with closing(Database(tmp_path / "db", [TABLE])) as database:
        assert ids(database) == []


def test_readers_see_the_last_commit_while_another_thread_writes(tmp_path: Path) -> None:
    with closing(Database(tmp_path / "db", [TABLE])) as database:
        add(database, "a")
        seen: list[list[str]] = []
        with database.transaction() as connection:
            connection.execute("INSERT INTO things (id) VALUES ('b')")
            reader = threading.Thread(target=lambda: seen.append(ids(database)), daemon=True)
            reader.start()
            reader.join(10)
            assert seen == [["a"]]
            assert ids(database) == ["a", "b"], "the writer reads its own changes"
        assert ids(database) == ["a", "b"]


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def two(database: Database) -> None:
        with database.transaction():
            add(database, "a")
            raise ZeroDivisionError

    with closing(Database(tmp_path / "db", [TABLE])) as database:
        with pytest.raises(ZeroDivisionError):
            two(database)
        add(database, "b")
        assert ids(database) == ["b"]


def test_the_reader_cannot_write(tmp_path: Path) -> None:
    with (
        closing(Database(tmp_path / "db", [TABLE])) as database,
        database.reading() as connection,
        pytest.raises(sqlite3.OperationalError, match="readonly"),
    ):
        connection.execute("INSERT INTO things (id) VALUES ('a')")


def test_every_commit_is_synced(tmp_path: Path) -> None:
    with closing(Database(tmp_path / "db", [TABLE])) as database, database.transaction() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_the_journal_does_not_keep_the_room_that_it_once_took(tmp_path: Path) -> None:
    """On a small disk the space would be missing for jobs that wait for free space."""
    with closing(Database(tmp_path / "db", [TABLE])) as database:
        journal = tmp_path / "db-wal"
        add(database, "x" * (3 << 20))
        assert journal.stat().st_size > 3 << 20
        for number in range(60):
            add(database, f"{number}" * 20_000)
            if number > 4:
                assert journal.stat().st_size <= 1.5 * (1 << 20)
