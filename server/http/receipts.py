"""How adapters are shown in answers: receipts, merged weights, and the refusal of an unknown name."""

from typing import Any

from adapters.storage.store import AdapterStore
from adapters.storage.versions import Version
from server.errors import NotFound, shown
from server.messages.protocol import MergeReport


def receipt(store: AdapterStore, version: Version) -> dict[str, Any]:
    """What an owner wants to check after an upload: that it is the adapter, and all of it. And whether it is pinned."""
    return {
        "object": "adapter",
        "name": version.name,
        "digest": version.digest,
        "created_at": int(version.created),
        "pinned": store.pinned(version.tenant, version.name),
        **version.receipt,
    }


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


def unknown_adapter(name: str) -> NotFound:
    """404 for a name that nobody has."""
    return NotFound(f"The adapter `{shown(name)}` does not exist.", param="name", code="adapter_not_found")
