"""Tenants and their keys: durable in SQLite, found in memory.

A secret is `lk-<id>-<256 random bits>`. Its SHA-256 is kept, the id is shown. A secret that nobody can guess needs no
slow hash.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from adapters.storage.database import Database
from server.errors import Conflict, InvalidRequest, NotFound, shown
from server.tenants.caller import DEFAULT_NAME, EVERYTHING, TENANT, Caller, Role, allowed, tenant_name
from server.tenants.limits import UNLIMITED, Allowance, Limits

TENANT_ID = re.compile("[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?")
FLUSH_SECONDS = 60.0  # by which the time of a key's last use may be behind after a crash
_ID_LENGTH = len("lk-01234567")
_NOTHING = bytes(32)  # what an unknown id is compared with, so that it takes as long


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """One tenant."""

    id: str
    created_at: int
    limits: Limits = UNLIMITED


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """One key, without its secret. `id` begins the secret, so that people know which one it is."""

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
        """Whether it opens anything."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class Tenants:
    """All tenants and keys of one server.

    Args:
        static_keys: secrets of the command line, each an admin of the default tenant.

    Attributes:
        closed: a key is needed, since the first one was made.
    """

    def __init__(self, database: Database, static_keys: Sequence[str] = ()) -> None:
        self.database = database
        self._static = [_hash(key.encode()) for key in static_keys]
        self._changing = threading.Lock()
        self.closed = bool(self._static)
        self._used: dict[str, int] = {}  # key -> Unix time that is not written yet
        self.tenants: dict[str, Tenant] = {TENANT: Tenant(id=TENANT, created_at=0)}
        self.keys: dict[str, Key] = {}
        self._known: dict[str, tuple[bytes, Caller]] = {}  # by key
        self._allowances = {TENANT: Allowance()}
        self.everything = replace(EVERYTHING, allowance=self._allowances[TENANT])

    # --- its life -------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Read everything."""
        await asyncio.to_thread(self._read)

    def _read(self) -> None:
        with self.database.reading() as connection:
            for (record,) in connection.execute("SELECT record FROM tenants ORDER BY id"):
                tenant = msgspec.json.decode(record, type=Tenant)
                self.tenants[tenant.id] = tenant
                self._allowances.setdefault(tenant.id, Allowance()).set(tenant.limits)
            for digest, record in connection.execute("SELECT digest, record FROM keys"):
                self._know(digest, msgspec.json.decode(record, type=Key))

    async def run(self) -> None:
        """Write the times of last use, now and then and at the end."""
        try:
            while True:
                await asyncio.sleep(FLUSH_SECONDS)
                await asyncio.to_thread(self._flush)
        finally:
            await asyncio.to_thread(self._flush)

    def _flush(self) -> None:
        used, self._used = self._used, {}
        with self._changing:
            known = [(self.keys[id_], when) for id_, when in list(used.items()) if id_ in self.keys]
            with self.database.transaction(removing=True):
                for key, when in known:
                    self._write(msgspec.structs.replace(key, last_used_at=when))

    # --- who asks -------------------------------------------------------------------------------------

    @property
    def several(self) -> bool:
        """Whether there is a tenant beside the default one."""
        return len(self.tenants) > 1

    def find(self, secret: bytes) -> Caller | None:
        """Whose secret this is; None when nobody's, or no longer. Asks memory only."""
        digest = _hash(secret)
        # Every comparison is made, so that the time taken tells nothing of which key was near.
        static = [hmac.compare_digest(digest, known) for known in self._static]
        id_ = secret[:_ID_LENGTH].decode("latin-1")
        kept, caller = self._known.get(id_, (_NOTHING, None))
        if hmac.compare_digest(digest, kept) and self.keys[id_].valid(now := time.time()):
            self._used[id_] = int(now)
            return caller
        return self.everything if any(static) else None

    # --- tenants --------------------------------------------------------------------------------------

    def tenant(self, id_: str, own: str | None = None) -> Tenant:
        """With `own`, that one alone is there. Raises NotFound."""
        tenant = self.tenants.get(id_)
        if tenant is None or own not in (None, tenant.id):
            message = f"No such tenant: {shown(tenant_name(id_))}"
            raise NotFound(message, param="tenant", code="tenant_not_found")
        return tenant

    def create_tenant(self, id_: str, limits: Limits = UNLIMITED) -> Tenant:
        """Waits for the disk, as all that changes something does. Raises InvalidRequest, Conflict."""
        if not TENANT_ID.fullmatch(id_) or id_ == DEFAULT_NAME:
            message = f"`id`: 1 to 64 of a-z, 0-9 and -, neither first nor last a -, and not `{DEFAULT_NAME}`."
            raise InvalidRequest(message, param="id")
        with self._changing:
            if id_ in self.tenants:
                raise Conflict(f"There is a tenant `{id_}` already.", param="id", code="tenant_exists")
            self._allowances[id_] = Allowance()
            return self._keep(Tenant(id=id_, created_at=int(time.time()), limits=limits))

    def limit(self, id_: str, limits: Limits) -> Tenant:
        """Give a tenant these limits, in place of those that it has. Raises NotFound."""
        with self._changing:
            return self._keep(msgspec.structs.replace(self.tenant(id_), limits=limits))

    def _keep(self, tenant: Tenant) -> Tenant:
        with self.database.transaction() as connection:
            row = (tenant.id, msgspec.json.encode(tenant))
            connection.execute("INSERT OR REPLACE INTO tenants VALUES (?, ?)", row)
        self.tenants[tenant.id] = tenant
        self._allowances[tenant.id].set(tenant.limits)
        return tenant

    def delete_tenant(self, id_: str) -> None:
        """Its keys are no longer known. Raises NotFound, Conflict."""
        with self._changing:
            if self.tenant(id_).id == TENANT:
                raise Conflict("The default tenant stays.", param="tenant")
            keys = [key.id for key in self.keys.values() if key.tenant == id_]
            with self.database.transaction(removing=True) as connection:
                connection.execute("DELETE FROM tenants WHERE id = ?", (id_,))
                connection.executemany("DELETE FROM keys WHERE id = ?", [(key,) for key in keys])
            del self.tenants[id_], self._allowances[id_]
            for key in keys:
                self.keys.pop(key)
                self._known.pop(key)

    # --- keys -----------------------------------------------------------------------------------------

    def last_used(self, key: Key) -> int | None:
        """Unix time of a request with it."""
        return self._used.get(key.id, key.last_used_at)

    def key(self, tenant: str | None, id_: str) -> Key:
        """A tenant's key, or with None anybody's. Raises NotFound."""
        key = self.keys.get(id_)
        if key is None or tenant not in (None, key.tenant):
            raise NotFound(f"No such key: {shown(id_)}", param="id", code="key_not_found")
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
        """A new key and its secret, which nobody can be told again. Raises NotFound, InvalidRequest."""
        with self._changing:
            self.tenant(tenant)
            operator = tenant == TENANT and "admin" in roles and expires_at is None
            if not self.closed and not operator:
                message = "The first key is an admin's of the default tenant that does not expire: from then on all"
                raise InvalidRequest(f"{message} requests need a key.", param="roles", code="first_key")
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
            digest = _hash(secret.encode())
            with self.database.transaction() as connection:
                row = (id_, digest, msgspec.json.encode(key))
                connection.execute("INSERT INTO keys (id, digest, record) VALUES (?, ?, ?)", row)
            self._know(digest, key)
        return key, secret

    def revoke(self, key: Key) -> Key:
        """From now on it opens nothing. Raises Conflict for the last one that could make others."""
        with self._changing:
            key = self.key(None, key.id)
            if key.revoked_at is not None:
                return key
            if not self._static and not any(map(_lasting_operator, (k for k in self.keys.values() if k is not key))):
                message = "This is the last key of the server's operator; make another one first."
                raise Conflict(message, param="id", code="last_key")
            return self._write(msgspec.structs.replace(key, revoked_at=int(time.time())))

    def _write(self, key: Key) -> Key:
        with self.database.transaction(removing=True) as connection:
            connection.execute("UPDATE keys SET record = ? WHERE id = ?", (msgspec.json.encode(key), key.id))
        self.keys[key.id] = key
        return key

    def _know(self, digest: bytes, key: Key) -> None:
        bound = None if key.adapters is None else frozenset(key.adapters)
        roles = allowed(key.tenant, frozenset(key.roles))
        caller = Caller(key.tenant, key.id, roles, bound, self._allowances[key.tenant])
        self.keys[key.id] = key
        self._known[key.id] = (digest, caller)
        self.closed = True


def _lasting_operator(key: Key) -> bool:
    return key.tenant == TENANT and "admin" in key.roles and key.expires_at is None and key.revoked_at is None


def _hash(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
