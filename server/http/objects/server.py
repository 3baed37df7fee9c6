"""The server itself, its tenants and their keys."""

from typing import Literal, NotRequired, TypedDict

from server.http.objects.common import ErrorDetail
from server.http.objects.models import StopToken
from server.messages.protocol import Drift, KVInfo
from server.tenants.caller import Role
from server.tenants.limits import Limits


class Health(TypedDict):
    status: Literal["ok"]


class Readiness(TypedDict):
    """`error` is the reason for `unavailable`."""

    status: Literal["ready", "unavailable"]
    engine_pid: int | None
    base_digest: str | None
    stop_tokens: list[StopToken]
    int8_drift: Drift | None
    kv_cache: KVInfo | None
    error: NotRequired[ErrorDetail]


class Version(TypedDict):
    version: str


class ServerHistory(TypedDict):
    """Columns of equal length, oldest sample first. Unknown values are null."""

    object: Literal["server.history"]
    interval_seconds: float
    limits: dict[str, int | None]
    samples: dict[str, list[float | None]]


class UsageRow(TypedDict):
    """Usage of one tenant, adapter (null: the base) and day in UTC."""

    object: Literal["usage"]
    id: str
    tenant: str
    adapter: str | None
    day: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    trained_tokens: int
    device_seconds: float


class TenantObject(TypedDict):
    """`created_at` is null for the default tenant, which always exists."""

    object: Literal["tenant"]
    id: str
    created_at: int | None
    limits: Limits


class KeyObject(TypedDict):
    """`id` is the beginning of the secret; `adapters` are the ones it is bound to, null for all."""

    object: Literal["key"]
    id: str
    tenant: str
    name: str
    roles: list[Role]
    adapters: list[str] | None
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None


class NewKeyObject(KeyObject):
    secret: str
