"""Faults that a server survives: killed processes, full disks, disconnected clients, replaced adapters.

Every test leaves a server that the next one can use.
"""

import asyncio
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.conftest import ADAPTERS, DISK_MIB, DRAIN_SECONDS, Files
from tests.support.running import BASE, RunningServer, alive, eventually, forking

PROMPT = "The quick brown fox"


def body(model: str = BASE, tokens: int = 24, **extra: Any) -> dict[str, Any]:
    return {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **extra}


def complete(server: RunningServer, model: str, tokens: int = 24) -> dict[str, Any]:
    response = httpx.post(f"{server.url}/v1/completions", json=body(model, tokens), timeout=180)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def texts(server: RunningServer) -> dict[str, str]:
    return {name: complete(server, name)["choices"][0]["text"] for name in (BASE, *ADAPTERS)}


def idle(server: RunningServer) -> bool:
    return server.metric("num_requests_running") == server.metric("num_requests_waiting") == 0


def is_error(error: Any) -> bool:
    return isinstance(error, dict) and set(error) == {"message", "type", "param", "code"}


async def events(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


async def read_stream(client: httpx.AsyncClient, model: str, tokens: int, started: asyncio.Event) -> list[str]:
    """Every event of one streamed completion."""
    got = []
    async with client.stream("POST", "/v1/completions", json=body(model, tokens, stream=True)) as response:
        assert response.status_code == 200
        async for event in events(response):
            started.set()
            got.append(event)
    return got


def client_of(server: RunningServer) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.url, timeout=180)


# --- killed processes --------------------------------------------------------------------------------


async def test_the_engine_killed_under_load(server: RunningServer) -> None:
    await under_load(server, lambda pid: os.kill(pid, signal.SIGKILL))


@pytest.mark.parametrize(
    "kind", ["accelerator", "out of memory", pytest.param("illegal access", marks=pytest.mark.cuda)]
)
async def test_the_device_fails_under_load(server: RunningServer, kind: str) -> None:
    await under_load(server, lambda _: server.fault.write_text(kind))
    assert not server.fault.exists()


async def under_load(server: RunningServer, strike: Callable[[int], object]) -> None:
    """Every request gets an answer or an error; the engine restarts by itself and gives the same answers as before."""
    before, ready = texts(server), server.wait_ready()
    async with client_of(server) as client:
        with server.slowed():
            streams, whole = await begun(server, client)
            strike(ready["engine_pid"])
        for stream in streams:
            got = await stream
            assert "[DONE]" not in got
            assert is_error(json.loads(got[-1])["error"])
        for request in whole:
            response = await request
            assert response.status_code == 503
            assert int(response.headers["Retry-After"]) > 0
            assert is_error(response.json()["error"])
    assert server.get("/health").status_code == 200

    again = server.wait_ready()
    assert again["engine_pid"] != ready["engine_pid"]
    assert again["base_digest"] == ready["base_digest"]
    assert texts(server) == before


async def begun(
    server: RunningServer, client: httpx.AsyncClient
) -> tuple[list[asyncio.Task[list[str]]], list[asyncio.Task[httpx.Response]]]:
    """Streams with at least one event, and non-streaming requests in progress."""
    started = [asyncio.Event() for _ in range(4)]
    streams = [
        asyncio.create_task(read_stream(client, name, 480, event))
        for name, event in zip((BASE, *ADAPTERS), started, strict=True)
    ]
    whole = [asyncio.create_task(client.post("/v1/completions", json=body(name, 480))) for name in ADAPTERS]
    await asyncio.gather(*(event.wait() for event in started))
    await until_running(server, len(streams) + len(whole))
    return streams, whole


async def until_running(server: RunningServer, count: int) -> None:
    """Return once this many sequences are in the engine's batch."""
    running = partial(server.metric, "num_requests_running")
    await asyncio.to_thread(eventually, lambda: running() == count, 180, f"{count} sequences run")


