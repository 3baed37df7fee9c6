"""Our own server as users run it: the `lorakeet` command, default settings, adapters uploaded over HTTP."""

import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from loadtest import metrics
from loadtest.peers import base
from loadtest.synthetic import random_prompts


class Lorakeet(base.ServerSide):
    """`lorakeet serve` with an empty data folder; the kit's adapters are uploaded before the first request."""

    name = "lorakeet"
    ready_path = "/ready"
    ready_seconds = 600.0  # a first start quantises the base
    flags: tuple[str, ...] = ()

    def __init__(self, *, upload: bool = True, flags: Sequence[str] = ()) -> None:
        super().__init__()
        self._upload = upload
        self.flags = *self.flags, *flags

    def missing_reason(self) -> str | None:
        return None if executable().exists() else f"{executable()} does not exist: make install"

    def describe(self) -> dict[str, Any]:
        return {
            "version": importlib.metadata.version("lorakeet"),
            "base": "NF4, double quantisation",
            "adapters": "uploaded over HTTP, per request by model name" if self._upload else "none loaded",
            "settings": " ".join(self.flags) or "defaults",
        }

    def command(self, kit: base.Kit, port: int) -> tuple[list[str], dict[str, str]]:
        data = kit.folder / f"{self.name}-data"
        flags = ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port), "--data-dir", str(data)]
        return [str(executable()), "serve", "--model", str(kit.model), *flags, *self.flags], {}

    async def prepare(self, kit: base.Kit) -> None:
        if not self._upload:
            return
        async with httpx.AsyncClient(base_url=self.url, timeout=120) as http:
            for adapter, folder in kit.adapters.items():
                await upload_adapter(http, adapter_name(adapter), folder)

    def request(self, work: base.Work) -> tuple[str, dict[str, Any]]:
        name = "base" if work.adapter is None else adapter_name(work.adapter)
        return name, {"ignore_eos": True, "skip_special_tokens": False}

    async def extras(self) -> dict[str, Any]:
        """TTFT of a 512-token prefix for the first and for the second time, followed by other tokens."""
        return {"prefix_cache": await self._prefix_cache(prefix_tokens=512, trials=5)}

    async def _prefix_cache(self, prefix_tokens: int, trials: int) -> dict[str, Any]:
        ttfts: dict[str, list[float]] = {"first": [], "second": []}
        for trial in range(trials):
            first, second = random_prompts(2, prefix_tokens + 16, seed=5000 + trial)
            second[:prefix_tokens] = first[:prefix_tokens]
            for key, prompt in (("first", first), ("second", second)):
                [timeline] = await self.burst([base.Work(prompt, 2, None)])
                if timeline.error is not None:
                    return {"error": timeline.error}
                ttfts[key].append(metrics.ttft(timeline))
        return {"prefix_tokens": prefix_tokens, **ttfts}


class LorakeetBare(Lorakeet):
    """The same server without loaded adapters, for the cost of base-only requests."""

    name = "lorakeet-bare"
    per_request_adapters = False

    def __init__(self) -> None:
        super().__init__(upload=False)

    async def extras(self) -> dict[str, Any]:
        return {}


class LorakeetKv16(Lorakeet):
    """The same server with a KV cache of fp16, llama.cpp's default."""

    name = "lorakeet-kv16"
    flags = ("--kv-cache-dtype", "float16")

    async def extras(self) -> dict[str, Any]:
        return {}


class LorakeetInt8(Lorakeet):
    """The same server with int8 activations, and the resulting error of its logits."""

    name = "lorakeet-int8"
    flags = ("--activations", "int8")

    async def extras(self) -> dict[str, Any]:
        async with httpx.AsyncClient(base_url=self.url) as http:
            return {"drift": (await http.get(self.ready_path)).json()["int8_drift"]}


def executable() -> Path:
    """Return the `lorakeet` command of this environment."""
    return Path(sys.executable).with_name("lorakeet")


def adapter_name(adapter: base.AdapterId) -> str:
    """Return the name under which an adapter is uploaded."""
    return f"{adapter[0]}-{adapter[1]}"


async def upload_adapter(http: httpx.AsyncClient, name: str, folder: Path) -> dict[str, Any]:
    """Upload an adapter; return the receipt. Raises `SideError` with the server's message."""
    config = (folder / "adapter_config.json").read_bytes()
    with (folder / "adapter_model.safetensors").open("rb") as weights:
        answer = await http.post(
            "/v1/adapters",
            data={"name": name},
            files={
                "config": ("adapter_config.json", config, "application/json"),
                "weights": ("adapter_model.safetensors", weights, "application/octet-stream"),
            },
        )
    if answer.status_code not in (200, 201):
        raise base.SideError(f"upload of {name}: HTTP {answer.status_code}: {answer.text[:500]}")
    receipt: dict[str, Any] = answer.json()
    return receipt
