"""The caller of a request: a tenant, and the key that speaks for it."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from adapters.storage.versions import DEFAULT_TENANT
from server.tenants.limits import Allowance

Role = Literal["serve", "upload", "tune", "admin"]

DEFAULT_NAME = DEFAULT_TENANT  # in requests and responses
TENANT = ""  # the default tenant's id in database rows; without keys, every caller is of this tenant
ROLES: tuple[Role, ...] = get_args(Role)
OPERATOR = "operator"  # additional role of the default tenant's admins: control of the whole server


@dataclass(frozen=True)
class Caller:
    """The caller of a request; `server.http.middleware` puts it into the request's scope.

    Attributes:
        key: the id of the key, which is not secret; empty without a key.
        roles: the key's roles, included ones among them; see `effective_roles`.
        adapters: names that the key is bound to; None: all.
        allowance: the rest of the tenant's limits.
    """

    tenant: str = TENANT
    key: str = ""
    roles: frozenset[str] = frozenset()
    adapters: frozenset[str] | None = None
    allowance: Allowance = field(default_factory=Allowance, compare=False)

    @property
    def visible_tenant(self) -> str | None:
        """The only tenant of which the caller sees keys, usage and changes; None: all."""
        return None if OPERATOR in self.roles else self.tenant

    def sees(self, name: str) -> bool:
        """Whether the key may use or make an adapter of this name."""
        return self.adapters is None or name in self.adapters


def effective_roles(tenant: str, roles: frozenset[str]) -> frozenset[str]:
    """Return a key's roles, together with the roles that they include."""
    if "admin" not in roles:
        return roles
    return frozenset(ROLES) | ({OPERATOR} if tenant == TENANT else set())


# Any caller of a server without keys, and the server's own work.
OPERATOR_CALLER = Caller(roles=effective_roles(TENANT, frozenset({"admin"})))


def tenant_name(tenant: str) -> str:
    """Return a tenant's name in requests and responses."""
    return tenant or DEFAULT_NAME


def tenant_of(name: str) -> str:
    """Return a tenant's id in database rows, from its name in requests."""
    return TENANT if name == DEFAULT_NAME else name
