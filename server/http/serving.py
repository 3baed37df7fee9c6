"""The server around the application: sockets, startup, draining of requests in flight, shutdown."""

import asyncio
import contextlib
import errno
import gc
import json
import logging
import os
import shlex
import socket
import sys
from types import FrameType

import uvicorn

from adapters.scratch import remove_stale
from server import data_dir, logs
from server.client.engine import LocalEngine
from server.http.app import build_app
from server.http.connection import LimitedHttpProtocol
from server.model_source import ModelError, resolve
from server.services import TENANT, Services
from server.setting_table import warn_about_unknown
from server.settings import SettingError, Settings
from server.startup import open_services

_GRACEFUL_SHUTDOWN_SECONDS = 5  # for responses still being sent when everything else has stopped
_SWITCH_SECONDS = 5e-4  # longest time a background thread holds the interpreter lock while responses stream

log = logging.getLogger(__name__)


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C, then drain.

    Raises `ModelError` and `SettingError`, with one line for the operator, when the server cannot start as configured.
    """
    logs.configure(settings.log_level, as_json=settings.log_json)
    warn_about_unknown(os.environ)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # leaves the cores to the engine
    sys.setswitchinterval(_SWITCH_SECONDS)
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(listener) for listener in bind(settings.host, settings.port)]
        _serve_on(sockets, settings)


def _serve_on(sockets: list[socket.socket], settings: Settings) -> None:
    directory = resolve(settings.model, settings.cache_dir, log.info)
    with data_dir.locked(settings.data_dir):
        remove_stale()  # files left by killed servers
        services, engine = open_services(settings, directory)
        gc.freeze()  # keeps present objects out of collections, which pause all threads
        server = _Server(services, engine)
        server.run(sockets)
        services.text.close()
        services.store.close()
    if server.failure is not None:
        raise server.failure


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind sockets on every address of `host`, before anything is loaded. Raises `SettingError`."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise SettingError(f"--host: {host}: {error.strerror}") from None
    except UnicodeError:
        raise SettingError(f"--host: {host!r} is not a valid host name") from None
    sockets: list[socket.socket] = []
    for family, kind, protocol, _, address in found[:1] if port == 0 else found:  # port 0 differs per address
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            listener.bind(address)
        except OSError as error:
            for bound in (*sockets, listener):
                bound.close()
            if error.errno == errno.EADDRINUSE:
                raise SettingError(f"--port: {port} on {host} is in use by another program") from None
            raise SettingError(f"--host: cannot listen on {host} port {port}: {error.strerror}") from None
        sockets.append(listener)
    return sockets


class _Server(uvicorn.Server):
    """uvicorn with this server's startup and shutdown."""

    def __init__(self, services: Services, engine: LocalEngine) -> None:
        settings = services.settings
        super().__init__(
            uvicorn.Config(
                build_app(services),
                host=settings.host,
                port=settings.port,
                http=LimitedHttpProtocol.with_limits(
                    head_bytes=settings.max_head_bytes, head_seconds=settings.head_seconds
                ),
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=settings.keep_alive_seconds,
                timeout_graceful_shutdown=_GRACEFUL_SHUTDOWN_SECONDS,
            )
        )
        self.failure: ModelError | SettingError | None = None
        self._services = services
        self._engine = engine
        self._stop_requested = False
        self._loop: asyncio.AbstractEventLoop | None = None  # once it is up
        self._start_task: asyncio.Task[None] | None = None
        self._drain_task: asyncio.Task[None] | None = None

    # --- startup ----------------------------------------------------------------------------------

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen at once, so that probes get responses; become ready when the engine is."""
        await super().startup(sockets)
        log.info("listening on %s port %d; the engine is loading", *self.servers[0].sockets[0].getsockname()[:2])
        self._start_task = asyncio.create_task(self._start())
        self._loop = asyncio.get_running_loop()
        if self._stop_requested:
            self._begin_drain()

    async def _start(self) -> None:
        imports = asyncio.ensure_future(self._services.registry.discovery.import_configured(TENANT))
        engine_failed = asyncio.ensure_future(self._engine.failed_for_good.wait())
        try:
            await asyncio.wait({imports, engine_failed}, return_when=asyncio.FIRST_COMPLETED)
            if not imports.done():
                raise ModelError(f"the engine cannot start: {self._engine.unready_reason}")
            imports.result()
            with contextlib.suppress(OSError):  # nobody reads standard output
                print(self._greeting(), flush=True)
        except (ModelError, SettingError) as failure:
            self.failure = failure
        except Exception as fault:
            log.exception("startup failed")
            self.failure = ModelError(f"the server cannot start: {fault}")
        finally:
            self.should_exit = self.should_exit or self.failure is not None
            imports.cancel()
            engine_failed.cancel()

    def _greeting(self) -> str:
        settings = self._services.settings
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        key = ' -H "Authorization: Bearer $LORAKEET_API_KEY"' if self._services.tenants.requires_key else ""
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

    # --- shutdown -----------------------------------------------------------------------------------

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shut down. After a second signal uvicorn skips the application's lifespan, which would end in a traceback."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal, exit on the second. uvicorn's own handler would exit by the signal, not with 0."""
        if self._stop_requested:
            self.should_exit = self.force_exit = True
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_drain)
        self._stop_requested = True

    def _begin_drain(self) -> None:
        self._drain_task = asyncio.create_task(self._drain())

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
            await services.engine.stop(grace=0.0)  # requests still waiting for it get an error
        finally:
            self.should_exit = True
