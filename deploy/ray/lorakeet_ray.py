"""Lorakeet on Ray Serve: `serve run lorakeet_ray:app`, or `serve run serve.yaml` with options.

`Ingress` reads the adapter's name from a request. `Server` replicas serve it; Ray routes a request to a replica that
holds the adapter. Without an object store there is a third deployment, `Writer`: one more server, which alone stores
names, files, jobs and the like. Each is an ordinary `lorakeet serve` with an unchanged API, configured by the
`LORAKEET_*` variables.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

import aiohttp
import lorakeet_child as child
import lorakeet_relay as relay
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request as ClientRequest
from starlette.responses import Response, StreamingResponse
from yarl import URL

ADAPTERS = int(os.environ.get("LORAKEET_RAY_ADAPTERS", "64"))  # that one replica holds, as assumed by Ray
BATCH_SECONDS = float(os.environ.get("LORAKEET_RAY_BATCH_SECONDS", "0.05"))  # of a stream per relayed batch
BODY_BYTES = int(os.environ.get("LORAKEET_RAY_BODY_BYTES", str(256 * 1024**2)))  # largest relayed body
SHARED = bool(os.environ.get("LORAKEET_ADAPTER_STORE"))  # stored data is shared by all servers
START_SECONDS = float(os.environ.get("LORAKEET_RAY_START_SECONDS", "1800"))  # for downloading and loading the model
_WARM_SECONDS = 0.25  # for which loading one adapter may block Ray's multiplexing; then it continues in the background
_CHUNK_BYTES = 2**18
_DRAIN_SECONDS = float(os.environ.get("LORAKEET_DRAIN_SECONDS", "30"))

_credentials: ContextVar[relay.Headers] = ContextVar("credentials")


def _lost(exc: BaseException) -> bool:
    """Whether a server died during a request."""
    return isinstance(exc, RayActorError | aiohttp.ClientError) or isinstance(
        getattr(exc, "cause", None), aiohttp.ClientError
    )


class _Server:
    """One server, in its own process and data directory."""

    directory: str
    _child: child.Child | None = None

    async def __init__(self) -> None:
        port = child.free_port()
        directory, lock = child.take_directory(child.data_root(os.environ), self.directory)
        settings = {"LORAKEET_HOST": "127.0.0.1", "LORAKEET_PORT": str(port), "LORAKEET_DATA_DIR": str(directory)}
        # A replica ends with its server, and Ray starts another at once.
        self._child = child.Child(child.command(os.environ), os.environ | settings, lambda _: os._exit(1), lock)
        os.close(lock)  # the child holds the lock from here on
        key = os.environ.get("LORAKEET_API_KEY", "").partition(",")[0]
        self._keys = {"authorization": f"Bearer {key}"} if key else {}
        self._server = f"http://127.0.0.1:{port}"
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            skip_auto_headers=("user-agent", "accept", "accept-encoding", "content-type"),
            read_bufsize=_CHUNK_BYTES,
        )
        async with asyncio.timeout(START_SECONDS):
            while True:
                try:
                    await self.check_health()
                    break
                except (aiohttp.ClientError, RuntimeError):
                    await asyncio.sleep(0.2)
        async with self._client.get(f"{self._server}/v1/models?limit=1", headers=self._keys) as answer:
            cards = (await answer.json(content_type=None)).get("data", [])
        self._base = [name for card in cards if card["parent"] is None for name in (card["id"], card["root"])]

    async def check_health(self) -> None:
        """Ray's health probe."""
        patience = aiohttp.ClientTimeout(10)
        async with self._client.get(f"{self._server}/ready", headers=self._keys, timeout=patience) as answer:
            if answer.status != 200:
                raise RuntimeError(f"/ready answers {answer.status}")

    async def base(self) -> list[str]:
        """The names of the base."""
        return self._base

    async def metrics(self) -> tuple[str, str]:
        """This replica's name and its metrics page."""
        async with self._client.get(f"{self._server}/metrics", headers=self._keys) as answer:
            return serve.get_replica_context().replica_id.unique_id, await answer.text()

    def _url(self, target: str) -> URL:
        """The target at this server, byte for byte: `..` is not resolved, and `//host` does not change the host."""
        return URL(f"{self._server}{target}", encoded=True)

    async def _warm(self, name: str, headers: relay.Headers) -> None:
        async with self._client.post(self._url(relay.warm_path(name)), headers=headers) as answer:
            if answer.status != 200:
                raise LookupError(f"warming answers {answer.status}")

    @serve.multiplexed(max_num_models_per_replica=ADAPTERS)
    async def adapter(self, name: str) -> str:
        """Register the adapter as held by this replica, and warm it. Raises the errors of warming."""
        warming = asyncio.create_task(self._warm(name, _credentials.get()))
        warming.add_done_callback(lambda task: task.cancelled() or task.exception())  # reported by the request itself
        done, _ = await asyncio.wait({warming}, timeout=_WARM_SECONDS)
        if done:
            warming.result()
        return name

    async def answer(self, request: relay.Request) -> AsyncIterator[Any]:
        """Yield the head of the response, then its body in pieces: for a stream batches of whole events."""
        if name := serve.get_multiplexed_model_id():
            _credentials.set([pair for pair in request.headers if pair[0] in ("authorization", "x-api-key")])
            with contextlib.suppress(LookupError, aiohttp.ClientError):  # the server's response explains it
                await self.adapter(name)
        async with self._client.request(
            request.method,
            self._url(request.target),
            headers=request.headers,
            data=request.body or None,
            allow_redirects=False,
        ) as answer:
            received = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in answer.raw_headers]
            head = relay.Head(answer.status, relay.forwarded(received))
            yield head
            async for piece in _events(answer.content) if head.is_stream else answer.content.iter_chunked(_CHUNK_BYTES):
                yield piece

    def __del__(self) -> None:
        """Stop the server. Ray calls this when the replica is removed and has no requests left."""
        if self._child:
            self._child.stop(_DRAIN_SECONDS + 10)


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Yield the first events at once, later ones in batches."""
    over = asyncio.Event()
    content.on_eof(over.set)
    rest = b""
    while piece := await content.readany():
        events, rest = relay.whole_events(rest + piece)
        if events:
            yield events
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), BATCH_SECONDS)
    if rest:
        yield rest


@serve.deployment(
    # The sequences of one step (--max-batch-requests). Beyond it, requests for an adapter go to another replica, which
    # loads the adapter as well, so that a popular adapter is spread over replicas.
    max_ongoing_requests=32,
    max_queued_requests=1024,
    health_check_period_s=5,
    graceful_shutdown_timeout_s=600,
    autoscaling_config={"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 16},
)
class Server(_Server):
    """A generating server."""

    directory = "server"


@serve.deployment(
    num_replicas=1,
    max_ongoing_requests=256,
    health_check_period_s=5,
    graceful_shutdown_timeout_s=600,
)
class Writer(_Server):
    """The server that stores names, files and jobs where there is no object store."""

    directory = "writer"


@serve.deployment(max_ongoing_requests=4096, ray_actor_options={"num_cpus": 0})
class Ingress:
    """Relays each request to its place, and the response to the client."""

    def __init__(self, servers: DeploymentHandle, writer: DeploymentHandle | None) -> None:
        self._servers = servers
        self._writer = writer
        self._base: frozenset[str] = frozenset()

    async def __call__(self, client: ClientRequest) -> Response:
        """Handle any request."""
        if client.method == "GET" and client.url.path == "/metrics":
            return await self._metrics()
        body = bytearray()
        async for piece in client.stream():
            body += piece
            if len(body) > BODY_BYTES:
                message = f"The body has more than {BODY_BYTES} bytes (LORAKEET_RAY_BODY_BYTES)."
                return _refusal(client.url.path, 413, message, "request_too_large", [("connection", "close")])
        query = client.scope["query_string"].decode("latin-1")
        target = client.scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
        headers = relay.forwarded(client.headers.items(), but=frozenset({"host", "content-length", "expect"}))
        return await self._answer(relay.Request(client.method, target, headers, bytes(body)))

    async def _answer(self, request: relay.Request) -> Response:
        try:
            if not self._base:
                self._base = frozenset(await self._servers.base.remote())
            place = relay.place(request, self._base, shared=self._writer is None)
            try:
                head, pieces = await self._begin(place, request)
            except Exception as exc:
                if not (_lost(exc) and place.repeatable):
                    raise
                head, pieces = await self._begin(place, request)
            if head.status == 404 and self._writer is not None and not place.writer:
                refusal = b"".join([piece async for piece in pieces])
                if not relay.is_unknown_model(head, refusal):
                    return _response(head, refusal)
                head, pieces = await self._begin(relay.Place(writer=True), request)
        except BackPressureError:
            message = "Too many requests wait for a server."
            return _refusal(request.path, 429, message, "rate_limit_exceeded", [relay.RETRY_AFTER])
        except (RayError, aiohttp.ClientError):
            message = "The server that was to answer died."
            return _refusal(request.path, 503, message, "service_unavailable", [relay.RETRY_AFTER])
        if head.is_stream:
            pieces = relay.ended_well(request.path, pieces, _lost)
        return _response(head, pieces)

    async def _begin(self, place: relay.Place, request: relay.Request) -> tuple[relay.Head, AsyncIterator[bytes]]:
        handle = self._writer if place.writer and self._writer is not None else self._servers
        answer = handle.options(stream=True, multiplexed_model_id=place.adapter).answer.remote(request)
        try:
            head = await anext(answer)
        except BaseException:
            answer.cancel()
            raise

        async def pieces() -> AsyncIterator[bytes]:
            whole = False
            try:
                async for piece in answer:
                    yield piece
                whole = True
            finally:
                if not whole:  # the client disconnected: cancel the request at its server
                    answer.cancel()

        return head, pieces()

    async def _metrics(self) -> Response:
        try:
            asked = [self._servers, *([] if self._writer is None else [self._writer])]
            pages = await asyncio.gather(*(one.broadcast("metrics").results_async() for one in asked))
        except (RayError, aiohttp.ClientError):
            message = "A server died while its metrics were gathered."
            return _refusal("/metrics", 503, message, "service_unavailable", [relay.RETRY_AFTER])
        text = relay.merged_metrics(dict(page for group in pages for page in group))
        return Response(text, media_type="text/plain; version=0.0.4")


def _refusal(path: str, status: int, message: str, code: str, headers: relay.Headers) -> Response:
    return _response(
        relay.Head(status, [("content-type", "application/json"), *headers]), relay.error(path, status, message, code)
    )


def _response(head: relay.Head, body: bytes | AsyncIterator[bytes]) -> Response:
    response = Response(body, head.status) if isinstance(body, bytes) else StreamingResponse(body, head.status)
    # Ray's proxy adds the request id itself, with the value that was sent to the server.
    kept = relay.forwarded(head.headers, but=frozenset({"x-request-id"}))
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in kept]
    if isinstance(body, bytes) and not any(name == "content-length" for name, _ in head.headers):
        raw.append((b"content-length", str(len(body)).encode()))
    response.raw_headers = raw
    return response


app = Ingress.bind(Server.bind(), None if SHARED else Writer.bind())
