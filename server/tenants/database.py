"""The tables of tenants, their keys and their usage.

A damaged database is not replaced by an empty one: without keys, every caller would be admitted.
"""

from pathlib import Path

from adapters.storage.database import BUSY_SECONDS, Database, sql_migration

_MIGRATIONS = (
    sql_migration("""
CREATE TABLE tenants (id TEXT PRIMARY KEY, record TEXT NOT NULL);
CREATE TABLE keys (id TEXT PRIMARY KEY, digest BLOB NOT NULL, record TEXT NOT NULL)
"""),
    sql_migration("""
CREATE TABLE usage (
    tenant TEXT NOT NULL, adapter TEXT NOT NULL, day TEXT NOT NULL, requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, generated_tokens INTEGER NOT NULL,
    trained_tokens INTEGER NOT NULL, PRIMARY KEY (tenant, adapter, day)) WITHOUT ROWID;
CREATE INDEX usage_by_day ON usage (day, tenant, adapter);
CREATE TABLE trained (job TEXT PRIMARY KEY, tokens INTEGER NOT NULL) WITHOUT ROWID
"""),
    sql_migration("""
ALTER TABLE usage ADD COLUMN device_seconds REAL NOT NULL DEFAULT 0;
CREATE TABLE server (id TEXT NOT NULL);
INSERT INTO server VALUES (lower(hex(randomblob(8))))
"""),
)


def server_id(database: Database) -> str:
    """Return this server's id, under which its usage and audit entries lie in the object store."""
    with database.transaction(removing=True) as connection:  # not `reading`: a copy in memory may have another id
        id_: str = connection.execute("SELECT id FROM server").fetchone()[0]
    return id_


def open_database(path: Path, busy_seconds: float = BUSY_SECONDS) -> Database:
    """Open, create or migrate the database of one server's tenants. Raises the errors of `Database`."""
    return Database(path, _MIGRATIONS, busy_seconds)
