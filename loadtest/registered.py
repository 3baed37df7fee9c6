"""The cost of many registered adapters: a server with few compared with one with many.

Small distinct adapters are uploaded until each server has its number; then both get the same requests, in turn:
`GET /v1/models/{id}`, and a completion refused for its length, after its name was looked up and its prompt encoded, so
that no model runs ("admission"). Start the servers with data directories of their own, then

    python -m loadtest registered --few-url http://127.0.0.1:8000 --many-url http://127.0.0.1:8001 --model-dir DIR
"""

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import save_file

from loadtest.peers.lorakeet import upload_adapter
from loadtest.synthetic import linear_shapes

_RSS = "process_resident_memory_bytes "
_TOO_LONG = 2**30  # tokens, more than any context


async def fill(http: httpx.AsyncClient, count: int, model: Path, folder: Path) -> None:
    """Upload adapters `registered-<i>`, of rank 1 on a single linear, until the server has `count`."""
    inputs, outputs = linear_shapes(json.loads((model / "config.json").read_text()))["model.layers.0.self_attn.q_proj"]
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": r"model\.layers\.0\.self_attn\.q_proj"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for index in range(count):
        draw = np.random.default_rng(index)
        tensors = {
            f"{prefix}.lora_A.weight": draw.standard_normal((1, inputs), dtype=np.float32),
            f"{prefix}.lora_B.weight": draw.standard_normal((outputs, 1), dtype=np.float32),
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        await upload_adapter(http, f"registered-{index}", folder)


async def compare(few: httpx.AsyncClient, many: httpx.AsyncClient, counts: tuple[int, int], rounds: int) -> Any:
    """Return median seconds of each kind of request on both servers, and their ratio. `counts`: adapters of each."""
    base = (await few.get("/v1/models")).json()["data"][0]["id"]
    draw = np.random.default_rng(0)

    def name(count: int) -> str:
        return f"registered-{draw.integers(count)}"

    async def get_model(http: httpx.AsyncClient, count: int) -> None:
        answer = await http.get(f"/v1/models/{name(count)}")
        answer.raise_for_status()

    async def refused_completion(http: httpx.AsyncClient, count: int) -> None:
        body = {"model": base, "adapter_id": name(count), "prompt": "The quick brown fox", "max_tokens": _TOO_LONG}
        answer = await http.post("/v1/completions", json=body)
        assert answer.json()["error"]["code"] == "context_length_exceeded", answer.text

    requests: dict[str, Callable[[httpx.AsyncClient, int], Awaitable[None]]] = {
        "GET model": get_model,
        "admission": refused_completion,
    }
    result = {}
    for kind, ask in requests.items():
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds):
            for durations, http, count in zip(times, (few, many), counts, strict=True):
                started = time.perf_counter()
                await ask(http, count)
                durations.append(time.perf_counter() - started)
        medians = [statistics.median(durations) for durations in times]
        result[kind] = {"few": medians[0], "many": medians[1], "ratio": medians[1] / medians[0]}
    return result


async def measure(few_url: str, many_url: str, model: Path, *, few: int, many: int, rounds: int) -> dict[str, Any]:
    """Fill both servers and compare them; also measure the larger one's memory per added adapter."""
    async with (
        httpx.AsyncClient(base_url=few_url, timeout=60) as small,
        httpx.AsyncClient(base_url=many_url, timeout=60) as large,
    ):
        with tempfile.TemporaryDirectory() as folder:
            await fill(small, few, model, Path(folder))
            await fill(large, few, model, Path(folder))
            before = await _memory(large)
            await fill(large, many, model, Path(folder))
        grown = (await _memory(large) - before) / max(many - few, 1)
        started = time.perf_counter()
        listed = len((await large.get("/v1/models")).json()["data"])
        listing = time.perf_counter() - started
        medians = await compare(small, large, (few, many), rounds)
    return {"adapters": [few, many], "bytes_per_adapter": grown, "listing": [listed, listing], "seconds": medians}


async def _memory(http: httpx.AsyncClient) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return next(float(line.removeprefix(_RSS)) for line in lines if line.startswith(_RSS))


def run(few_url: str, many_url: str, model: Path, *, few: int, many: int, rounds: int) -> dict[str, Any]:
    """Run `measure` outside of an event loop."""
    return asyncio.run(measure(few_url, many_url, model, few=few, many=many, rounds=rounds))
