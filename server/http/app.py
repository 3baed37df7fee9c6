"""The HTTP application, and the server around it.

`build_app` is pure: collaborators come in, nothing is opened. `serve` makes the collaborators from the settings, runs
until SIGTERM or Ctrl-C, and lets requests in flight finish.
"""

import asyncio
import contextlib
import gc
import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from adapters.peft_format.outline import Outline
from adapters.scratch import sweep
from adapters.storage.store import AdapterStore
from adapters.storage.versions import RemoteUnavailable
from server import data_dir, logs
from server.children.helper import WORK, Helpers
from server.client.engine import LocalEngine
from server.errors import EXCEPTION_HANDLERS
from server.http.inside import answered
from server.http.limits import LimitedHttpProtocol
from server.http.listener import bind
from server.http.middleware import middleware
from server.http.routes import (
    adapters,
    audit,
    batches,
    chat,
    checks,
    classify,
    completions,
    embeddings,
    evaluations,
    files,
    fine_tuning,
    health,
    merging,
    messages,
    models,
    pins,
    reference,
    responses,
    server_history,
    sharing,
    tenants,
    tokenize,
    ui,
    usage,
    versions,
    vllm,
)
from server.messages.protocol import EngineConfig
from server.model_source import ModelError, resolve
from server.openai.sampling_defaults import sampling_defaults
from server.registry.pins import PinLimit
from server.services import TENANT, Services, make_services, new_metrics
from server.settings import SettingError, Settings, tell_of_unknown
from server.tenants.sending import keep_sending
from server.text.processor import TextProcessor, TokenizerError
from server.text.sandbox import TemplateRenderer

_CHECKERS = 2  # processes that check uploads
_LAST_WORDS_SECONDS = 5  # for answers that are on their way out when everything else has stopped
_LAST_SENDING_SECONDS = 10  # for an object store to take what was used and changed last
_KEEP_ALIVE_SECONDS = 75
_THREADS = 64
_SWITCH_SECONDS = 5e-4  # longest that a background thread keeps the interpreter from streaming responses

log = logging.getLogger(__name__)


def build_app(services: Services) -> Starlette:
    """The application. Its lifespan starts the engine and, at the end, stops it."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        # Those who wait for a database that somebody holds must not take the threads of everybody else.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "worker"))
        await services.tenants.start()
        await services.engine.start()
        await services.tuning.start()
        await services.batches.start(partial(answered, app))
        registry, tenants = services.registry, services.tenants
        working = registry.collect_orphans(), registry.following.run(), tenants.run(), tenants.follow()
        others = services.history.run(), services.responses.run()
        background = [asyncio.create_task(work) for work in (*working, *others)]
        shared = services.settings.adapter_store is not None
        sending = asyncio.create_task(keep_sending(services.ledger.send, services.audit.send)) if shared else None
        try:
            yield
        finally:
            for task in background:
                task.cancel()
            await services.responses.stop()
            await services.batches.stop()
            await services.tuning.stop()
            await services.engine.stop(grace=0.0)
            await services.registry.publisher.close()
            await services.ledger.stop()
            if sending is not None:
                sending.cancel()
                await asyncio.wait({sending}, timeout=_LAST_SENDING_SECONDS)
            await services.grammars.close()
            if services.text.renderer is not None:
                await services.text.renderer.close()

    # An adapter's name may have slashes: routes with a suffix after the name come before the bare name.
    resources = [
        completions,
        chat,
        responses,
        messages,
        tokenize,
        versions,
        checks,
        pins,
        sharing,
        merging,
        adapters,
        models,
        files,
        batches,
        classify,
        embeddings,
        fine_tuning,
        evaluations,
        health,
        server_history,
        tenants,
        usage,
        audit,
        reference,
    ]
    resources += [vllm] if services.settings.lora_dir is not None else []
    resources += [ui] if services.settings.ui else []
    app = Starlette(
        routes=[route for resource in resources for route in resource.routes],
        middleware=middleware(services.drain, services.settings, services.tenants),
        exception_handlers=EXCEPTION_HANDLERS,
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.services = services
    return app


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain.

    Raises `ModelError` and `SettingError`, in one line for the operator, when the server cannot start as it is told.
    """
    logs.configure(settings.log_level, as_json=settings.log_json)
    tell_of_unknown(os.environ)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are the engine's
    sys.setswitchinterval(_SWITCH_SECONDS)
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(listener) for listener in bind(settings.host, settings.port)]
        _serve_on(sockets, settings)


