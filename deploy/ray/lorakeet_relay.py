"""Routing of requests and relaying of responses: the parts of the Ray Serve application that need no Ray."""

import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

Headers = list[tuple[str, str]]

# Routed to a server that holds the adapter.
BY_ADAPTER = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/classify",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
    }
)
BY_ANY_SERVER = frozenset({"/health", "/ready", "/version", "/tokenizer_info"})
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
RETRY_AFTER = ("retry-after", "5")
# Headers of one connection (RFC 9110, 7.6.1), or replaced for the next one.
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "date",
        "server",
    }
)
_AT_HOLDER = re.compile(r"/v1/adapters/(.+)/(?:merge|warm|verify)")  # preferably at a server that holds the adapter
_SAMPLE = re.compile(r"([^\s{]+)(?:\{(.*)\})? (.+)")


@dataclass(frozen=True)
class Request:
    """A client's request as relayed."""

    method: str
    target: str  # path and query, unchanged
    headers: Headers
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


@dataclass(frozen=True)
class Head:
    """Status and headers of a response."""

    status: int
    headers: Headers

    @property
    def is_stream(self) -> bool:
        return any(name == "content-type" and value.startswith("text/event-stream") for name, value in self.headers)


@dataclass(frozen=True)
class Place:
    """The servers that may handle a request: any replica, preferably one that holds `adapter`; or only the writer.

    There is a writer only without an object store.
    """

    writer: bool = False
    adapter: str = ""
    repeatable: bool = True  # a server that dies before it responds has changed nothing


def place(request: Request, base: frozenset[str], *, shared: bool) -> Place:
    """The place of a request.

    Args:
        base: the base's names, which need no routing.
        shared: whether all stored data is in an object store and available to every server.
    """
    if request.method == "GET" and request.path in BY_ANY_SERVER:
        return Place()
    if request.method == "POST" and request.path in BY_ADAPTER | {RESPONSES}:
        fields = _fields(request.body)
        kept = request.path == RESPONSES and _is_kept(fields)
        if shared or not kept:
            name = _adapter(fields)
            return Place(adapter="" if name in base else name, repeatable=not kept)
    at_holder = _AT_HOLDER.fullmatch(request.path) if shared else None
    return Place(
        writer=not shared,
        adapter=unquote(at_holder[1]).partition("@")[0] if at_holder else "",
        repeatable=request.method in ("GET", "HEAD"),
    )


def _fields(body: bytes) -> Mapping[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return {}  # the server refuses it with the reason
    return fields if isinstance(fields, dict) else {}


def _adapter(fields: Mapping[str, Any]) -> str:
    """The adapter named in a body, without a version; of several, the first."""
    several = fields.get("adapters")
    first = several[0] if isinstance(several, list) and several else None
    named = fields.get("adapter_id") or (first.get("id") if isinstance(first, dict) else None) or fields.get("model")
    return named.partition("@")[0] if isinstance(named, str) else ""


def _is_kept(fields: Mapping[str, Any]) -> bool:
    """Whether a response is stored, or continues a stored one."""
    return (
        fields.get("store") is not False or bool(fields.get("previous_response_id")) or bool(fields.get("background"))
    )


def warm_path(adapter: str) -> str:
    """The path that warms an adapter, with its name quoted."""
    return f"/v1/adapters/{quote(adapter, safe='')}/warm"


def forwarded(headers: Iterable[tuple[str, str]], but: frozenset[str] = frozenset()) -> Headers:
    """The headers to send on the next connection, with names in lower case."""
    lowered = [(name.lower(), value) for name, value in headers]
    named = {word.strip() for name, value in lowered if name == "connection" for word in value.lower().split(",")}
    return [(name, value) for name, value in lowered if name not in _HOP_BY_HOP | named | but]


def whole_events(buffer: bytes) -> tuple[bytes, bytes]:
    """The complete server-sent events, and the beginning of the next one."""
    end = buffer.rfind(b"\n\n")
    return (b"", buffer) if end < 0 else (buffer[: end + 2], buffer[end + 2 :])


def error(path: str, status: int, message: str, code: str) -> bytes:
    """An error body in the server's format: OpenAI's, or under `/v1/messages` Anthropic's."""
    kinds = ("invalid_request_error", "rate_limit_error", "service_unavailable")
    if anthropic := path.startswith(MESSAGES):
        kinds = ("request_too_large", "rate_limit_error", "overloaded_error")
    kind = dict(zip((413, 429, 503), kinds, strict=True))[status]
    fields = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"type": "error", "error": fields} if anthropic else {"error": fields}).encode()


def error_event(path: str) -> bytes:
    """The last event of a stream whose server died."""
    body = error(path, 503, "The server died; the answer is incomplete.", "service_unavailable")
    return (b"event: error\n" if path.startswith((MESSAGES, RESPONSES)) else b"") + b"data: " + body + b"\n\n"


async def ended_well(
    path: str, chunks: AsyncIterator[bytes], lost: Callable[[Exception], bool]
) -> AsyncIterator[bytes]:
    """Yield a stream of whole events, ending with an error event if its server dies."""
    try:
        async for chunk in chunks:
            yield chunk
    except Exception as exc:
        if not lost(exc):
            raise
        yield error_event(path)


def is_unknown_model(head: Head, body: bytes) -> bool:
    """Whether a server reports an unknown adapter, which another server may have."""
    return head.status == 404 and b'"model_not_found"' in body


def merged_metrics(pages: Mapping[str, str]) -> str:
    """The metrics of all servers as one page: each sample with a label `replica`, each family once."""
    families: dict[str, list[str]] = {}
    texts: dict[str, dict[str, str]] = {}
    for replica, page in pages.items():
        family = ""
        for line in page.splitlines():
            if line.startswith("# "):
                _, kind, family, *_ = line.split(" ", 3)
                families.setdefault(family, [])
                texts.setdefault(family, {})[kind] = line
            elif found := _SAMPLE.fullmatch(line):
                name, labels, value = found.groups()
                mine = f'replica="{replica}"' + (f",{labels}" if labels else "")
                families.setdefault(family, []).append(f"{name}{{{mine}}} {value}")
    return "".join(
        f"{line}\n" for family, samples in families.items() for line in (*texts.get(family, {}).values(), *samples)
    )