def test_a_batch_outlives_its_engine_and_its_server(server: RunningServer) -> None:
    """Every row is answered once, with the answer that a client would get."""
    names = [(BASE, *ADAPTERS)[row % 3] for row in range(24)]
    rows = [
        {"custom_id": str(row), "method": "POST", "url": "/v1/completions", "body": body(name, 20 + row)}
        for row, name in enumerate(names)
    ]
    with httpx.Client(base_url=server.url, timeout=180) as client:
        file = {"file": ("rows.jsonl", "\n".join(map(json.dumps, rows)).encode())}
        stored = client.post("/v1/files", data={"purpose": "batch"}, files=file).json()
        asked = {"input_file_id": stored["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = client.post("/v1/batches", json=asked).json()["id"]

        def completed() -> int:
            state = client.get(f"/v1/batches/{batch}").json()
            assert state["request_counts"]["failed"] == 0
            return int(state["request_counts"]["completed"])

        eventually(lambda: completed() >= 2, 180, "some rows are answered")
        os.kill(server.engine_pid, signal.SIGKILL)
        server.wait_ready()
        eventually(lambda: completed() >= 8, 180, "the next engine goes on")
        server.kill()
        server.ensure()
        eventually(lambda: completed() == len(rows), 180, "the next server ends it")
        state = eventually(
            lambda: (now := client.get(f"/v1/batches/{batch}").json())["status"] == "completed" and now, 180, "its end"
        )
        lines = client.get(f"/v1/files/{state['output_file_id']}/content").content.splitlines()
    answers = [json.loads(line) for line in lines]
    assert sorted(int(answer["custom_id"]) for answer in answers) == list(range(len(rows)))
    for answer in answers:
        row = int(answer["custom_id"])
        alone = complete(server, names[row], 20 + row)["choices"]
        assert answer["response"]["body"]["choices"][0]["text"] == alone[0]["text"]


async def test_the_server_killed_during_an_upload_and_a_response(server: RunningServer, made: Files) -> None:
    before, engine = texts(server), server.engine_pid
    asked: dict[str, Any] = {"model": "red", "input": "Hello!", "max_output_tokens": 8}
    async with httpx.AsyncClient(base_url=server.url, timeout=180) as client:
        done = (await client.post("/v1/responses", json=asked)).json()
    stored = files_under(server.data_dir)

    config = (made.adapters["red"] / "adapter_config.json").read_bytes()
    half = part("name", b"half") + part("config", config) + part("weights", os.urandom(3 << 20))
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(
            b"POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            b"Content-Length: 9000000\r\n\r\n" + half
        )
        eventually(lambda: files_under(server.data_dir) != stored, 180, "the upload reaches the disk")
        async with httpx.AsyncClient(base_url=server.url, timeout=180) as client:
            long = asked | {"background": True, "max_output_tokens": 400}
            under_way = (await client.post("/v1/responses", json=long)).json()
        server.kill()
    eventually(lambda: not alive(engine), 30, "the engine follows its server")

    server.ensure()
    assert [item["name"] for item in server.get("/v1/adapters").json()["data"]] == sorted(ADAPTERS)
    assert files_under(server.data_dir) == stored
    assert texts(server) == before
    assert server.get(f"/v1/responses/{done['id']}").json() == done
    assert server.get(f"/v1/responses/{under_way['id']}").json()["status"] in ("failed", "completed", "incomplete")


def part(name: str, content: bytes) -> bytes:
    return b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (name.encode(), content)


def files_under(root: Path) -> dict[str, int]:
    """Stored files and their sizes, without the databases."""
    found = {}
    paths = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)  # folders may vanish
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            if ".db" not in path.name and ".sqlite" not in path.name:
                found[str(path.relative_to(root))] = path.stat().st_size
    return found


# --- full disks ----------------------------------------------------------------------------------------


def big_upload(server: RunningServer, made: Files, mebibytes: int) -> httpx.Response:
    config = (made.adapters["red"] / "adapter_config.json").read_bytes()
    files = {"config": config, "weights": bytes(mebibytes << 20)}
    return httpx.post(f"{server.url}/v1/adapters", data={"name": "big"}, files=files, timeout=180)


def nothing_was_kept(server: RunningServer, made: Files, response: httpx.Response, stored: dict[str, int]) -> None:
    assert response.status_code == 507, response.text
    assert is_error(response.json()["error"])
    assert files_under(server.data_dir) == stored
    assert server.get("/v1/adapters/big").status_code == 404


def test_a_full_disk(server: RunningServer, made: Files, small_disk: Path | None) -> None:
    if small_disk is None:
        pytest.skip("needs to mount a tmpfs, which only root may (and not in every container)")
    stored, pid = files_under(server.data_dir), server.engine_pid
    nothing_was_kept(server, made, big_upload(server, made, DISK_MIB + 8), stored)
    assert server.engine_pid == pid
    complete(server, "red")
    assert made.upload(server, "after", "green").status_code == 201
    assert server.delete("/v1/adapters/after").status_code == 200


def test_a_file_that_may_not_grow(server: RunningServer, made: Files) -> None:
    """The same fault without a small disk: the kernel does not let the server's files grow."""
    stored, pid = files_under(server.data_dir), server.process.pid
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE, (2 << 20, resource.RLIM_INFINITY))
    try:
        nothing_was_kept(server, made, big_upload(server, made, 4), stored)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    complete(server, "red")


