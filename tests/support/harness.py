"""A small base without an engine behind it, and adapters that fit it."""

import json
import re
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import save as save_safetensors
from starlette.applications import Starlette
from starlette.routing import Route

from adapters.offline.recipe import MergedDtype
from adapters.peft_format.sizes import LinearSize
from adapters.storage.names import LocalNames
from adapters.storage.store import AdapterStore
from server.client.engine import MergeRefused
from server.errors import EngineUnavailable
from server.http.app import build_app
from server.messages.protocol import (
    AdapterRef,
    Generate,
    Inspection,
    MergeReport,
    MergeSpeed,
    Output,
    Ready,
)
from server.messages.training import JobReply, MemoryPlan, PlanMemory, StartJob, StopJob
from server.registry.capacity import PinLimit
from server.services import TENANT
from server.settings import Settings
from server.startup import make_services
from server.text.processor import TextProcessor
from tests.support.conforming import client_of
from tests.support.tiny import tiny_text

HIDDEN = 16
LAYERS = 2
BASE_DIGEST = "sha256:" + "b" * 64


def base_info(pool_rows: int = 64) -> Ready:
    """A base with q_proj and v_proj in two layers."""
    linears = {
        f"model.layers.{layer}.self_attn.{kind}": LinearSize(kind, HIDDEN, HIDDEN)
        for layer in range(LAYERS)
        for kind in ("q_proj", "v_proj")
    }
    return Ready(
        pid=4242,
        base_digest=BASE_DIGEST,
        architecture="LlamaForCausalLM",
        vocab_size=512,
        max_model_len=256,
        eos_token_ids=[2],
        linears=linears,
        block_size=16,
        num_blocks=8,
        pool_rows={"q_proj": pool_rows, "v_proj": pool_rows},
        device="cpu",
        dtype="float32",
    )


async def _refusing(message: str) -> AsyncGenerator[Any, None]:
    """A stream that fails before its first item."""
    nothing: list[Any] = []
    for item in nothing:
        yield item
    raise EngineUnavailable(message)


class IdleEngine:
    """An EngineClient that serves nothing and records the digests to forget."""

    def __init__(self, info: Ready | None = None) -> None:
        self.info = info
        self.pid: int | None = info.pid if info else None
        self.unready_reason: str | None = None if info else "the engine is loading the model"
        self.forgotten: list[str] = []
        self.merges: dict[str, MergeReport] = {}
        self.refuses_merges: MergeRefused | None = None
        self.pinned: list[str] = []

    async def merge(self, adapter: AdapterRef, dtype: MergedDtype, prompts: list[list[int]]) -> MergeReport:
        if self.refuses_merges is not None:
            raise self.refuses_merges
        speeds = [MergeSpeed(1, 50.0, 60.0)]
        report = MergeReport(
            id="m",
            digest=adapter.digest,
            dtype=dtype,
            bytes=1024,
            positions=sum(map(len, prompts)),
            mean_kl=0.01,
            agreement=0.99,
            speeds=speeds,
            seconds=1.5,
        )
        return self.merges.setdefault(adapter.digest, report)

    async def unmerge(self, digest: str) -> bool:
        return self.merges.pop(digest, None) is not None

    def generate(self, request: Generate) -> AsyncGenerator[Output, None]:
        return _refusing("this engine serves nothing")

    async def warm(self, adapter: AdapterRef) -> float:
        return 0.0

    def pin(self, adapters: Sequence[AdapterRef]) -> None:
        self.pinned = [adapter.digest for adapter in adapters]

    async def forget(self, digest: str) -> None:
        self.forgotten.append(digest)

    async def inspect(self) -> Inspection:
        raise EngineUnavailable("this engine serves nothing")

    def train(self, job: StartJob) -> AsyncGenerator[JobReply, None]:
        return _refusing("this engine trains nothing")

    async def plan_memory(self, asked: PlanMemory) -> MemoryPlan:
        raise EngineUnavailable("this engine trains nothing")

    async def stop_job(self, message: StopJob) -> None:
        raise EngineUnavailable("this engine trains nothing")

    async def start(self) -> None:
        pass

    async def stop(self, grace: float) -> None:
        pass


def adapter_files(seed: int = 0, rank: int = 4, **config: Any) -> tuple[bytes, bytes]:
    """adapter_config.json and adapter_model.safetensors of a random adapter for `base_info`."""
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for layer in range(LAYERS):
        for kind in ("q_proj", "v_proj"):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{kind}"
            tensors[f"{prefix}.lora_A.weight"] = random.standard_normal((rank, HIDDEN)).astype(np.float32)
            tensors[f"{prefix}.lora_B.weight"] = random.standard_normal((HIDDEN, rank)).astype(np.float32)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"]}
    return json.dumps(fields | config).encode(), save_safetensors(tensors)


def write_adapter(directory: Path, seed: int = 0, rank: int = 4, **config: Any) -> Path:
    """A PEFT directory."""
    directory.mkdir(parents=True, exist_ok=True)
    configuration, weights = adapter_files(seed, rank, **config)
    (directory / "adapter_config.json").write_bytes(configuration)
    (directory / "adapter_model.safetensors").write_bytes(weights)
    return directory


class Site:
    """The adapter side of a server over a directory: real store and registry, an idle engine, no model."""

    def __init__(self, root: Path, text: TextProcessor | None = None, **settings: Any) -> None:
        self.engine = self.open_engine()
        self.settings = Settings(data_dir=root, **settings)
        self._names = LocalNames(root / "store.db", self.settings.database_seconds)
        self.store = self.open_store(root)
        text = tiny_text() if text is None else text
        self.services = make_services(self.settings, self.engine, self.store, text)
        self.registry = self.services.registry
        self.publisher = self.registry.publisher
        self.drain = self.services.drain
        self.metrics = self.services.metrics

    def open_engine(self) -> IdleEngine:
        """The engine for serving and training."""
        return IdleEngine(base_info())

    def open_store(self, root: Path) -> AdapterStore:
        """The store of its adapters."""
        return AdapterStore(root / "store", self._names, check_pins=PinLimit(self.settings, self.engine).check)

    def app(self) -> Starlette:
        """The whole application."""
        return build_app(self.services)

    def client(self, **options: Any) -> httpx.AsyncClient:
        """A client of the whole application."""
        return client_of(self.app(), **options)

    def names(self) -> list[str]:
        return [version.name for version in self.store.list(TENANT)]

    def close(self) -> None:
        self._names.close()


def paths(app: Starlette) -> list[str]:
    """Every path that the application routes, with a value for each parameter."""
    routes = [route for route in app.routes if isinstance(route, Route)]
    assert len(routes) == len(app.routes)  # nothing is mounted, which the tests over all routes would miss
    return sorted({re.sub(r"{.*?}", "nobody", route.path) for route in routes})
