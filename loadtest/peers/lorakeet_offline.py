"""Our engine without a server; the difference is the cost of HTTP, tokenising and the second process."""

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Any

from loadtest.peers import base
from loadtest.peers.lorakeet import adapter_name
from loadtest.peers.worker import WorkerSide


class LorakeetOffline(WorkerSide):
    """`python -m server.engine.offline` at the default settings."""

    name = "lorakeet-offline"

    def missing_reason(self) -> str | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {
            "version": importlib.metadata.version("lorakeet"),
            "base": "NF4, double quantisation",
            "adapters": "by digest, no server in between",
        }

    def command(self) -> list[str]:
        return [sys.executable, "-m", "server.engine.offline"]

    def settings(self, kit: base.Kit) -> dict[str, Any]:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakeet"
        adapters = {adapter_name(adapter): str(path) for adapter, path in kit.adapters.items()}
        return {"model": str(kit.model), "cache_dir": str(cache), "adapters": adapters}

    def adapter(self, adapter: base.AdapterId) -> str:
        return adapter_name(adapter)
