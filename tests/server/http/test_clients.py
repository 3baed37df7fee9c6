"""Over a real socket: the `openai` client, and clients that disconnect."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from server.http import body as body_module
from server.http import middleware as middleware_module
from server.http.connection import LimitedHttpProtocol
from server.messages.protocol import Generate
from tests.support.harness import adapter_files
from tests.support.scripted import BASE, TEXT, Served, encode, serving, unavailable


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


@pytest.fixture
async def port(served: Served) -> AsyncIterator[int]:
    async with _listening(served) as port:
        yield port


@contextlib.asynccontextmanager
async def _listening(served: Served) -> AsyncIterator[int]:
    config = uvicorn.Config(served.app, port=0, http=LimitedHttpProtocol, log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    running = asyncio.create_task(server._serve())  # without its signal handlers
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await running


@pytest.fixture
async def client(port: int) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=0) as client:
        yield client


HELLO: Any = [{"role": "user", "content": "Hi"}]


# --- the openai client ------------------------------------------------------------------------------------


async def test_completions_with_the_openai_client(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model=BASE, prompt=["Hi", "Ho"], n=2, max_tokens=50, logprobs=1)
    assert [choice.text for choice in whole.choices] == [TEXT] * 4
    assert whole.choices[0].logprobs is not None
    assert "".join(whole.choices[0].logprobs.tokens or []) == TEXT
    stream = await client.completions.create(model=BASE, prompt="Hi", max_tokens=50, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == TEXT


async def test_chat_with_the_openai_client(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model=BASE, messages=HELLO, logprobs=True, top_logprobs=1)
    assert whole.choices[0].message.content == TEXT
    assert whole.choices[0].logprobs is not None
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    stream = await client.chat.completions.create(
        model=BASE, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == TEXT
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(encode(TEXT)) + 1


async def test_errors_reach_the_openai_client(served: Served, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="nobody", messages=HELLO)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model=BASE, messages=HELLO, tools=[{"type": "function"}])  # type: ignore[list-item]
    assert refused.value.param == "tools.0.function"
    served.engine.fail = {2: unavailable()}
    stream = await client.completions.create(model=BASE, prompt="Hi", stream=True)
    with pytest.raises(openai.APIError, match="engine stopped"):
        _ = [chunk async for chunk in stream]


async def test_server_sent_events_are_read_as_they_come(served: Served, client: openai.AsyncOpenAI) -> None:
    steps: asyncio.Queue[None] = asyncio.Queue()

    async def gate(request: Generate, step: int) -> None:
        await steps.get()

    served.engine.gate = gate
    opened = asyncio.create_task(client.completions.create(model=BASE, prompt="Hi", stream=True))
    steps.put_nowait(None)
    stream = await opened
    first = await anext(aiter(stream))
    assert first.choices[0].text == served.services.text.decode(encode(TEXT)[:1], skip_special_tokens=True)
    assert served.engine.steps == 1  # the client has the first token while the engine waits for the second
    await stream.close()


# --- clients that disconnect -----------------------------------------------------------------------------------


async def _open(
    port: int, path: str, body: dict[str, Any], *, blanks: int = 0
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = json.dumps(body).encode() + b" " * blanks
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    await writer.drain()
    return reader, writer


async def _until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


PROMPTS: dict[str, dict[str, Any]] = {"/v1/completions": {"prompt": "Hi"}, "/v1/chat/completions": {"messages": HELLO}}


@pytest.mark.parametrize("path", PROMPTS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps_before", [0, 3])
async def test_a_client_that_leaves_costs_nothing_more(
    served: Served, port: int, path: str, stream: bool, steps_before: int
) -> None:
    async def gate(request: Generate, step: int) -> None:
        if step == steps_before:
            await asyncio.Event().wait()  # the engine would never respond

    served.engine.gate = gate
    reader, writer = await _open(port, path, {"model": BASE, "stream": stream} | PROMPTS[path])
    await _until(lambda: served.engine.steps == steps_before and served.engine.running)
    if stream and steps_before:
        assert b"200 OK" in await reader.readuntil(b"\r\n")
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    await _until(lambda: not (served.engine.running or served.services.drain.open_requests))
    assert len(served.engine.aborted) == 1
    assert served.engine.steps == steps_before
    assert served.services.admission.requests == 0
    counted = served.services.metrics.registry.get_sample_value
    assert counted("lorakeet:request_success_total", {"finished_reason": "abort"}) == 1


async def test_all_samples_of_a_client_that_leaves_end(served: Served, port: int) -> None:
    async def gate(request: Generate, step: int) -> None:
        if step == 2:
            await asyncio.Event().wait()

    served.engine.gate = gate
    _, writer = await _open(port, "/v1/completions", {"model": BASE, "prompt": ["a", "b"], "n": 3, "stream": True})
    await _until(lambda: served.engine.steps == 12)
    writer.close()
    await _until(lambda: not served.engine.running)
    assert len(served.engine.aborted) == 6


async def test_a_client_that_leaves_while_sending_its_body_is_no_request(served: Served, port: int) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
    writer.write(b"Content-Length: 1000\r\n\r\n{")
    await writer.drain()
    await _until(lambda: served.services.drain.open_requests == 1)
    writer.close()
    await _until(lambda: served.services.drain.open_requests == 0)
    assert served.engine.requests == []


async def test_large_bodies_of_clients_that_left_are_not_read(
    served: Served, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    gone = threading.Event()

    def slow(raw: bytes, max_items: int, max_depth: int) -> Any:
        read.append(len(raw))
        assert gone.wait(60)
        return json.loads(raw)

    monkeypatch.setattr(body_module, "parse_body", slow)
    writers = []
    for _ in range(8):
        _, writer = await _open(port, "/v1/completions", {"model": BASE, "prompt": "Hi"}, blanks=50_000)
        writers.append(writer)
    await _until(lambda: served.services.drain.open_requests == 8 and read)
    for writer in writers:
        writer.close()
    await _until(lambda: served.services.drain.open_requests == 0)
    gone.set()
    reader, writer = await _open(port, "/v1/completions", {"model": BASE, "prompt": "Hi"}, blanks=50_000)
    assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"\r\n"), 60)
    writer.close()
    assert len(read) == 2  # the body that was being parsed when the clients left, and that of the last client


async def test_an_upload_that_drips_gives_its_slot_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware_module, "BODY_GRACE_SECONDS", 0.5)
    async with serving(tmp_path, max_uploads=1) as served, _listening(served) as port:
        head = b"POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
        _, dripping = await asyncio.open_connection("127.0.0.1", port)
        dripping.write(head + b"Content-Type: multipart/form-data; boundary=b\r\n\r\n")
        config, weights = adapter_files()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            files = {"config": config, "weights": weights}
            uploading = asyncio.create_task(client.post("/v1/adapters", data={"name": "a"}, files=files, timeout=60))
            while not uploading.done():
                dripping.write(b"-")
                await asyncio.sleep(0.02)
            assert (await uploading).status_code == 201
        dripping.close()
