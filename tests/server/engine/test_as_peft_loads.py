"""Adapters found in practice, compared with PEFT: names of other families, files of other trainers, image towers."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapters.offline.factors import read_factors
from adapters.offline.merge import merge
from adapters.peft_format.inspection import Check, inspect_adapter
from adapters.peft_format.outline import Outline
from adapters.peft_format.text import NO_TEXT
from server.engine import selfcheck
from server.engine.engine import Engine
from server.engine.merge_builder import MergeBuilder
from server.messages.protocol import AdapterRef, Done, Merge
from server.registry.publish import outline_of
from tests.server.engine.test_parity import our_logprobs, peft_logprobs
from tests.support.offline import load_engine, publish, request, run
from tests.support.tiny import VOCAB, tiny_adapter, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore::UserWarning:peft")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROMPT = torch.randint(3, 490, (40,), generator=torch.Generator().manual_seed(1)).tolist()
PROMPT[5], PROMPT[9] = 70, 5  # trained tokens
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "sliding_window": 32,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
BASES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2},
    "gpt2": {
        "config_class": transformers.GPT2Config,
        "model_class": transformers.GPT2LMHeadModel,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
    },
    "gpt_neox": {
        "config_class": transformers.GPTNeoXConfig,
        "model_class": transformers.GPTNeoXForCausalLM,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "phi": {
        "config_class": transformers.PhiConfig,
        "model_class": transformers.PhiForCausalLM,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "gemma3": {
        "config_class": transformers.Gemma3Config,
        "model_class": transformers.Gemma3ForConditionalGeneration,
        "text_config": TEXT,
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": VOCAB - 1,
        "boi_token_index": VOCAB - 2,
        "eoi_token_index": VOCAB - 3,
    },
}


class World:
    """Bases, with an engine over each."""

    def __init__(self, root: Path, cache_dir: Path) -> None:
        self._root = root
        self._cache = cache_dir
        self.engine = cache(self._engine)

    def model(self, name: str) -> Path:
        path = self._root / name
        return path if path.exists() else tiny_model(path, **BASES[name])

    def _engine(self, name: str) -> Engine:
        return load_engine(self.model(name), self._cache, quantization="none", adapter_bytes=32 << 20)

    def check(self, name: str, directory: Path) -> list[str]:
        """Compare the adapter with PEFT; return the warnings of its receipt."""
        engine = self.engine(name)
        ours = our_logprobs(engine, directory, PROMPT)
        torch.testing.assert_close(ours, peft_logprobs(self.model(name), directory, "none", PROMPT), atol=1e-3, rtol=0)
        assert (ours - our_logprobs(engine, None, PROMPT)).abs().max() > 0.01, "the adapter must have an effect"
        return list(json.loads((directory / "spec.json").read_text())["warnings"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> World:
    return World(tmp_path_factory.mktemp("bases"), cache_dir)


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any] = lambda t: None, **config: Any) -> None:
    fields = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(fields | config))
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


# --- families ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "config"),
    [
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True, "use_dora": True}),
        ("gpt2", {"target_modules": "all-linear", "modules_to_save": ["wte"]}),
        ("gpt2", {"target_modules": ["c_fc"], "trainable_token_indices": [70, 5], "bias": "all"}),
        ("llama", {"target_modules": ["q_proj"], "fan_in_fan_out": True}),
        ("gpt_neox", {"target_modules": ["query_key_value", "embed_in"]}),
        ("gpt_neox", {"target_modules": ["dense_h_to_4h", "lm_head"], "use_dora": True}),
        ("gpt_neox", {"target_modules": ["dense"], "modules_to_save": ["embed_in", "lm_head"]}),
        ("gpt_neox", {"target_modules": ["dense"], "trainable_token_indices": {"embed_in": [70, 5], "lm_head": [4]}}),
        ("phi", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}),
        ("phi", {"target_modules": ["q_proj", "lm_head"], "bias": "lora_only"}),
        ("phi", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("phi", {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [70, 5]}}),
        ("gemma3", {"target_modules": ["q_proj", "v_proj"]}),
        ("gemma3", {"target_modules": "all-linear", "exclude_modules": r".*vision_tower.*"}),
        ("gemma3", {"target_modules": "all-linear", "bias": "all"}),
        ("gemma3", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"]}),
    ],
    ids=str,
)
def test_other_families_names_and_shapes(base: str, config: dict[str, Any], world: World, tmp_path: Path) -> None:
    tiny_adapter(tmp_path, world.model(base), **config)
    warnings = world.check(base, tmp_path)
    towers = [warning for warning in warnings if "vision_tower" in warning]
    assert bool(towers) == (base == "gemma3" and any("vision_tower" in name for name in load_file(tmp_path / WEIGHTS)))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gpt2_passes_the_self_check_and_its_files_may_lack_the_models_prefix(
    quantization: str, world: World, cache_dir: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(world.model("gpt2"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(short, model / "model.safetensors", metadata={"format": "pt"})
    engine = load_engine(model, cache_dir, quantization=quantization)
    selfcheck.run(engine, tmp_path)
    ready = engine.ready()
    assert ready.renamed["wte.weight"] == "transformer.wte.weight"
    outline = outline_of(Outline.read(model), ready)
    assert (outline.embedding, outline.head, outline.tied) == ("transformer.wte", "lm_head", True)
    assert "transformer.ln_f.weight" in outline.parameters


def test_a_transposed_base_is_not_merged_into(world: World, tmp_path: Path) -> None:
    """c_proj is square, so its shape does not reveal the transposition."""
    engine = world.engine("gpt2")
    reference = publish(engine, tiny_adapter(tmp_path, world.model("gpt2"), target_modules=["attn.c_proj"]))
    builder = MergeBuilder(engine, Outline.read(world.model("gpt2")))
    builder.handle(Merge(id="m", adapter=reference, dtype="bf16", prompts=[[1, 2]]))
    while not builder.idle:
        builder.run_piece() if builder.ready else engine.step()
    [reply] = builder.take_replies()
    assert isinstance(reply, Done)
    assert "transposed" in str(reply.error)


@pytest.mark.parametrize(
    ("base", "targets"), [("gpt2", ["c_attn", "attn.c_proj"]), ("gemma3", ["q_proj", "down_proj"])]
)
def test_a_merged_checkpoint_of_other_names_and_shapes(
    base: str, targets: list[str], world: World, tmp_path: Path
) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", world.model(base), target_modules=targets)
    ready = world.engine(base).ready()
    publish(world.engine(base), adapter)
    (tmp_path / "merged").mkdir()
    factors = read_factors(adapter)
    merge(world.model(base), factors, tmp_path / "merged", renamed=ready.renamed, transposed=ready.transposed)
    plain = transformers.AutoModelForCausalLM.from_pretrained(world.model(base), dtype=torch.float32)
    expected: Any = peft.PeftModel.from_pretrained(plain, adapter)
    theirs = expected.merge_and_unload().state_dict()
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for name in factors:
        torch.testing.assert_close(ours[f"{name}.weight"].float(), theirs[f"{name}.weight"], rtol=2**-8, atol=1e-6)


# --- other trainers' files -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Unexpected keyword")  # PEFT's warnings, too
def test_entries_without_effect_and_unknown_fields_are_warnings(world: World, tmp_path: Path) -> None:
    tiny_adapter(tmp_path, world.model("llama"), target_modules=["q_proj", "up_proj"])
    edit(
        tmp_path,
        target_modules=["q_proj", "up_proj", "query_key_value", "c_attn"],
        rank_pattern={"c_attn": 3},
        alpha_pattern={"query_key_value": 5},
        modules_to_save=["classifier"],
        unsloth_version="2026.1",
        train_config={"lora_plus_ratio": 16},
    )
    assert [warning.partition(",")[0] for warning in world.check("llama", tmp_path)] == [
        "config has the unknown field 'unsloth_version'",
        "config has the unknown field 'train_config'",
        "rank_pattern has 'c_attn'",
        "alpha_pattern has 'query_key_value'",
        "target_modules has 'c_attn'",
        "modules_to_save has 'classifier'",
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_in_other_dtypes(dtype: torch.dtype, world: World, tmp_path: Path) -> None:
    source = tiny_adapter(tmp_path / "source", world.model("llama"))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / WEIGHTS).items()}
    save_file(tensors, source / WEIGHTS)
    directory = shutil.copytree(source, tmp_path / "published")
    engine = world.engine("llama")
    ready = engine.ready()
    spec = inspect_adapter(Check(directory, ready.linears, ready.architecture, None, NO_TEXT))
    spec.save(directory)
    single = request("a", PROMPT, AdapterRef(spec.digest, str(directory)), max_tokens=0, prompt_logprobs=0)
    ours = [entry.logprob for entry in run(engine, [single])["a"].prompt_logprobs if entry is not None]
    expected = peft_logprobs(world.model("llama"), source, "none", PROMPT)
    torch.testing.assert_close(torch.tensor(ours), expected, atol=1e-3, rtol=0)


# --- vocabularies ------------------------------------------------------------------------------------

FEWER = 500


def resized(model: Path, tokens: int) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    base.resize_token_embeddings(tokens)
    return base


def save_resized(path: Path, model: Path, tokens: int, **config: Any) -> Path:
    """A random adapter of the base with a resized vocabulary, saved by PEFT."""
    base = resized(model, tokens)
    torch.manual_seed(0)
    with torch.no_grad():
        for table in (base.get_input_embeddings(), base.get_output_embeddings()):
            table.weight[VOCAB:].normal_(0.0, 1.0)
            if getattr(table, "bias", None) is not None:
                table.bias[VOCAB:].normal_(0.0, 1.0)
    wrapped: Any = peft.get_peft_model(base, peft.LoraConfig(**({"target_modules": ["q_proj"]} | config)))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                parameter.add_((0.3 if "lora_" in name else 0.05) * torch.randn_like(parameter))
    wrapped.save_pretrained(str(path), save_embedding_layers=True)
    return path


def resized_logprobs(model: Path, adapter: Path, tokens: int) -> torch.Tensor:
    wrapped = peft.PeftModel.from_pretrained(resized(model, tokens), adapter)
    with torch.no_grad():
        logits = wrapped(torch.tensor([PROMPT])).logits[0]
    assert logits.shape[1] == tokens
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]


RESIZED: dict[str, dict[str, Any]] = {
    "frozen": {},
    "adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "adapted embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "DoRA": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved head": {"modules_to_save": ["lm_head"], "bias": "all"},
    "tokens": {"trainable_token_indices": [70, 5]},
}


@pytest.mark.parametrize("tokens", [FEWER, VOCAB + 3])
@pytest.mark.parametrize("base", ["llama", "phi"])
@pytest.mark.parametrize("kind", RESIZED)
def test_a_vocabulary_of_another_size(base: str, kind: str, tokens: int, world: World, tmp_path: Path) -> None:
    """Shrunk to the length of the tokenizer, as many scripts do; and on a head with a bias (phi)."""
    if (base, kind) == ("phi", "adapted embedding"):
        pytest.skip("PEFT saves no head beside an adapted embedding: only a tied one is whole")
    save_resized(tmp_path, world.model(base), tokens, **RESIZED[kind])
    ours = our_logprobs(world.engine(base), tmp_path, PROMPT)
    torch.testing.assert_close(ours, resized_logprobs(world.model(base), tmp_path, tokens), atol=1e-3, rtol=0)


def test_tokens_that_an_adapter_lacks_are_never_drawn(world: World, tmp_path: Path) -> None:
    engine = world.engine("llama")
    reference = publish(engine, save_resized(tmp_path, world.model("llama"), FEWER))
    warnings = json.loads((tmp_path / "spec.json").read_text())["warnings"]
    assert warnings[0] == f"the weights have {VOCAB - FEWER} tokens fewer than the base: these are never drawn"
    sampling: dict[str, Any] = {
        "temperature": 2.0,
        "max_tokens": 60,
        "min_tokens": 3,
        "stop_token_ids": [VOCAB - 1],
        "seed": 1,
    }
    requests = [request("adapter", PROMPT, reference, **sampling), request("base", PROMPT, **sampling)]
    answers = run(engine, requests)
    assert answers["adapter"].error is None
    assert max(answers["adapter"].tokens) < FEWER <= max(answers["base"].tokens)
