"""`make abuse`: the budget at full size on a real server, while another client sends requests and reads a stream.

API process at most 300 MB above idle, nobody else's wait longer by 0.25 s, time in proportion to size. ABUSED, an
expression, restricts the bodies by name.
"""

import contextlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from server.http.operations import Operation
from server.settings import Settings
from tests.faults.conftest import Files
from tests.support.abuse import ADAPTER, SHAPES, Case, cases
from tests.support.harness import Site
from tests.support.running import BASE, RunningServer
from tests.support.tiny import tiny_model

pytestmark = [pytest.mark.abuse, pytest.mark.timeout(3600)]

LARGEST = 8 * 2**20 - 4096
MEMORY = 300e6
GAP = 0.25
CONTEXT = 8192
FILES = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}


@pytest.fixture(scope="module")
def server(made: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("abused")
    model = tiny_model(root / "model", max_position_embeddings=CONTEXT)
    data = root / "data"
    data.mkdir()
    flags = ("--lora-dir", str(data), "--kv-cache-bytes", "64MiB")
    server = RunningServer(model, root, data, *flags, forks=False)  # its memory is measured
    server.ensure()
    assert made.upload(server, ADAPTER, "red").status_code == 201
    yield server
    server.stop()


@dataclass
class Bystander:
    """Requests `/health` all the time and records the waits since the last call."""

    url: str
    pid: int
    waits: list[float] = field(default_factory=list)
    ended: bool = False

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self.ended:
                before = time.perf_counter()
                client.get("/health")
                self.waits.append(time.perf_counter() - before)
                time.sleep(0.01)

    def begin(self) -> int:
        """Reset the peak and the waits; return the bytes of the API process now."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        self.waits.clear()
        return self._memory("VmRSS")

    def peak(self) -> int:
        return self._memory("VmHWM")

    def _memory(self, name: str) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith(name))


@pytest.fixture
def bystander(server: RunningServer) -> Iterator[Bystander]:
    bystander = Bystander(server.url, server.process.pid)
    thread = threading.Thread(target=bystander.run)
    thread.start()
    time.sleep(2)
    yield bystander
    bystander.ended = True
    thread.join()


@pytest.fixture
def rest(bystander: Bystander) -> float:
    """The longest wait of the bystander on this machine without any other request."""
    bystander.waits.clear()
    time.sleep(10)
    return max(bystander.waits)


@dataclass
class Cost:
    status: int
    seconds: float
    memory: int
    gap: float


def cost(bystander: Bystander, client: httpx.Client, method: str, path: str, body: bytes) -> tuple[Cost, str]:
    headers = {"Content-Type": "application/json"}
    return cost_of(bystander, client, client.build_request(method, path, content=body, headers=headers))


def cost_of(bystander: Bystander, client: httpx.Client, request: httpx.Request) -> tuple[Cost, str]:
    before = bystander.begin()
    since = time.perf_counter()
    response = client.send(request)
    seconds = time.perf_counter() - since
    time.sleep(0.02)
    gap = max(bystander.waits, default=0.0)
    code = str(response.json()["error"]["code"]) if response.status_code >= 400 else ""
    return Cost(response.status_code, seconds, bystander.peak() - before, gap), code


def sizes(bystander: Bystander, client: httpx.Client, case: Case) -> Iterator[Cost]:
    """The costs of the largest body, of one with the maximal number of items, and, if that is slow, of half of it."""
    most, method, path = LARGEST, case.operation.method, case.path
    whole, code = cost(bystander, client, method, path, case.body(most))
    yield whole
    while code == "too_many_items":
        most = int(most * 0.8)
        whole, code = cost(bystander, client, method, path, case.body(most))
        yield whole
    if whole.seconds > 1:
        yield cost(bystander, client, method, path, case.body(most // 2))[0]


def keeps(seen: list[Cost], rest: float) -> bool:
    *_, whole, half = seen if len(seen) > 1 else seen * 2
    return (
        all(200 <= each.status < 500 for each in seen)
        and max(each.memory for each in seen) <= MEMORY
        and max(each.gap for each in seen) <= GAP + rest
        and (whole.seconds <= 1 or whole.seconds <= 3 * half.seconds + 0.5)
    )


def test_full_bodies_keep_the_budget(server: RunningServer, bystander: Bystander, rest: float, tmp_path: Path) -> None:
    with contextlib.closing(Site(tmp_path, lora_dir=tmp_path)) as site:
        operations = [route for route in site.app().routes if isinstance(route, Operation)]
    faults = []
    with httpx.Client(base_url=server.url, timeout=300) as client:
        for case in cases(operations):
            if not re.search(os.environ.get("ABUSED", ""), str(case)):
                continue
            for _ in range(3):  # another process may have had the processor
                seen = list(sizes(bystander, client, case))
                if keeps(seen, rest):
                    break
            else:
                faults.append((str(case), seen))
                print(case, *seen, sep="\n  ", flush=True)
    assert not faults


def uploads(client: httpx.Client, made: Files, shape: Callable[[int], bytes], size: int) -> Iterator[httpx.Request]:
    """An adapter with this many bytes of a shape in each of its files, and files of rows with it in one and in many."""
    good = {part: (made.adapters["red"] / name).read_bytes() for part, name in FILES.items()}
    value = shape(size)
    header = b'{"__metadata__":{"a":"b"},"x":%b}' % value
    parts = {
        "config": b'{"peft_type":"LORA","r":2,"target_modules":%b}' % value,
        "weights": struct.pack("<Q", len(header)) + header + bytes(8),
        "tokenizer": b'{"added_tokens":%b,"model":{"vocab":%b}}' % (shape(size // 2), shape(size // 2)),
        "chat_template": value,
    }
    for part, content in parts.items():
        yield client.build_request("POST", "/v1/adapters", data={"name": "big"}, files=good | {part: content})
    rows = (b'{"messages":%b}\n' % value, b'{"text":%b}\n' % value, (b'{"prompt":%b}\n' % shape(size // 1000)) * 1000)
    for row in rows:
        named = {"file": ("rows.jsonl", row)}
        yield client.build_request("POST", "/v1/files", data={"purpose": "fine-tune"}, files=named)


def test_full_files_keep_the_budget(made: Files, server: RunningServer, bystander: Bystander, rest: float) -> None:
    faults = []
    with httpx.Client(base_url=server.url, timeout=300) as client:
        for name, shape in SHAPES.items():
            whole, half = (list(uploads(client, made, shape, size)) for size in (LARGEST, LARGEST // 2))
            for index, (large, small) in enumerate(zip(whole, half, strict=True)):
                for _ in range(3):
                    seen = [cost_of(bystander, client, large)[0]]
                    if seen[0].seconds > 1:
                        seen.append(cost_of(bystander, client, small)[0])
                    if keeps(seen, rest):
                        break
                else:
                    faults.append((name, index, seen))
                    print(name, index, *seen, sep="\n  ", flush=True)
    assert not faults


def test_the_cost_of_many_samples_is_bounded(server: RunningServer, bystander: Bystander, rest: float) -> None:
    prompt = [5] * (CONTEXT - 2)
    body = {"model": BASE, "prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 20}
    with httpx.Client(base_url=server.url, timeout=300) as client:
        refused, code = cost(bystander, client, "POST", "/v1/completions", json.dumps(body | {"n": 128}).encode())
        assert (refused.status, code) == (400, "response_too_large")
        for more in ({"n": 6}, {"n": 32, "stream": True}, {"n": 128, "logprobs": None}):
            raw = json.dumps(body | more).encode()
            seen = [cost(bystander, client, "POST", "/v1/completions", raw)[0] for _ in range(2)]
            assert all(each.status == 200 for each in seen)
            assert max(each.memory for each in seen) <= MEMORY, (more, seen)
            assert min(each.gap for each in seen) <= GAP + rest, (more, seen)


def test_a_bias_of_all_tokens_does_not_delay_others(server: RunningServer) -> None:
    gaps: list[float] = []

    def listen() -> None:
        body = {"model": BASE, "prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=300) as answer:
            last = time.perf_counter()
            for _ in answer.iter_lines():
                now = time.perf_counter()
                gaps.append(now - last)
                last = now

    def longest_gap(body: dict[str, object]) -> float:
        gaps.clear()
        listener = threading.Thread(target=listen)
        listener.start()
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=300).status_code == 200
        listener.join()
        return max(gaps)

    every = {"logit_bias": {str(i): 1 for i in range(512)}, "stop_token_ids": [*range(3, 512)] * 500, "min_tokens": 30}
    body: dict[str, object] = {"model": BASE, "prompt": "Hi", "n": 31, "max_tokens": 30, "ignore_eos": True}
    assert longest_gap(body | every) <= GAP + max(longest_gap(body) for _ in range(2))


def test_clients_that_left_hold_nothing(made: Files, server: RunningServer) -> None:
    body = b'{"model": "tiny", "messages": [' + b'{"role":"user","content":"a"},' * 70_000 + b"{}]}"
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    for _ in range(8):
        with contextlib.closing(_connect(server)) as connection:
            connection.sendall(head % len(body) + body)
    since = time.perf_counter()
    honest = {"model": BASE, "prompt": "Hi", "user": "u" * 300_000, "max_tokens": 1}
    assert httpx.post(f"{server.url}/v1/completions", json=honest, timeout=60).status_code == 200
    assert made.upload(server, "other", "green").status_code == 201
    assert time.perf_counter() - since < 10


def test_uploads_that_drip_give_their_slots_back(made: Files, server: RunningServer) -> None:
    slots = Settings().max_uploads
    head = (
        b"POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    )
    connections = [_connect(server) for _ in range(slots)]
    for connection in connections:
        connection.sendall(head)
    ended = threading.Event()

    def drip() -> None:
        while not ended.wait(2):
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.sendall(b"-")

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        assert made.upload(server, "honest", "blue").status_code == 201
    finally:
        ended.set()
        dripping.join()
        for connection in connections:
            connection.close()


def test_it_stops_when_told_with_bodies_waiting(server: RunningServer) -> None:
    body = b'{"model": "tiny", "messages": [' + b'{"role":"user","content":"a"},' * 70_000 + b"{}]}"
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    for _ in range(8):
        with contextlib.closing(_connect(server)) as connection:
            connection.sendall(head % len(body) + body)
    server.process.terminate()
    assert server.process.wait(15) == 0


def _connect(server: RunningServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)
