"""A merged checkpoint, loaded by transformers, compared with PEFT's own merge."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

from adapters.offline.factors import Factors
from adapters.offline.merge import merge
from adapters.peft_format.fields import AdapterError
from tests.support.tiny import tiny_adapter, tiny_model


def factors_of(adapter: Path) -> dict[str, Factors]:
    """The factors that PEFT saved."""
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): Factors(
            a.float(), tensors[name.replace("lora_A", "lora_B")].float(), config["lora_alpha"] / config["r"]
        )
        for name, a in tensors.items()
        if "lora_A" in name
    }


@pytest.mark.parametrize("shard", ["5GB", "100KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_what_peft_merges_and_transformers_loads(tmp_path: Path, shard: str, tied: bool) -> None:
    model = tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    adapter = tiny_adapter(tmp_path / "adapter", model)
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sharded = tmp_path / "sharded"
    plain.save_pretrained(sharded, max_shard_size=shard)
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(sharded)
    assert (len(list(sharded.glob("*.safetensors"))) > 1) == (shard == "100KB")

    target = tmp_path / "merged"
    target.mkdir()
    merge(sharded, factors_of(adapter), target)

    merged = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert merged.dtype == torch.bfloat16
    expected = peft.PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    ours, theirs = merged.state_dict(), expected.state_dict()
    assert set(ours) == set(theirs)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name].float(), weight, rtol=2**-8, atol=1e-6)
    text = "The quick brown fox"
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    assert tokenizer(text).input_ids == transformers.AutoTokenizer.from_pretrained(model)(text).input_ids


def test_a_module_without_a_weight_in_the_files_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    (tmp_path / "merged").mkdir()
    stray = Factors(torch.ones(2, 4), torch.ones(4, 2), 1.0)
    with pytest.raises(AdapterError, match="no weight for 'nowhere'"):
        merge(model, {"nowhere": stray}, tmp_path / "merged")
    with pytest.raises(AdapterError, match="has shape"):
        merge(model, {"model.layers.0.self_attn.q_proj": stray}, tmp_path / "merged")