def _serve_on(sockets: list[socket.socket], settings: Settings) -> None:
    directory = resolve(settings.model, settings.cache_dir, log.info)
    with data_dir.taken(settings.data_dir):
        sweep()  # what servers left that were killed
        services, engine = _open_services(settings, directory)
        gc.freeze()  # what is there now stays: collections need not look at it, which holds everybody up
        server = _Server(services, engine)
        server.run(sockets)
        services.text.close()
        services.store.close()
    if server.failure is not None:
        raise server.failure


def _open_services(settings: Settings, model: Path) -> tuple[Services, LocalEngine]:
    try:
        text = TextProcessor.load(model, _template_renderer(settings), settings.tool_parser, settings.reasoning_parser)
    except TokenizerError as error:
        raise ModelError(str(error)) from None
    metrics = new_metrics(settings)
    engine = LocalEngine(
        _engine_config(settings, model),
        metrics.engine_stats,
        start_seconds=settings.engine_start_seconds,
        stall_seconds=settings.engine_stall_seconds,
    )
    store, outline = open_store(settings, PinLimit(settings, engine)), Outline.read(model)
    checker = Helpers(_CHECKERS, WORK, priority=settings.background_priority, memory=settings.adapter_check_bytes)
    defaults = sampling_defaults(settings.generation_config, settings.model, model)
    with data_dir.readable():
        services = make_services(
            settings,
            engine,
            store,
            text,
            metrics=metrics,
            outline=outline,
            checker=checker,
            sampling_defaults=defaults,
        )
    engine.mend = services.registry.mend
    return services, engine


def open_store(settings: Settings, pin_limit: PinLimit) -> AdapterStore:
    """Names and files of adapters, where the settings say. Raises SettingError."""
    local = data_dir.open_names(settings.data_dir, settings.database_seconds)
    if settings.adapter_store is None:
        return AdapterStore(
            settings.data_dir / "adapters", local, retain=settings.keep_versions, check_pins=pin_limit.check
        )
    from adapters.storage.remote import RemoteStore  # its library is needed only with an object store

    if left := sum(1 for _ in local.load(Path)):
        log.warning("%d adapters under %s are not served: push them again, to --adapter-store", left, settings.data_dir)
    try:
        remote = RemoteStore(settings.adapter_store)
        return AdapterStore(
            settings.data_dir / "adapter-cache",
            remote,
            remote=remote,
            disk_bytes=settings.adapter_disk_bytes,
            retain=settings.keep_versions,
            check_pins=pin_limit.check,
        )
    except (ValueError, RemoteUnavailable) as fault:
        raise SettingError(f"--adapter-store: {fault}") from None


def _template_renderer(settings: Settings) -> TemplateRenderer | None:
    if not settings.allow_adapter_chat_templates:
        return None
    return TemplateRenderer(
        settings.adapter_template_seconds, settings.adapter_template_cpu_seconds, settings.adapter_template_bytes
    )


def _engine_config(settings: Settings, model: Path) -> EngineConfig:
    return EngineConfig(
        address="",
        model=str(model),
        cache_dir=str(settings.cache_dir),
        quantization=settings.quantization,
        dtype=settings.dtype,
        device=settings.device,
        activations=settings.activations,
        sketch_head=settings.sketch_head,
        max_model_len=settings.max_model_len,
        kv_cache_bytes=settings.kv_cache_bytes,
        kv_cache_dtype=settings.kv_cache_dtype,
        state_cache_bytes=settings.state_cache_bytes,
        adapter_bytes=settings.adapter_bytes,
        adapter_host_bytes=settings.adapter_host_bytes,
        merged_bytes=settings.merged_bytes,
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_requests=settings.max_batch_requests,
        prefix_caching=settings.prefix_caching,
        deterministic=settings.deterministic,
        threads=settings.threads,
        finetune_max_stall_ms=settings.finetune_max_stall_ms,
        finetune_share=settings.finetune_share,
        merge_share=settings.merge_share,
        grammar_bytes=settings.grammar_bytes,
        batch_wait_seconds=settings.batch_wait_seconds,
        background_priority=settings.background_priority,
    )


