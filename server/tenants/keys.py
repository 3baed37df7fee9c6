"""Tenants and their keys: durable in `server.tenants.rolls`, found in memory.

A secret is `lk-<id>-<256 random bits>`. Its SHA-256 is stored, the id is shown. Such a secret cannot be guessed and
needs no slow hash.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from msgspec.structs import replace as replace_fields

from adapters.disk import StorageFull
from adapters.storage.database import Database, DatabaseBusy
from adapters.storage.versions import RemoteUnavailable
from server.errors import Conflict, InvalidRequest, NotFound, printable
from server.repeat import run_periodically
from server.tenants.caller import DEFAULT_NAME, OPERATOR_CALLER, TENANT, Caller, Role, effective_roles, tenant_name
from server.tenants.limits import UNLIMITED, Allowance, Limits
from server.tenants.rolls import DEFAULT_RECORD, Change, Key, StoredKey, Tenant, TenantRecord, TenantStore

if TYPE_CHECKING:
    from adapters.storage.records import Records

TENANT_ID = re.compile("[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?")
FLUSH_SECONDS = 60.0  # between writes of keys' last uses, so at most this much of them is lost in a crash
_ID_LENGTH = len("lk-01234567")
_EMPTY_DIGEST = bytes(32)  # compared with an unknown id's secret, so that the comparison takes as long

log = logging.getLogger(__name__)


class Tenants:
    """All tenants and keys of one server.

    Args:
        static_keys: secrets of the command line, each an admin of the default tenant.
        shared: the records in the object store, which other servers read and change.
        poll_seconds: the time within which their changes are seen.

    Attributes:
        requires_key: whether requests need a key: from the first key on.
    """

    def __init__(
        self,
        database: Database,
        static_keys: Sequence[str] = (),
        shared: "Records | None" = None,
        poll_seconds: float = 2.0,
    ) -> None:
        self._store = TenantStore(database, shared)
        self._shared = shared is not None
        self._poll_seconds = poll_seconds / 2
        self._static_digests = [_hash(key.encode()) for key in static_keys]
        self._changing = threading.Lock()
        self.requires_key = bool(self._static_digests)
        self._last_used: dict[str, int] = {}  # key -> Unix time of its last use, not yet written
        self._records = {TENANT: DEFAULT_RECORD}
        self.tenants: dict[str, Tenant] = {TENANT: DEFAULT_RECORD.tenant}
        self.keys: dict[str, Key] = {}
        self._callers: dict[str, tuple[bytes, Caller]] = {}  # by key
        self._allowances = {TENANT: Allowance()}
        self.default_caller = replace(OPERATOR_CALLER, allowance=self._allowances[TENANT])

    # --- start and background tasks -------------------------------------------------------------------

    async def start(self) -> None:
        """Read all tenants and keys. Raises RemoteUnavailable."""
        await asyncio.to_thread(self._load)

    def _load(self) -> None:
        for id_, record in self._store.load().items():
            self._apply(id_, record)

    async def follow(self) -> None:
        """Poll other servers' changes until cancelled."""
        if self._shared:
            poll = partial(asyncio.to_thread, self.poll)
            await run_periodically(poll, self._poll_seconds, "polling keys in the object store", RemoteUnavailable)

    def poll(self) -> None:
        """Apply other servers' changes once. Raises RemoteUnavailable."""
        with self._changing:
            for id_, record in self._store.changes(self._records):
                self._apply(id_, record)

    async def run(self) -> None:
        """Write keys' times of last use, periodically and when cancelled."""
        try:
            await run_periodically(
                partial(asyncio.to_thread, self._flush), FLUSH_SECONDS, "writing last-used times of keys"
            )
        finally:
            await asyncio.to_thread(self._flush)

    def _flush(self) -> None:
        used, self._last_used = self._last_used, {}
        for tenant in {self.keys[id_].tenant for id_ in list(used) if id_ in self.keys}:

            def note(record: TenantRecord | None) -> TenantRecord | None:
                for stored in list(record.keys.values()) if record is not None else ():
                    when = used.get(stored.key.id, 0)
                    if record is not None and when > (stored.key.last_used_at or 0):
                        record = record.with_key(
                            replace_fields(stored, key=replace_fields(stored.key, last_used_at=when))
                        )
                return record

            try:
                self._change(tenant, note)
            except (RemoteUnavailable, DatabaseBusy, StorageFull) as fault:
                log.warning("last-used times of keys are not written yet: %s", fault)
                for id_, when in used.items():
                    self._last_used.setdefault(id_, when)

    # --- authentication -------------------------------------------------------------------------------

    @property
    def is_multi_tenant(self) -> bool:
        """Whether there is a tenant beside the default one."""
        return len(self.tenants) > 1

    def find(self, secret: bytes) -> Caller | None:
        """Return the caller with this secret; None for an unknown, revoked or expired one. Uses memory only."""
        digest = _hash(secret)
        # All comparisons are made, so that the time taken reveals nothing about the keys.
        static = [hmac.compare_digest(digest, known) for known in self._static_digests]
        id_ = secret[:_ID_LENGTH].decode("latin-1")
        stored, caller = self._callers.get(id_, (_EMPTY_DIGEST, None))
        key = self.keys.get(id_)
        if hmac.compare_digest(digest, stored) and key is not None and key.valid(now := time.time()):
            self._last_used[id_] = int(now)
            return caller
        return self.default_caller if any(static) else None

    # --- tenants --------------------------------------------------------------------------------------

    def tenant(self, id_: str, visible: str | None = None) -> Tenant:
        """Return a tenant. With `visible`, all other tenants count as missing. Raises NotFound."""
        tenant = self.tenants.get(id_)
        if tenant is None or visible not in (None, tenant.id):
            raise _no_tenant(id_)
        return tenant

    def create_tenant(self, id_: str, limits: Limits = UNLIMITED) -> Tenant:
        """Create a tenant. Like all changes, blocks on the disk or the object store. Raises InvalidRequest, Conflict,
        RemoteUnavailable."""
        if not TENANT_ID.fullmatch(id_) or id_ == DEFAULT_NAME:
            message = f"`id`: 1 to 64 of a-z, 0-9 and -, neither first nor last a -, and not `{DEFAULT_NAME}`."
            raise InvalidRequest(message, param="id")

        def create(record: TenantRecord | None) -> TenantRecord:
            if record is not None:
                raise Conflict(f"The tenant `{id_}` already exists.", param="id", code="tenant_exists")
            return TenantRecord(Tenant(id=id_, created_at=int(time.time()), limits=limits))

        self._change(id_, create)
        return self.tenant(id_)

    def set_limits(self, id_: str, limits: Limits) -> Tenant:
        """Replace a tenant's limits. Raises NotFound."""

        def limited(record: TenantRecord | None) -> TenantRecord:
            record = _existing(id_, record)
            return replace_fields(record, tenant=replace_fields(record.tenant, limits=limits))

        self._change(id_, limited)
        return self.tenant(id_)

    def delete_tenant(self, id_: str) -> None:
        """Delete a tenant and its keys. Raises NotFound, Conflict."""

        def delete(record: TenantRecord | None) -> None:
            if _existing(id_, record).tenant.id == TENANT:
                raise Conflict("The default tenant cannot be deleted.", param="tenant")

        self._change(id_, delete)

    def _change(self, id_: str, change: Change) -> None:
        with self._changing:
            self._apply(id_, self._store.change(id_, self._records.get(id_), change))

    def _apply(self, id_: str, record: TenantRecord | None) -> None:
        """Replace a tenant's record in memory; None: the tenant was deleted."""
        before = self._records.get(id_)
        for gone in (before.keys.keys() if before else set()) - (record.keys.keys() if record else set()):
            self._callers.pop(gone)
            self.keys.pop(gone)
        if record is None:
            for table in (self._records, self.tenants, self._allowances):
                table.pop(id_, None)
            return
        allowance = self._allowances.setdefault(id_, Allowance())
        if record.tenant.limits != allowance.limits:
            allowance.set(record.tenant.limits)
        self._records[id_], self.tenants[id_] = record, record.tenant
        for stored in record.keys.values():
            key = stored.key
            bound = None if key.adapters is None else frozenset(key.adapters)
            roles = effective_roles(key.tenant, frozenset(key.roles))
            self.keys[key.id] = key
            self._callers[key.id] = bytes.fromhex(stored.digest), Caller(key.tenant, key.id, roles, bound, allowance)
            self.requires_key = True

    # --- keys -----------------------------------------------------------------------------------------

    def last_used(self, key: Key) -> int | None:
        """Return the Unix time of the last request with the key; None: it was never used."""
        return self._last_used.get(key.id, key.last_used_at)

    def key(self, tenant: str | None, id_: str) -> Key:
        """Return a key of this tenant, or with None of any tenant. Raises NotFound."""
        key = self.keys.get(id_)
        if key is None or tenant not in (None, key.tenant):
            raise _no_key(id_)
        return key

    def create_key(
        self,
        tenant: str,
        roles: Sequence[Role],
        *,
        name: str = "",
        adapters: Sequence[str] | None = None,
        expires_at: int | None = None,
    ) -> tuple[Key, str]:
        """Create a key; return it and its secret, which is not stored. Raises NotFound, InvalidRequest."""
        while (id_ := f"lk-{secrets.token_hex(4)}") in self.keys:
            pass
        secret = f"{id_}-{secrets.token_urlsafe(32)}"
        key = Key(
            id=id_,
            tenant=tenant,
            name=name,
            roles=list(dict.fromkeys(roles)),
            adapters=None if adapters is None else list(dict.fromkeys(adapters)),
            created_at=int(time.time()),
            expires_at=expires_at,
        )

        def create(record: TenantRecord | None) -> TenantRecord:
            record = _existing(tenant, record)
            if not (self.requires_key or record.keys or _lasting_operator(key)):
                message = (
                    "The first key must be an admin key of the default tenant that does not expire: from then on, all"
                )
                raise InvalidRequest(f"{message} requests need a key.", param="roles", code="first_key")
            return record.with_key(StoredKey(key, _hash(secret.encode()).hex()))

        self._change(tenant, create)
        return key, secret

    def revoke(self, key: Key) -> Key:
        """Revoke a key at once. Raises NotFound, and Conflict for the last key that can create others."""

        def revoked(record: TenantRecord | None) -> TenantRecord:
            record = _existing(key.tenant, record)
            stored = record.keys.get(key.id)
            if stored is None:
                raise _no_key(key.id)
            if stored.key.revoked_at is not None:
                return record
            others = self.keys | {id_: other.key for id_, other in record.keys.items()}
            others.pop(key.id)
            if not self._static_digests and not any(map(_lasting_operator, others.values())):
                message = "This is the operator's last key; create another one first."
                raise Conflict(message, param="id", code="last_key")
            return record.with_key(replace_fields(stored, key=replace_fields(stored.key, revoked_at=int(time.time()))))

        self._change(key.tenant, revoked)
        return self.key(None, key.id)


def _existing(id_: str, record: TenantRecord | None) -> TenantRecord:
    if record is None:
        raise _no_tenant(id_)
    return record


def _no_tenant(id_: str) -> NotFound:
    return NotFound(f"No such tenant: {printable(tenant_name(id_))}", param="tenant", code="tenant_not_found")


def _no_key(id_: str) -> NotFound:
    return NotFound(f"No such key: {printable(id_)}", param="id", code="key_not_found")


def _lasting_operator(key: Key) -> bool:
    return key.tenant == TENANT and "admin" in key.roles and key.expires_at is None and key.revoked_at is None


def _hash(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
