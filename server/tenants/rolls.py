"""Storage of tenants and their keys: in a local database, and in the object store when there is one.

A tenant and its keys are one `Roll`, changed as a whole, so that rules about several keys hold although many servers
change them. With an object store, its rolls are authoritative and the database has a copy. A roll in the database that
was never in the store, from a time without one, is written to the store.
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


class KeptKey(msgspec.Struct, frozen=True):
    """A key and the SHA-256 of its secret, in hex."""

    key: Key
    digest: str


class Roll(msgspec.Struct, frozen=True):
    """A tenant and its keys by id."""

    tenant: Tenant
    keys: dict[str, KeptKey] = {}

    def having(self, kept: KeptKey) -> "Roll":
        """Return this roll with a key added or replaced."""
        return msgspec.structs.replace(self, keys=self.keys | {kept.key.id: kept})


DEFAULT = Roll(Tenant(id=TENANT, created_at=0))  # always exists

Change = Callable[[Roll | None], Roll | None]


class Rolls:
    """All rolls. Every method blocks on the disk, and on the object store when there is one; one call at a time.

    Args:
        shared: the rolls in the object store.
    """

    def __init__(self, database: Database, shared: "Records | None" = None) -> None:
        self._database = database
        self._shared = shared

    def load(self) -> dict[str, Roll]:
        """Return all rolls by tenant. Raises RemoteUnavailable."""
        rolls = {TENANT: DEFAULT}
        with self._database.reading() as connection:
            for (record,) in connection.execute("SELECT record FROM tenants ORDER BY id"):
                tenant = msgspec.json.decode(record, type=Tenant)
                rolls[tenant.id] = Roll(tenant)
            for digest, record in connection.execute("SELECT digest, record FROM keys"):
                key = msgspec.json.decode(record, type=Key)
                rolls[key.tenant] = rolls[key.tenant].having(KeptKey(key, digest.hex()))
        if self._shared is None:
            return rolls
        there = dict(self._news(self._shared))
        for id_, roll in list(rolls.items()):
            if id_ not in there and roll != DEFAULT:
                there[id_] = self.change(id_, roll, lambda old, ours=roll: old or ours)  # type: ignore[misc]
        for id_, found in there.items():
            self._copy(id_, rolls.get(id_), found)
        return {TENANT: DEFAULT} | {id_: found for id_, found in there.items() if found is not None}

    def change(self, id_: str, known: Roll | None, change: Change) -> Roll | None:
        """Apply `change` to a tenant's roll and return the result, durable; `known` is the roll in memory.

        `change` may be called several times. Raises its errors, and RemoteUnavailable.
        """
        if self._shared is None:
            now = change(known)
            if now != known:
                self._write(id_, known, now)
            return now

        def applied(content: "Content | None") -> "Content | None":
            before = None
            with suppress(ValueError):  # a damaged record counts as missing and is replaced
                before = None if content is None else _roll(content)
            after = change(known if before is None and id_ == TENANT else before)  # the default tenant always exists
            return None if after is None else msgspec.to_builtins(after)

        record = self._shared.change(tenant_name(id_), applied)
        now = None if record.content is None else _roll(record.content)
        self._copy(id_, known, now)
        return now

    def news(self, known: dict[str, Roll]) -> Iterator[tuple[str, Roll | None]]:
        """Yield tenants and rolls that other servers changed or removed (None). Raises RemoteUnavailable."""
        for id_, roll in self._news(self._shared) if self._shared is not None else ():
            self._copy(id_, known.get(id_), roll)
            yield id_, roll

    def _news(self, shared: "Records") -> Iterator[tuple[str, Roll | None]]:
        for record in shared.fetch_changes():
            try:
                roll = None if record.content is None else _roll(record.content)
            except ValueError as fault:
                shared.report_damage(record.key, fault)
                continue
            if shared.remember(record) and not _gone(record):
                yield tenant_of(record.key), roll

    def _copy(self, id_: str, before: Roll | None, now: Roll | None) -> None:
        """Copy a roll of the store to the local database; after a failure the next start copies it."""
        try:
            if now != before:
                self._write(id_, before, now)
        except (StorageFull, DatabaseBusy, DatabaseDamaged) as fault:
            log.warning("the keys of tenant %s were not copied to this disk: %s", tenant_name(id_), fault)

    def _write(self, id_: str, before: Roll | None, now: Roll | None) -> None:
        had, has = (roll.keys if roll is not None else {} for roll in (before, now))
        new = [kept for key, kept in has.items() if had.get(key) != kept]
        growing = now is not None and (before is None or now.tenant != before.tenant or bool(has.keys() - had.keys()))
        with self._database.transaction(removing=not growing) as connection:
            if now is None:
                connection.execute("DELETE FROM tenants WHERE id = ?", (id_,))
            elif now != DEFAULT and (before is None or now.tenant != before.tenant):
                row = (id_, msgspec.json.encode(now.tenant))
                connection.execute("INSERT OR REPLACE INTO tenants VALUES (?, ?)", row)
            connection.executemany("DELETE FROM keys WHERE id = ?", [(key,) for key in had.keys() - has.keys()])
            rows = [(kept.key.id, bytes.fromhex(kept.digest), msgspec.json.encode(kept.key)) for kept in new]
            connection.executemany("INSERT OR REPLACE INTO keys (id, digest, record) VALUES (?, ?, ?)", rows)


def _gone(record: "Record") -> bool:
    """Whether not even a tombstone exists: the record was deleted from outside, as servers keep tenants' tombstones."""
    return record.version is None


def _roll(content: "Content") -> Roll:
    return msgspec.convert(content, Roll)