class _Server(uvicorn.Server):
    """uvicorn, told how this server comes up and goes down."""

    def __init__(self, services: Services, engine: LocalEngine) -> None:
        settings = services.settings
        super().__init__(
            uvicorn.Config(
                build_app(services),
                host=settings.host,
                port=settings.port,
                http=LimitedHttpProtocol,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_LAST_WORDS_SECONDS,
            )
        )
        self.failure: ModelError | SettingError | None = None
        self._services = services
        self._engine = engine
        self._told_to_stop = False
        self._loop: asyncio.AbstractEventLoop | None = None  # once it is up
        self._coming_up: asyncio.Task[None] | None = None
        self._going_down: asyncio.Task[None] | None = None

    # --- up ---------------------------------------------------------------------------------------

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen at once, so that probes can ask; become ready when the engine is."""
        await super().startup(sockets)
        log.info("listening on %s port %d; the engine is loading", *self.servers[0].sockets[0].getsockname()[:2])
        self._coming_up = asyncio.create_task(self._come_up())
        self._loop = asyncio.get_running_loop()
        if self._told_to_stop:
            self._begin_drain()

    async def _come_up(self) -> None:
        imported = asyncio.ensure_future(self._services.registry.discovery.import_configured(TENANT))
        given_up = asyncio.ensure_future(self._engine.failed_for_good.wait())
        try:
            await asyncio.wait({imported, given_up}, return_when=asyncio.FIRST_COMPLETED)
            if not imported.done():
                raise ModelError(f"the engine cannot start: {self._engine.unready_reason}")
            imported.result()
            with contextlib.suppress(OSError):  # nobody reads it
                print(self._greeting(), flush=True)
        except (ModelError, SettingError) as failure:
            self.failure = failure
        except Exception as fault:
            log.exception("coming up failed")
            self.failure = ModelError(f"the server cannot start: {fault}")
        finally:
            self.should_exit = self.should_exit or self.failure is not None
            imported.cancel()
            given_up.cancel()

    def _greeting(self) -> str:
        settings = self._services.settings
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        key = ' -H "Authorization: Bearer $LORAKEET_API_KEY"' if self._services.tenants.closed else ""
        json_type = f"{key} -H 'Content-Type: application/json'"
        base = settings.base_name
        brief = {"max_tokens": 64, "stream": True}
        question = {"model": base, "messages": [{"role": "user", "content": "What is a lorikeet?"}], **brief}
        prompt = {"model": "NAME", "prompt": "Once upon a time", **brief}
        return "\n".join(
            [
                f"Serving {base} on {url}. Try:",
                "",
                f"  curl -N {url}/v1/chat/completions{json_type} -d {shlex.quote(json.dumps(question))}",
                f"  curl {url}/v1/adapters{key} -F name=NAME"
                " -F config=@DIR/adapter_config.json -F weights=@DIR/adapter_model.safetensors",
                f"  curl -N {url}/v1/completions{json_type} -d {shlex.quote(json.dumps(prompt))}",
                "",
            ]
        )

    # --- down ---------------------------------------------------------------------------------------

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Told twice, uvicorn would not even say goodbye to the application, which then ends in a traceback."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal, leave on the second. Not uvicorn's way: it would end by the signal, not with 0."""
        if self._told_to_stop:
            self.should_exit = self.force_exit = True
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_drain)
        self._told_to_stop = True

    def _begin_drain(self) -> None:
        self._going_down = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        services, seconds = self._services, self._services.settings.drain_seconds
        log.info(
            "shutting down: %d requests in flight get %g s to finish (--drain-seconds); Ctrl-C again ends them at once",
            services.drain.open_requests,
            seconds,
        )
        services.drain.begin()
        try:
            async with asyncio.timeout(seconds):
                await services.drain.idle()
        except TimeoutError:
            log.warning(
                "%d requests did not finish within --drain-seconds and were ended", services.drain.open_requests
            )
        try:
            await services.engine.stop(grace=0.0)  # requests that still wait for it get an error
        finally:
            self.should_exit = True
