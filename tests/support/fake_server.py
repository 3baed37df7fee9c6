"""A scripted completions server in raw asyncio, so that a test controls the timing of bytes."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

Script = Callable[[dict[str, Any]], Sequence[bytes | float]]  # request body -> writes, and pauses in seconds


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def token(text: str, finish: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "text": text, "finish_reason": finish}])


def usage(prompt: int, completion: int) -> bytes:
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": completion})


DONE = b"data: [DONE]\n\n"


def stream(*parts: bytes | float) -> list[bytes | float]:
    """A 200 response of chunked server-sent events."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = [f"{len(p):x}\r\n".encode() + p + b"\r\n" if isinstance(p, bytes) else p for p in parts]
    return [head, *chunks, b"0\r\n\r\n"]


def tokens(body: dict[str, Any], pause: float = 0.0) -> list[bytes | float]:
    """The correct response: one event per requested token."""
    parts: list[bytes | float] = []
    for i in range(body["max_tokens"]):
        parts += [pause, token(f"t{i} ")]
    return stream(*parts, token("", "length"), usage(len(body["prompt"]), body["max_tokens"]), DONE)


class FakeServer:
    """Answers every POST by `script`; records the bodies and the largest number of concurrent requests."""

    def __init__(self, script: Script = tokens) -> None:
        self.script = script
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.running = self.most_running = 0
        self.url = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("Content-Length"))
            body = json.loads(await reader.readexactly(length))
            self.heads.append(head)
            self.bodies.append(body)
            for part in self.script(body):
                if isinstance(part, float):
                    await asyncio.sleep(part)
                else:
                    writer.write(part)
                    await writer.drain()
        finally:
            self.running -= 1
            writer.close()


@contextlib.asynccontextmanager
async def running(script: Script = tokens) -> AsyncIterator[FakeServer]:
    """A fake server on a free port."""
    fake = FakeServer(script)
    server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield fake