# --- disconnected clients -------------------------------------------------------------------------------


async def test_a_client_that_leaves_after_the_first_token(server: RunningServer) -> None:
    aborted = aborts(server)
    with server.slowed():
        async with client_of(server) as client:
            async with client.stream("POST", "/v1/completions", json=body("red", 480, stream=True)) as response:
                async for _ in events(response):
                    break
            steps = server.metric("engine_step_requests_count")
        eventually(lambda: aborts(server) == aborted + 1, 180, "the server notices")
    eventually(lambda: idle(server), 180, "the abandoned sequence leaves the engine")
    assert server.metric("engine_step_requests_count") - steps < 100  # of the 480 requested


async def test_clients_that_leave_before_the_first_token(server: RunningServer) -> None:
    tokens, aborted = server.metric("generation_tokens_total"), aborts(server)
    request = json.dumps(body("red", 400)).encode()
    with server.slowed():
        with contextlib.ExitStack() as connections:
            for _ in range(8):
                connection = socket.create_connection(("127.0.0.1", server.port))
                connections.enter_context(connection)
                connection.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%s" % (len(request), request)
                )
            await until_running(server, 8)
        eventually(lambda: aborts(server) == aborted + 8, 180, "all eight are given up")
    eventually(lambda: idle(server), 180, "the abandoned sequences leave the engine")
    assert server.metric("generation_tokens_total") - tokens < 8 * 400 / 2


def aborts(server: RunningServer) -> float:
    return server.metric("request_success_total", finished_reason="abort")


# --- adapters replaced under load -------------------------------------------------------------------------


async def test_replacing_an_adapter_under_load_never_mixes_versions(server: RunningServer, made: Files) -> None:
    made.upload(server, "legal", "red")
    expected = {}
    for content in ("red", "green"):
        answer = complete(server, content, 60)
        expected[answer["system_fingerprint"]] = answer["choices"][0]["text"]
    assert len(set(expected.values())) == 2

    seen: list[str] = []
    stop = asyncio.Event()

    async def ask(client: httpx.AsyncClient) -> None:
        while not stop.is_set():
            response = await client.post("/v1/completions", json=body("legal", 60))
            assert response.status_code == 200, response.text
            answer = response.json()
            digest = answer["system_fingerprint"]
            assert response.headers["X-Adapter-Digest"] == digest
            assert answer["choices"][0]["text"] == expected[digest]
            seen.append(digest)

    async with client_of(server) as client:
        askers = [asyncio.create_task(ask(client)) for _ in range(4)]
        for content in ("green", "red") * 4:
            count = len(seen)
            while len(seen) < count + 3:
                await asyncio.sleep(0.01)
                assert not any(asker.done() for asker in askers)
            response = await asyncio.to_thread(made.upload, server, "legal", content)
            assert response.status_code == 201
        stop.set()
        await asyncio.gather(*askers)
    assert set(seen) == set(expected)
    assert server.delete("/v1/adapters/legal").status_code == 200


# --- shutting down ----------------------------------------------------------------------------------------


