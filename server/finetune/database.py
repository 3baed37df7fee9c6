"""The tables of the job database: files, jobs with events, steps and checkpoints, evaluations, responses, batches."""

from pathlib import Path

from adapters.storage.database import BUSY_SECONDS, Database, sql_migration

_MIGRATIONS = (
    sql_migration("""
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL, filename TEXT NOT NULL,
    purpose TEXT NOT NULL, bytes INTEGER NOT NULL, created_at INTEGER NOT NULL, report TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL, status TEXT NOT NULL,
    record TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, job TEXT NOT NULL REFERENCES jobs(id),
    record TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS events_of_job ON events (job, number);
CREATE TABLE IF NOT EXISTS steps (
    job TEXT NOT NULL REFERENCES jobs(id), step INTEGER NOT NULL, record TEXT NOT NULL, PRIMARY KEY (job, step));
CREATE TABLE IF NOT EXISTS checkpoints (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, job TEXT NOT NULL REFERENCES jobs(id),
    step INTEGER NOT NULL, served INTEGER NOT NULL, record TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS checkpoints_of_job ON checkpoints (job, number);
CREATE TABLE IF NOT EXISTS evaluations (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL, status TEXT NOT NULL,
    record TEXT NOT NULL)
"""),
    sql_migration("""
CREATE TABLE IF NOT EXISTS responses (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL,
    created_at INTEGER NOT NULL, bytes INTEGER NOT NULL, record TEXT NOT NULL, items TEXT NOT NULL,
    events TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS bytes_of_responses ON responses (bytes)
"""),
    sql_migration("""
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL, status TEXT NOT NULL,
    record TEXT NOT NULL)
"""),
)


def open_database(path: Path, busy_seconds: float = BUSY_SECONDS) -> Database:
    """Open a server's job database, created or migrated as needed. Raises the errors of `Database`."""
    return Database(path, _MIGRATIONS, busy_seconds)
