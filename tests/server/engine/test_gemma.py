"""The built-in Gemma 3 270M as it is: windows, norms and a vocabulary of a real model, beside PEFT."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from server.engine import selfcheck
from server.model_source import default_cache_dir, resolve
from tests.server.engine.test_parity import our_logprobs, peft_logprobs
from tests.support.offline import load_engine
from tests.support.tiny import tiny_adapter

TEXT = "The parakeets of the southern islands nest in hollow trees. Farmers there know three kinds by their calls: "


@pytest.mark.slow  # fetches 238 MB and converts them, once; the tiny gemma3_text of tests/sweep is its sister
@pytest.mark.timeout(1800)
def test_gemma_3_270m_equals_peft(cache_dir: Path, tmp_path: Path) -> None:
    model = resolve("gemma-3-270m", default_cache_dir())
    prompt = Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT * 3).ids
    tiny_adapter(tmp_path, model, b_std=0.02)
    engine = load_engine(model, cache_dir, quantization="nf4", kv_cache_bytes=128 << 20, adapter_bytes=128 << 20)
    selfcheck.run(engine, tmp_path / "checked")
    for adapter in (None, tmp_path):
        ours, theirs = our_logprobs(engine, adapter, prompt), peft_logprobs(model, adapter, "nf4", prompt)
        print(f"adapter {adapter is not None}: {float((ours - theirs).abs().max()):.1e}")
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
