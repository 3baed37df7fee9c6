"""A merged adapter on a real server, in batches with unmerged ones, compared with the exported checkpoint."""

import asyncio
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch

from tests.server.engine.test_merges import rounded
from tests.server.engine.test_parity import peft_logprobs
from tests.server.http.test_variants import PROMPT, score, upload
from tests.support.running import BASE, RunningServer, eventually
from tests.support.tiny import tiny_adapter, tiny_model

NAMES = ("merged", "other", "third")


def has_merged_bytes(server: RunningServer, expected: int) -> bool:
    return server.metric("merged_weight_bytes") == expected


async def fetch_checkpoint(client: httpx.AsyncClient, name: str, target: Path) -> None:
    """Export a checkpoint and download every file."""
    made = await client.post(f"/v1/adapters/{name}/merge", json={"to": "checkpoint"})
    target.mkdir()
    for file in made.json()["checkpoint"]["files"]:
        (target / file["name"]).write_bytes((await client.get(f"/v1/adapters/{name}/merge/{file['name']}")).content)


async def stream(client: httpx.AsyncClient, name: str) -> list[str]:
    """Generate many tokens in single chunks; the last item is the finish reason."""
    body = {"model": name, "prompt": PROMPT, "max_tokens": 300, "temperature": 0, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        return [line async for line in response.aiter_lines() if line]


async def test_merged_and_unmerged_in_one_batch(cache_dir: Path, tmp_path: Path) -> None:
    model = rounded(tiny_model(tmp_path / "model"))
    made = {name: tiny_adapter(tmp_path / name, model, seed=seed) for seed, name in enumerate(NAMES)}
    server = RunningServer(model, tmp_path, tmp_path / "data", "--merged-bytes", "400KiB")
    try:
        server.ensure()
        async with httpx.AsyncClient(base_url=server.url, timeout=180) as client:
            for name, directory in made.items():
                await upload(client, name, directory)
            before = {name: await score(client, name) for name in (*NAMES, BASE)}
            await fetch_checkpoint(client, "merged", tmp_path / "checkpoint")
            for dtype, quantization in (("bf16", "none"), ("nf4", "nf4")):
                # Requests continue while the weights are built.
                running = asyncio.create_task(stream(client, "other"))
                merged = await client.post("/v1/adapters/merged/merge", json={"to": "resident", "dtype": dtype})
                assert merged.status_code == 201, merged.text
                assert (await running)[-1] == "data: [DONE]"
                resident = merged.json()["resident"]
                assert resident["drift"]["positions"] > 50
                assert resident["drift"]["mean_kl"] > 0  # only its presence: with random weights its size means nothing
                assert [speed["requests"] for speed in resident["decode_tokens_per_second"]] == [1, 8]
                taken = resident["bytes"]
                eventually(partial(has_merged_bytes, server, taken), 180, "the metrics")
                assert server.metric("lora_adapter_loaded", adapter_name="merged", level="merged") == 1

                alone = {name: await score(client, name) for name in before}
                scores = await asyncio.gather(*(score(client, name) for name in before))
                assert dict(zip(before, scores, strict=True)) == alone
                unmerged = {name: before[name] for name in before if name != "merged"}
                assert {name: alone[name] for name in unmerged} == unmerged
                expected = peft_logprobs(tmp_path / "checkpoint", None, quantization, PROMPT)
                ours = torch.tensor(alone["merged"][: len(expected)])
                torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)

                if dtype == "bf16":
                    refused = await client.post("/v1/adapters/other/merge", json={"to": "resident", "dtype": "bf16"})
                    assert refused.status_code == 507
                    assert "--merged-bytes" in refused.json()["error"]["message"]
                    assert (await client.delete("/v1/adapters/merged/merge?to=resident")).status_code == 200
                    assert await score(client, "merged") == before["merged"]
            await check_its_end(server, client, made, before)
    finally:
        server.stop()


async def check_its_end(
    server: RunningServer, client: httpx.AsyncClient, made: dict[str, Path], before: dict[str, Any]
) -> None:
    """Publishing other content under the name ends its merge, and so does the engine's end."""
    await upload(client, "merged", made["third"])
    assert (await client.get("/v1/adapters/merged")).json()["merged"] is None
    assert await score(client, "merged") == before["third"]
    eventually(lambda: server.metric("merged_weight_bytes") < 200_000, 180, "the merge is gone")
    rolled_back = await client.post("/v1/adapters/merged/rollback")
    assert rolled_back.status_code == 200
    assert await score(client, "merged") == before["merged"], "a restart does not restore a merge"

    made_again = await client.post("/v1/adapters/merged/merge", json={"to": "resident", "dtype": "nf4"})
    assert made_again.status_code == 201
    pid = server.engine_pid
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: server.wait_ready()["engine_pid"] not in (pid, None), 180, "another engine")
    assert (await client.get("/v1/adapters/merged")).json()["merged"] is None
    assert await score(client, "merged") == before["merged"]
