"""Adapters in responses: receipts, tiers, use, merged weights."""

from typing import Any

from adapters.storage.store import AdapterStore
from adapters.storage.versions import EVERYBODY, Pointer, Version
from server.messages.protocol import MergeReport
from server.services import Services
from server.tenants.caller import tenant_name

TIERS = ("merged", "device", "host")  # of memory, nearest first


def receipt(store: AdapterStore, version: Version, tenant: str) -> dict[str, Any]:
    """Return a version's receipt, by which an owner can check an upload, and whether it is pinned."""
    return {
        "object": "adapter",
        "name": version.name_for(tenant),
        "digest": version.digest,
        "created_at": int(version.created),
        "pinned": store.is_pinned(version.tenant, version.name),
        **version.receipt,
    }


def list_entry(services: Services, version: Version, tenant: str) -> dict[str, Any]:
    """Return the receipt with the nearest tier that holds the adapter, and its use since the server started."""
    tier, usage = tier_of(services, version), services.metrics.usage.get(tenant, version.label)
    use = {"tier": tier, "requests": usage.requests, "tokens": usage.tokens, "last_used": usage.last_used}
    return receipt(services.store, version, tenant) | use


def readers(pointer: Pointer) -> list[str] | str:
    """Return the tenants that a name is shared with."""
    return "all" if EVERYBODY in pointer.readers else [tenant_name(reader) for reader in pointer.readers]


def tier_of(services: Services, version: Version) -> str:
    """Return the nearest tier that holds a version; `disk` includes versions only in the object store."""
    resident = services.metrics.resident
    return next((tier for tier in TIERS if (version.digest, tier) in resident), "disk")


def sort_key(services: Services, tenant: str, column: str, version: Version) -> Any:
    """Return the sort key of a version for a column of `list_entry`."""
    if column == "created_at":
        return version.created
    if column == "tier":
        return [*TIERS, "disk"].index(tier_of(services, version))
    if column in version.receipt:
        return version.receipt[column]
    return getattr(services.metrics.usage.get(tenant, version.label), column) or 0


def merge_report(report: MergeReport) -> dict[str, Any]:
    """Return a merge report as JSON: cost, drift from the adapter, gain in speed."""
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
