"""How adapters are shown in answers: receipts, merged weights, and the refusal of an unknown name."""

from typing import Any

from adapters.storage.store import AdapterStore
from adapters.storage.versions import EVERYBODY, Pointer, Version
from server.messages.protocol import MergeReport
from server.services import Services
from server.tenants.caller import tenant_name

TIERS = ("merged", "device", "host")  # of memory, nearest first


def receipt(store: AdapterStore, version: Version, tenant: str) -> dict[str, Any]:
    """What an owner wants to check after an upload: that it is the adapter, and all of it. And whether it is pinned."""
    return {
        "object": "adapter",
        "name": version.name_for(tenant),
        "digest": version.digest,
        "created_at": int(version.created),
        "pinned": store.is_pinned(version.tenant, version.name),
        **version.receipt,
    }


def listed(services: Services, version: Version, tenant: str) -> dict[str, Any]:
    """The receipt, the nearest tier of memory that holds the adapter, and its use since the server started."""
    tier, usage = tier_of(services, version), services.metrics.usage.of(tenant, version.label)
    use = {"tier": tier, "requests": usage.requests, "tokens": usage.tokens, "last_used": usage.last_used}
    return receipt(services.store, version, tenant) | use


def readers(pointer: Pointer) -> list[str] | str:
    """Whom the owner shares a name with."""
    return "all" if EVERYBODY in pointer.readers else [tenant_name(reader) for reader in pointer.readers]


def tier_of(services: Services, version: Version) -> str:
    """`disk` is where all others are, in the object store or on this machine."""
    resident = services.metrics.resident
    return next((tier for tier in TIERS if (version.digest, tier) in resident), "disk")


def sort_key(services: Services, tenant: str, column: str, version: Version) -> Any:
    """A version's place among others by a column of `listed`."""
    if column == "created_at":
        return version.created
    if column == "tier":
        return [*TIERS, "disk"].index(tier_of(services, version))
    if column in version.receipt:
        return version.receipt[column]
    return getattr(services.metrics.usage.of(tenant, version.label), column) or 0


def resident(report: MergeReport) -> dict[str, Any]:
    """What merged weights cost, how far they are from the adapter itself, and what they gain."""
    return {
        "dtype": report.dtype,
        "bytes": report.bytes,
        "build_seconds": report.seconds,
        "drift": {
            "positions": report.positions,
            "mean_kl": report.mean_kl,
            "greedy_agreement": report.agreement,
        },
        "decode_tokens_per_second": [
            {
                "requests": speed.requests,
                "adapter": speed.adapter,
                "merged": speed.merged,
                "gain": speed.merged / speed.adapter,
            }
            for speed in report.speeds
        ],
    }
