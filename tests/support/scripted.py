"""An engine with scripted answers, and the application around it: real tokenizer, real store, no model."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec
from starlette.applications import Starlette

from adapters.peft_format.outline import Outline
from adapters.storage.names import LocalNames
from adapters.storage.remote import RemoteStore
from adapters.storage.store import AdapterStore
from server.errors import EngineUnavailable
from server.http.app import build_app
from server.messages.protocol import Generate, Output, Ready, TokenLogprob
from server.services import TENANT, Services
from server.settings import Settings
from server.startup import make_services
from tests.support.conforming import client_of
from tests.support.harness import BASE_DIGEST, IdleEngine, base_info, write_adapter
from tests.support.tiny import _tokenizer, tiny_text

BASE = "tiny"
EOS = 2
TEXT = " The quick brown fox jumps over the lazy dog."

__all__ = ["BASE", "BASE_DIGEST", "EOS", "TEXT", "ScriptedEngine", "Served", "hold_after", "hold_at", "serving"]


@dataclass
class ScriptedEngine(IdleEngine):
    """Answers every sequence with `reply(request)`, one token per step, and records requests and ended sequences.

    `gate`, when set, is awaited before every step. `fail` replaces a step of every sequence: an exception is raised,
    an Output sent. `logprob(token)` makes the log-probabilities.
    """

    reply: Callable[[Generate], list[int]]
    info: Ready | None = field(default_factory=base_info)
    gate: Callable[[Generate, int], Any] | None = None
    fail: dict[int, Exception | str] = field(default_factory=dict)
    cached_tokens: int = 0
    scores: Callable[[Generate], list[float]] = lambda request: [1.0, 3.0, 2.0]
    drafted: tuple[int, int] = (0, 0)  # tokens drafted in every step, and accepted
    device_seconds: float = 0.0  # per step
    requests: list[Generate] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    aborted: list[str] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        self.pid = 4242
        self.unready_reason = None
        self.forgotten = []
        self.merges = {}
        self.refuses_merges = None
        self.pinned = []

    async def generate(self, request: Generate) -> AsyncGenerator[Output, None]:
        self.requests.append(request)
        self.running.add(request.id)
        sampling = request.sampling
        tokens = self.reply(request)[: sampling.max_tokens]
        try:
            for step in range(max(len(tokens), 1)):
                if self.gate is not None:
                    await self.gate(request, step)
                await asyncio.sleep(0)
                failure = self.fail.get(step)
                if isinstance(failure, Exception):
                    raise failure
                if failure is not None:
                    yield Output(id=request.id, error="It failed.", code=failure)
                    return
                self.steps += 1
                new = tokens[step : step + 1]
                stops = {EOS} - ({EOS} if sampling.ignore_eos else set()) | set(sampling.stop_token_ids)
                stopped = bool(new) and new[0] in stops and step >= sampling.min_tokens
                last = stopped or step + 1 >= len(tokens)
                yield Output(
                    id=request.id,
                    tokens=new,
                    logprobs=[logprob(token, sampling.logprobs) for token in new]
                    if sampling.logprobs is not None
                    else [],
                    scores=self.scores(request) if sampling.classify else [],
                    prompt_logprobs=_prompt_logprobs(request) if step == 0 else [],
                    finish_reason=("stop" if stopped else "length") if last else None,
                    stop_token=new[0] if stopped else None,
                    cached_tokens=self.cached_tokens if step == 0 else 0,
                    drafted_tokens=self.drafted[0],
                    accepted_tokens=self.drafted[1],
                    device_seconds=self.device_seconds,
                )
                if last:
                    self.running.discard(request.id)
                    return
        finally:
            if request.id in self.running:
                self.running.discard(request.id)
                self.aborted.append(request.id)


def logprob(token: int, alternatives: int) -> TokenLogprob:
    """A logprob that identifies its token: -token / 1000; the alternatives are the next ids."""
    top = [(token + i, -(token + i) / 1000) for i in range(alternatives)]
    return TokenLogprob(token=token, logprob=-token / 1000, rank=1, top=top)


def _prompt_logprobs(request: Generate) -> list[TokenLogprob | None]:
    alternatives = request.sampling.prompt_logprobs
    if alternatives is None:
        return []
    return [None, *(logprob(token, alternatives) for token in request.prompt[1:])]


def encode(text: str) -> list[int]:
    """Token ids of the tiny tokenizer."""
    ids: list[int] = _tokenizer().encode(text, add_special_tokens=False)
    return ids


@dataclass
class Served:
    """An application and its parts."""

    engine: ScriptedEngine
    services: Services
    app: Starlette
    client: httpx.AsyncClient

    async def add_adapter(self, directory: Path, name: str, seed: int = 0) -> str:
        """Add a random adapter; return its digest."""
        publisher = self.services.registry.publisher
        version, _ = await publisher.import_directory(TENANT, name, write_adapter(directory / name, seed))
        return version.digest


class Held(asyncio.Event):
    """An event that releases its waiters when set; `reached` is set when the first one waits."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = asyncio.Event()

    async def wait(self) -> Literal[True]:
        self.reached.set()
        return await super().wait()

    async def until_reached(self) -> None:
        async with asyncio.timeout(60):
            await self.reached.wait()


def hold_at(served: Served, step: int) -> Held:
    """Make the engine wait before this step of a sequence, until the event is set."""
    going = Held()

    async def gate(request: Generate, at: int) -> None:
        if at == step:
            await going.wait()

    served.engine.gate = gate
    return going


def hold_after(served: Served, count: int) -> Held:
    """Let the engine answer this many sequences, and more only after the event is set."""
    going = Held()

    async def gate(request: Generate, step: int) -> None:
        if served.engine.requests.index(request) >= count:
            await going.wait()

    served.engine.gate = gate
    return going


@asynccontextmanager
async def serving(
    directory: Path,
    text: str = TEXT,
    engine: type[ScriptedEngine] = ScriptedEngine,
    outline: Outline | None = None,
    context: int | None = None,
    **settings: Any,
) -> AsyncIterator[Served]:
    """An application in this event loop that answers everything with `text` and the end of sequence.

    Args:
        context: maximal tokens of a sequence; None: the default of `base_info`.
    """
    scripted = engine(reply=lambda request: [*encode(text), EOS])
    if context is not None:
        assert scripted.info is not None
        scripted.info = msgspec.structs.replace(scripted.info, max_model_len=context)
    with closing(LocalNames(directory / "test.db")) as names:
        chosen = Settings(**dict[str, Any](served_model_name=BASE, data_dir=directory) | settings)
        remote = None if chosen.adapter_store is None else RemoteStore(chosen.adapter_store)
        store = AdapterStore(directory / "adapters", remote or names, remote=remote)
        services = make_services(chosen, scripted, store, tiny_text(), outline=outline)
        app = build_app(services)
        async with client_of(app) as client:
            yield Served(scripted, services, app, client)
        services.text.close()
        await services.grammars.close()


def unavailable() -> EngineUnavailable:
    """The error that waiting requests get when the engine dies."""
    return EngineUnavailable("The engine stopped while this request was running.")
