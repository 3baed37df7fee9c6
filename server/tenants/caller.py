"""The one who asks: a tenant, by a key that may do so much."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from adapters.storage.versions import DEFAULT_TENANT
from server.tenants.limits import Allowance

Role = Literal["serve", "upload", "tune", "admin"]

DEFAULT_NAME = DEFAULT_TENANT  # as people write it
TENANT = ""  # the default tenant, as rows have it: everybody, where there are no keys
ROLES: tuple[Role, ...] = get_args(Role)
OPERATOR = "operator"  # what an admin of the default tenant is beside: the whole server is theirs


@dataclass(frozen=True)
class Caller:
    """Put into the scope of every request (`server.http.middleware`).

    Attributes:
        key: the id of the key, which is no secret; empty without one.
        roles: what the key may do, with all that follows from it; see `allowed`.
        adapters: names that the key is bound to; None: all.
        allowance: what is left of the tenant's limits.
    """

    tenant: str = TENANT
    key: str = ""
    roles: frozenset[str] = frozenset()
    adapters: frozenset[str] | None = None
    allowance: Allowance = field(default_factory=Allowance, compare=False)

    @property
    def only_tenant(self) -> str | None:
        """The only tenant whose keys, usage and changes the caller sees; None: all."""
        return None if OPERATOR in self.roles else self.tenant

    def sees(self, name: str) -> bool:
        """Whether the key may use or make an adapter of this name."""
        return self.adapters is None or name in self.adapters


def allowed(tenant: str, roles: frozenset[str]) -> frozenset[str]:
    """A key's roles with those that they include."""
    if "admin" not in roles:
        return roles
    return frozenset(ROLES) | ({OPERATOR} if tenant == TENANT else set())


EVERYTHING = Caller(roles=allowed(TENANT, frozenset({"admin"})))  # a server without keys, and its own work


def tenant_name(tenant: str) -> str:
    """A tenant as people write it."""
    return tenant or DEFAULT_NAME


def tenant_of(name: str) -> str:
    """The tenant that people write so, as rows have it."""
    return TENANT if name == DEFAULT_NAME else name
