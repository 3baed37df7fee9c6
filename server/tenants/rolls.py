"""Storage of tenants and their keys: in a local database, and in the object store when there is one.

A tenant and its keys are one `TenantRecord`, changed as a whole, so that rules about several keys hold although many
servers change them. With an object store, its records are authoritative and the database has a copy. A record in the
database that was never in the store, from a time without one, is written to the store.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from adapters.disk import StorageFull
from adapters.storage.database import Database, DatabaseBusy, DatabaseDamaged
from server.tenants.caller import TENANT, Role, tenant_name, tenant_of
from server.tenants.limits import UNLIMITED, Limits

if TYPE_CHECKING:
    from adapters.storage.records import Content, Record, Records

log = logging.getLogger(__name__)


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """One tenant."""

    id: str
    created_at: int
    limits: Limits = UNLIMITED


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """One key, without its secret. The secret starts with `id`, so that people recognise it."""

    id: str
    tenant: str
    name: str
    roles: list[Role]
    adapters: list[str] | None
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None
    last_used_at: int | None = None

    def valid(self, now: float) -> bool:
        """Whether the key is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class StoredKey(msgspec.Struct, frozen=True):
    """A key and the SHA-256 of its secret, in hex."""

    key: Key
    digest: str


class TenantRecord(msgspec.Struct, frozen=True):
    """A tenant and its keys by id."""

    tenant: Tenant
    keys: dict[str, StoredKey] = {}

    def with_key(self, kept: StoredKey) -> "TenantRecord":
        """Return this record with a key added or replaced."""
        return msgspec.structs.replace(self, keys=self.keys | {kept.key.id: kept})


DEFAULT_RECORD = TenantRecord(Tenant(id=TENANT, created_at=0))  # always exists

Change = Callable[[TenantRecord | None], TenantRecord | None]


class TenantStore:
    """All tenants' records. Methods block on the disk, and on the object store when there is one; one call at a time.

    Args:
        shared: the records in the object store.
    """

    def __init__(self, database: Database, shared: "Records | None" = None) -> None:
        self._database = database
        self._shared = shared

    def load(self) -> dict[str, TenantRecord]:
        """Return all records by tenant. Raises RemoteUnavailable."""
        records = {TENANT: DEFAULT_RECORD}
        with self._database.reading() as connection:
            for (record,) in connection.execute("SELECT record FROM tenants ORDER BY id"):
                tenant = msgspec.json.decode(record, type=Tenant)
                records[tenant.id] = TenantRecord(tenant)
            for digest, record in connection.execute("SELECT digest, record FROM keys"):
                key = msgspec.json.decode(record, type=Key)
                records[key.tenant] = records[key.tenant].with_key(StoredKey(key, digest.hex()))
        if self._shared is None:
            return records
        shared_records = dict(self._read_changes(self._shared))
        for id_, tenant_record in list(records.items()):
            if id_ not in shared_records and tenant_record != DEFAULT_RECORD:
                shared_records[id_] = self.change(id_, tenant_record, lambda old, own=tenant_record: old or own)  # type: ignore[misc]
        for id_, found in shared_records.items():
            self._copy_to_database(id_, records.get(id_), found)
        return {TENANT: DEFAULT_RECORD} | {id_: found for id_, found in shared_records.items() if found is not None}

    def change(self, id_: str, current: TenantRecord | None, change: Change) -> TenantRecord | None:
        """Apply `change` to a tenant's record and return the result, durable; `current` is the record in memory.

        `change` may be called several times. Raises its errors, and RemoteUnavailable.
        """
        if self._shared is None:
            now = change(current)
            if now != current:
                self._write(id_, current, now)
            return now

        def apply(content: "Content | None") -> "Content | None":
            before = None
            with suppress(ValueError):  # a damaged record counts as missing and is replaced
                before = None if content is None else _decode(content)
            after = change(current if before is None and id_ == TENANT else before)  # the default tenant always exists
            return None if after is None else msgspec.to_builtins(after)

        record = self._shared.change(tenant_name(id_), apply)
        now = None if record.content is None else _decode(record.content)
        self._copy_to_database(id_, current, now)
        return now

    def changes(self, current: dict[str, TenantRecord]) -> Iterator[tuple[str, TenantRecord | None]]:
        """Yield tenants and records that other servers changed or removed (None). Raises RemoteUnavailable."""
        for id_, tenant_record in self._read_changes(self._shared) if self._shared is not None else ():
            self._copy_to_database(id_, current.get(id_), tenant_record)
            yield id_, tenant_record

    def _read_changes(self, shared: "Records") -> Iterator[tuple[str, TenantRecord | None]]:
        for record in shared.fetch_changes():
            try:
                tenant_record = None if record.content is None else _decode(record.content)
            except ValueError as fault:
                shared.report_damage(record.key, fault)
                continue
            if shared.remember(record) and not _deleted_outside(record):
                yield tenant_of(record.key), tenant_record

    def _copy_to_database(self, id_: str, before: TenantRecord | None, now: TenantRecord | None) -> None:
        """Copy a record of the store to the local database; after a failure the next start copies it."""
        try:
            if now != before:
                self._write(id_, before, now)
        except (StorageFull, DatabaseBusy, DatabaseDamaged) as fault:
            log.warning("the keys of tenant %s were not copied to this disk: %s", tenant_name(id_), fault)

    def _write(self, id_: str, before: TenantRecord | None, now: TenantRecord | None) -> None:
        had, has = (each.keys if each is not None else {} for each in (before, now))
        new = [kept for key, kept in has.items() if had.get(key) != kept]
        growing = now is not None and (before is None or now.tenant != before.tenant or bool(has.keys() - had.keys()))
        with self._database.transaction(removing=not growing) as connection:
            if now is None:
                connection.execute("DELETE FROM tenants WHERE id = ?", (id_,))
            elif now != DEFAULT_RECORD and (before is None or now.tenant != before.tenant):
                row = (id_, msgspec.json.encode(now.tenant))
                connection.execute("INSERT OR REPLACE INTO tenants VALUES (?, ?)", row)
            connection.executemany("DELETE FROM keys WHERE id = ?", [(key,) for key in had.keys() - has.keys()])
            rows = [(kept.key.id, bytes.fromhex(kept.digest), msgspec.json.encode(kept.key)) for kept in new]
            connection.executemany("INSERT OR REPLACE INTO keys (id, digest, record) VALUES (?, ?, ?)", rows)


def _deleted_outside(record: "Record") -> bool:
    """Whether not even a tombstone exists: the record was deleted from outside, as servers keep tenants' tombstones."""
    return record.version is None


def _decode(content: "Content") -> TenantRecord:
    return msgspec.convert(content, TenantRecord)
