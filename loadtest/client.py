"""A streaming HTTP client that only records arrival times during the run.

On a small machine the client competes with the server for cores. So bytes are stamped as they arrive at the socket
(httptools parses the HTTP framing in C), and are parsed as server-sent events, in one of two dialects of completions,
only after the run. `metrics` turns the times into latencies.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

_decode_json = msgspec.json.Decoder().decode


@dataclass(slots=True)
class Timeline:
    """The course of one request. Times are `perf_counter` seconds."""

    scheduled: float
    sent: float
    expected_tokens: int
    adapter: str | None = None
    # (arrival, tokens arrived up to then): one entry for each event with tokens.
    tokens: list[tuple[float, float]] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    finished: float = 0.0
    error: str | None = None


class ProtocolError(Exception):
    """A server's answer that violates its dialect."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """The format of a server's requests and events."""

    path: str
    body: Callable[..., dict[str, Any]]  # (model, prompt, output_tokens, **extra) -> JSON body
    read: Callable[[Timeline, list[tuple[float, bytes]]], None]


# --- dialects ------------------------------------------------------------------------------------------------------


def _openai_body(model: str, prompt: list[int], output_tokens: int, **extra: Any) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    } | extra


def _read_openai(timeline: Timeline, events: list[tuple[float, bytes]]) -> None:
    """Read `/v1/completions` events.

    The protocol reports the total of tokens, not the number in each event, so the total is spread evenly over the
    events with tokens. A last event with only a finish reason has none.
    """
    arrivals: list[float] = []
    ended = False
    for arrival, data in events:
        if data == b"[DONE]":
            ended = True
            continue
        event = _decode_json(data)
        if "error" in event:
            raise ProtocolError(f"error event: {event['error'].get('message')}")
        for choice in event.get("choices", ()):
            timeline.text += choice["text"]
            if choice["text"] or not choice.get("finish_reason"):
                arrivals.append(arrival)
        if usage := event.get("usage"):
            timeline.prompt_tokens, timeline.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    if not ended:
        raise ProtocolError("the stream ended without [DONE]")
    share = timeline.output_tokens / max(1, len(arrivals))
    timeline.tokens = [(arrival, share * (i + 1)) for i, arrival in enumerate(arrivals)]


def _llama_body(model: str, prompt: list[int], output_tokens: int, **extra: Any) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "n_predict": output_tokens,
        "temperature": 0,
        "stream": True,
        "cache_prompt": False,
        "timings_per_token": True,
    } | extra


def _read_llama(timeline: Timeline, events: list[tuple[float, bytes]]) -> None:
    """Read llama-server's `/completion` events, in which `timings.predicted_n` counts tokens exactly."""
    ended = False
    for arrival, data in events:
        event = _decode_json(data)
        if "error" in event:
            raise ProtocolError(f"error event: {event['error'].get('message')}")
        timeline.text += event["content"]
        count = event["timings"]["predicted_n"] if "timings" in event else event["tokens_predicted"]
        if count > (timeline.tokens[-1][1] if timeline.tokens else 0):
            timeline.tokens.append((arrival, count))
        if event["stop"]:
            ended = True
            timeline.prompt_tokens, timeline.output_tokens = event["tokens_evaluated"], event["tokens_predicted"]
    if not ended:
        raise ProtocolError("the stream ended without its last event")


OPENAI = Dialect("/v1/completions", _openai_body, _read_openai)
LLAMA = Dialect("/completion", _llama_body, _read_llama)


# --- one exchange --------------------------------------------------------------------------------------------------


class _Exchange(asyncio.Protocol):
    """One request, and (arrival, bytes) of its response's body. Method names are asyncio's and httptools'."""

    def __init__(self, request: bytes) -> None:
        self.chunks: list[tuple[float, bytes]] = []
        self.status = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._now = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._now = perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(ProtocolError(f"not HTTP: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._finish(error or ProtocolError("the connection closed before the response ended"))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.chunks.append((self._now, body))

    def on_message_complete(self) -> None:
        self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


class Client:
    """A client that sends completion requests to one server and times their streams."""

    def __init__(self, url: str, dialect: Dialect = OPENAI, *, api_key: str | None = None, timeout: float = 600.0):
        """`url`: the server's root (http or https), without `/v1`; `timeout`: of one whole request, seconds."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an http(s) address: {url}")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, parts.port or (443 if self._tls else 80)
        self._dialect, self._timeout = dialect, timeout
        authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = (
            f"POST {parts.path.rstrip('/')}{dialect.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{authorization}"
            "Content-Type: application/json\r\nAccept: text/event-stream\r\nConnection: close\r\nContent-Length: "
        )
        self._unread: list[tuple[Timeline, _Exchange]] = []

    async def complete(
        self, model: str, prompt: list[int], output_tokens: int, *, scheduled: float | None = None, **extra: Any
    ) -> Timeline:
        """Send one request on its own connection and wait for its end; a server's errors are in the timeline.

        The timeline is complete only after `read_all`.
        """
        body = msgspec.json.encode(self._dialect.body(model, prompt, output_tokens, **extra))
        sent = perf_counter()
        timeline = Timeline(scheduled if scheduled is not None else sent, sent, output_tokens)
        exchange = _Exchange(f"{self._head}{len(body)}\r\n\r\n".encode() + body)
        transport: asyncio.BaseTransport | None = None
        try:
            async with asyncio.timeout(self._timeout):
                transport, _ = await asyncio.get_running_loop().create_connection(
                    lambda: exchange, self._host, self._port, ssl=self._tls
                )
                await exchange.done
        except TimeoutError:
            timeline.error = f"no end within {self._timeout:g} s"
        except (OSError, ProtocolError) as error:
            timeline.error = str(error) or type(error).__name__
        finally:
            timeline.finished = perf_counter()
            exchange.done.cancel()  # not awaited any more
            if transport is not None:
                transport.close()
        self._unread.append((timeline, exchange))
        return timeline

    def read_all(self) -> None:
        """Parse the collected streams and complete all timelines made since the last call."""
        for timeline, exchange in self._unread:
            if timeline.error is None:
                self._read(timeline, exchange)
        self._unread.clear()

    def _read(self, timeline: Timeline, exchange: _Exchange) -> None:
        if exchange.status != 200:
            timeline.error = f"HTTP {exchange.status}: {_error_message(b''.join(c for _, c in exchange.chunks))}"
            return
        try:
            self._dialect.read(timeline, list(server_sent_events(exchange.chunks)))
        except (ProtocolError, msgspec.DecodeError, KeyError, TypeError) as error:
            timeline.error = f"{type(error).__name__}: {error}"
            return
        if timeline.output_tokens != timeline.expected_tokens:
            timeline.error = f"{timeline.output_tokens} of {timeline.expected_tokens} tokens returned"


def server_sent_events(chunks: list[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Yield (arrival of the last byte, data) of each event. Events have one `data:` line each."""
    buffer = b""
    for arrival, chunk in chunks:
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield arrival, line[5:].strip()


def _error_message(body: bytes) -> str:
    with contextlib.suppress(msgspec.DecodeError, KeyError, TypeError):
        return str(_decode_json(body)["error"]["message"])
    return body[:200].decode("utf-8", "replace")
