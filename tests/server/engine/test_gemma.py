"""The built-in Gemma 3 270M: windows, norms and the vocabulary of a real model, compared with PEFT."""

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from server.model_source import default_cache_dir, resolve
from tests.server.engine.test_parity import our_logprobs, peft_logprobs
from tests.support.offline import load_engine
from tests.support.tiny import tiny_adapter
from tests.sweep.families import tiny_family

TEXT = "The parakeets of the southern islands nest in hollow trees. Farmers there know three kinds by their calls: "


@pytest.mark.parametrize("family", ["gemma3_text", "biogpt"])
def test_a_tied_embedding_that_scales_its_rows_is_exact_in_bf16(family: str, cache_dir: Path, tmp_path: Path) -> None:
    """Real checkpoints are bf16: the matrix is then held in bf16, while rows are still scaled in fp32."""
    tiny_family(family, tmp_path / "m")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "m")
    config.tie_word_embeddings = True
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", config=config, dtype=torch.bfloat16)
    model.float().save_pretrained(tmp_path / "rounded")
    prompt = [3 + 7 * i % 500 for i in range(60)]
    engine = load_engine(tmp_path / "rounded", cache_dir, quantization="none")
    theirs = peft_logprobs(tmp_path / "rounded", None, "none", prompt)
    torch.testing.assert_close(our_logprobs(engine, None, prompt), theirs, atol=1e-3, rtol=0)


@pytest.mark.slow  # fetches 238 MB and converts them, once; the tiny gemma3_text of tests/sweep covers the same
@pytest.mark.timeout(1800)
def test_gemma_3_270m_equals_peft(cache_dir: Path, tmp_path: Path) -> None:
    model = resolve("gemma-3-270m", default_cache_dir())
    prompt = Tokenizer.from_file(str(model / "tokenizer.json")).encode(TEXT * 3).ids
    tiny_adapter(tmp_path, model, b_std=0.02)
    engine = load_engine(model, cache_dir, quantization="nf4", kv_cache_bytes=128 << 20, adapter_bytes=128 << 20)
    for adapter in (None, tmp_path):
        ours, theirs = our_logprobs(engine, adapter, prompt), peft_logprobs(model, adapter, "nf4", prompt)
        print(f"adapter {adapter is not None}: {float((ours - theirs).abs().max()):.1e}")
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