async def test_sigterm_lets_requests_finish(server: RunningServer) -> None:
    engine, before = server.engine_pid, len(server.log)
    async with client_of(server) as client:
        with server.slowed():
            started = asyncio.Event()
            stream = asyncio.create_task(read_stream(client, "red", 100, started))
            await started.wait()
            server.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(eventually, lambda: "shutting down" in server.log[before:], 180, "it says so")
            assert await asyncio.to_thread(refusal, server) in (None, 503)
        got = await stream
    assert got[-1] == "[DONE]"
    assert json.loads(got[-2])["choices"][0]["finish_reason"] == "length"
    assert await asyncio.to_thread(server.process.wait, 60) == 0
    assert not alive(engine)


@pytest.mark.parametrize("told", [1, 2])
def test_a_server_that_still_loads_its_model_stops_in_silence(server: RunningServer, told: int) -> None:
    server.stop()
    before = len(server.log)
    server.begin()
    eventually(lambda: "listening on" in server.log[before:], 180, "it listens")
    for _ in range(told):
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    assert server.process.wait(60) == 0
    said = server.log[before:]
    assert "Finished server process" in said
    assert not re.search("Traceback|ERROR|WARNING", said), said


async def test_a_second_interrupt_ends_at_once_and_in_silence(server: RunningServer) -> None:
    engine, before = server.engine_pid, len(server.log)
    async with client_of(server) as client:
        with server.slowed():
            started = asyncio.Event()
            stream = asyncio.create_task(read_stream(client, "red", 480, started))
            await started.wait()
            with server.held():  # prevents the response from finishing, even on a fast machine
                server.process.send_signal(signal.SIGINT)
                await asyncio.to_thread(
                    eventually, lambda: "Ctrl-C again ends them at once" in server.log[before:], 180, "it says so"
                )
                assert server.process.poll() is None
                server.process.send_signal(signal.SIGINT)
                assert await asyncio.to_thread(server.process.wait, DRAIN_SECONDS / 2) == 0
        with contextlib.suppress(httpx.TransportError):
            assert "[DONE]" not in await stream
    assert not alive(engine)
    said = server.log[before:]
    assert not re.search("Traceback|ERROR", said), said


def test_a_port_in_use_is_one_line(server: RunningServer, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", "--port", str(server.port)]
    done = subprocess.run([*command, "--data-dir", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"error: --port: {server.port} on 127.0.0.1 is in use by another program"]


@pytest.mark.parametrize(
    ("flag", "value", "status", "said"),
    [
        ("--data-dir", "taken/data", 2, r"--data-dir: \S+ cannot be made: Not a directory"),
        ("--model", "bert", 1, "the engine cannot start: .*(BertLMHeadModel|bert).*"),
    ],
)
def test_a_server_that_cannot_start_says_so_in_one_line(
    tmp_path: Path, server: RunningServer, model_dir: Path, flag: str, value: str, status: int, said: str
) -> None:
    """It has also removed files that killed servers left behind."""
    (tmp_path / "taken").touch()
    bert = tmp_path / "bert"
    shutil.copytree(model_dir, bert)
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps(config | {"model_type": "bert", "architectures": ["BertLMHeadModel"]}))
    left = tmp_path / "tmp/lorakeet-killed"
    left.mkdir(parents=True)
    (left / ".lock").touch()
    paths = {"--model": str(model_dir), "--data-dir": str(tmp_path / "data"), flag: str(tmp_path / value)}
    arguments = [word for pair in paths.items() for word in pair]
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", "--port", "0", *arguments]
    environment = os.environ | forking() | {"TMPDIR": str(tmp_path / "tmp"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert re.fullmatch(f"error: {said}", done.stderr.splitlines()[-1]), done.stderr
    assert done.stderr.count("cannot be served") <= 2, "it was not tried again"
    assert left.exists() == (status == 2)


def test_the_start_tells_what_there_is_in_one_line(server: RunningServer) -> None:
    [line] = [line for line in server.log.splitlines() if "engine ready" in line][-1:]
    assert re.search(
        r"engine ready: LlamaForCausalLM on cpu in float32, KV cache of \d+ tokens, [34] MiB for adapters, "
        r"(native \(\w+\)|torch) kernels$",
        line,
    )


def refusal(server: RunningServer) -> int | None:
    """The refusal of a request during draining: a status, or None if the port is closed."""
    try:
        return httpx.post(f"{server.url}/v1/completions", json=body(), timeout=180).status_code
    except httpx.TransportError:
        return None
