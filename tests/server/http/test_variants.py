"""Every variant, saved by PEFT, on a real server: prompt logprobs equal PEFT's, alone and in one mixed batch."""

import asyncio
import random
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.server.engine.test_parity import peft_logprobs
from tests.support.running import BASE, RunningServer
from tests.support.variants import BASES, INVOCATION, VARIANTS, make_base

PROMPT = [random.Random(3).randrange(3, 290) for _ in range(70)]
PROMPT[40:43] = PROMPT[20:23] = INVOCATION  # only the last invocation counts
PROMPT[5], PROMPT[60] = 70, 5  # tokens with trained rows

# PEFT's advice about merging and tied embeddings, given whenever such an adapter is created.
pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore::UserWarning:peft")


async def upload(client: httpx.AsyncClient, name: str, directory: Path) -> dict[str, Any]:
    """Upload an adapter and return its receipt."""
    files = {
        "config": (directory / "adapter_config.json").read_bytes(),
        "weights": (directory / "adapter_model.safetensors").read_bytes(),
    }
    response = await client.post("/v1/adapters", data={"name": name}, files=files)
    assert response.status_code == 201, response.text
    receipt: dict[str, Any] = response.json()
    return receipt


async def score(client: httpx.AsyncClient, name: str) -> list[float]:
    """Log-probability of each prompt token but the first, and of the generated tokens."""
    body = {"model": name, "prompt": PROMPT, "echo": True, "logprobs": 0, "max_tokens": 8, "temperature": 0}
    response = await client.post("/v1/completions", json=body | {"ignore_eos": True})
    assert response.status_code == 200, response.text
    logprobs: list[float] = response.json()["choices"][0]["logprobs"]["token_logprobs"]
    return logprobs[1:]


@pytest.mark.parametrize(
    "base", [base if base == "untied" else pytest.param(base, marks=pytest.mark.slow) for base in BASES]
)
async def test_every_variant_is_served_as_peft_computes_it(base: str, cache_dir: Path, tmp_path: Path) -> None:
    model = make_base(base, tmp_path / "model")
    kinds = {name.replace(" ", "-").replace(",", ""): name for name, made in VARIANTS.items() if made.base == base}
    made = {name: VARIANTS[kind].save(tmp_path / name, model, seed) for seed, (name, kind) in enumerate(kinds.items())}
    server = RunningServer(model, tmp_path, tmp_path / "data", "--adapter-bytes", "32MiB")
    try:
        server.ensure()
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            receipts = {name: await upload(client, name, directory) for name, directory in made.items()}
            alone = {name: await score(client, name) for name in (*made, BASE)}
            together = await asyncio.gather(*(score(client, name) for name in alone))
            assert dict(zip(alone, together, strict=True)) == alone
            for name, receipt in receipts.items():
                if set(receipt["variants"]) - {"alora"}:  # replacements have no meaning at half their weight
                    body = {"model": BASE, "prompt": "x", "adapters": [{"id": name, "weight": 0.5}]}
                    response = await client.post("/v1/completions", json=body)
                    assert (response.status_code, response.json()["error"]["param"]) == (400, "adapters.0")
    finally:
        server.stop()
    for name, directory in made.items():
        expected = peft_logprobs(model, directory, "nf4", PROMPT)
        ours = torch.tensor(alone[name][: len(expected)])
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0, msg=partial("{}: {}".format, name))
        difference = (ours - torch.tensor(alone[BASE][: len(expected)])).abs()
        assert difference.max() > 0.01, f"{name} must change the output, or this test proves nothing"
