"""Whole norms, routers, biases and embeddings in adapters, on bases where these differ from Llama's.

Compared with PEFT in a batch, for prompts and decoded tokens; refused by name where a batch cannot mix them.
"""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from adapters.peft_format.fields import AdapterError
from server.engine.engine import Engine
from tests.server.engine.test_parity import peft_logprobs
from tests.support.offline import load_engine, publish, request, run
from tests.support.tiny import tiny_adapter
from tests.sweep.families import tiny_family

pytestmark = pytest.mark.filterwarnings(
    "ignore::peft.utils.warning.PeftWarning",
    "ignore::UserWarning:peft",
    "ignore:.*did not match any targeted module",  # PEFT looks for modules, so patterns for parameters match none
)

PROMPT = torch.randint(3, 490, (23,), generator=torch.Generator().manual_seed(1)).tolist()
PROMPT[5], PROMPT[9] = 70, 5  # trained tokens
Q, IDS = ["q_proj"], [70, 5]


class World:
    """Tiny models of any family in bf16, as real ones are, with an engine over each."""

    def __init__(self, root: Path, cache_dir: Path) -> None:
        self._root = root
        self._cache = cache_dir
        self.model = cache(self._model)
        self.engine = cache(self._engine)

    def _model(self, family: str) -> Path:
        made = self._root / f"{family} fp32"
        tiny_family(family, made)
        model = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16)
        model.save_pretrained(self._root / family)
        return self._root / family

    def _engine(self, family: str) -> Engine:
        return load_engine(self.model(family), self._cache, quantization="none", adapter_bytes=32 << 20)

    def check(self, family: str, directory: Path) -> None:
        """Compare the adapter with PEFT, between requests on the base."""
        engine = self.engine(family)
        reference = publish(engine, directory)
        requests = [
            request(name, PROMPT, reference if name == "adapted" else None, max_tokens=3, prompt_logprobs=0)
            for name in ("before", "adapted", "after")
        ]
        for name, answer in run(engine, requests).items():
            assert answer.error is None
            given = [entry.logprob for entry in [*answer.prompt_logprobs, *answer.logprobs] if entry is not None]
            adapter = directory if name == "adapted" else None
            expected = peft_logprobs(self.model(family), adapter, "none", [*PROMPT, *answer.tokens])
            torch.testing.assert_close(torch.tensor(given), expected, atol=1e-3, rtol=0)

    def refusal(self, family: str, directory: Path) -> AdapterError:
        with pytest.raises(AdapterError) as caught:
            publish(self.engine(family), directory)
        return caught.value


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> World:
    return World(tmp_path_factory.mktemp("families"), cache_dir)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        # Norms of queries and keys with heads before tokens.
        ("gemma3_text", {"target_modules": Q, "modules_to_save": ["norm"]}),
        # One norm runs twice in a layer.
        ("gemma3n_text", {"target_modules": Q, "modules_to_save": ["norm"]}),
        # Linear attention with gated norms of rows of heads.
        ("qwen3_5_text", {"target_modules": ["q_proj", "in_proj_qkv"], "modules_to_save": ["norm"]}),
        # Scaled rows of the embedding.
        ("gemma3_text", {"target_modules": [*Q, "embed_tokens"]}),
        ("gemma3_text", {"target_modules": Q, "modules_to_save": ["embed_tokens"]}),
        ("gemma3_text", {"target_modules": Q, "trainable_token_indices": IDS}),
        # Routers: as part of all-linear, alone, saved whole; these have a bias.
        ("qwen3_moe", {"target_modules": "all-linear"}),
        ("mixtral", {"target_modules": [], "target_parameters": ["gate.weight"], "rank_pattern": {"gate.weight": 3}}),
        ("gpt_oss", {"target_modules": Q, "modules_to_save": ["router"]}),
        ("gpt_oss", {"target_modules": Q, "target_parameters": ["router.weight"], "bias": "lora_only"}),
        ("gpt_oss", {"target_modules": Q, "bias": "all"}),  # PEFT trains biases of experts too, but does not save them
        # A module that is saved whole is not adapted as well.
        ("qwen3_5_text", {"target_modules": [*Q, "lm_head"], "modules_to_save": ["lm_head"]}),
    ],
    ids=str,
)
def test_they_equal_pefts(family: str, config: dict[str, Any], world: World, tmp_path: Path) -> None:
    world.check(family, tiny_adapter(tmp_path, world.model(family), **config))


def test_routers_that_were_linears_of_their_own_are_the_same(world: World, tmp_path: Path) -> None:
    """As in transformers 4."""
    model = world.model("qwen3_moe")
    tiny_adapter(tmp_path / "new", model, target_modules=Q, target_parameters=["mlp.gate.weight"])
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    old = config | {"target_modules": [*Q, "gate"], "target_parameters": None}
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(old))
    engine = world.engine("qwen3_moe")
    assert publish(engine, tmp_path / "old").digest == publish(engine, tmp_path / "new").digest
    assert json.loads((tmp_path / "old" / "spec.json").read_text())["warnings"] == []


def test_new_rows_of_a_scaled_embedding_equal_pefts(world: World, tmp_path: Path) -> None:
    model = world.model("gemma3_text")
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    base.resize_token_embeddings(515)
    wrapped: Any = peft.get_peft_model(base, peft.LoraConfig(target_modules=Q, init_lora_weights=False))
    with torch.no_grad():
        base.get_input_embeddings().weight.data[512:].normal_()
    wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    prompt = [*PROMPT, 513, 514, 9]
    engine = world.engine("gemma3_text")
    single = request("a", prompt, publish(engine, tmp_path), max_tokens=0, prompt_logprobs=0)
    ours = [entry.logprob for entry in run(engine, [single])["a"].prompt_logprobs if entry is not None]
    with torch.no_grad():
        scores = wrapped(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
    expected = scores.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(ours), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("family", "config", "param", "named"),
    [
        (
            "qwen3_moe",
            {"target_modules": [], "target_parameters": ["q_proj.weight"]},
            "target_parameters",
            "q_proj.weight",
        ),
        ("falcon_h1", {"bias": "all"}, "bias", "model.layers.0.mamba.conv1d.bias"),
    ],
)
def test_unsupported_whole_modules_are_refused_by_name(
    family: str, config: dict[str, Any], param: str, named: str, world: World, tmp_path: Path
) -> None:
    tiny_adapter(tmp_path, world.model(family), **({"target_modules": Q} | config))
    refusal = world.refusal(family, tmp_path)
    assert refusal.param == param
    assert named in str(refusal)


def test_no_tokens_are_added_where_another_table_has_a_row_for_each(world: World, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(world.model("gemma4_text"), dtype=torch.float32)
    base.resize_token_embeddings(515)
    wrapped: Any = peft.get_peft_model(base, peft.LoraConfig(target_modules=Q))
    wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    refusal = world.refusal("gemma4_text", tmp_path)
    assert refusal.param == "weights"
    assert "model.embed_tokens_per_layer" in str(refusal)


@pytest.mark.parametrize(
    "config",
    [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}, {"trainable_token_indices": IDS}],
    ids=str,
)
def test_an_embedding_that_norms_its_rows_has_no_others(
    config: dict[str, Any], tmp_path: Path, cache_dir: Path
) -> None:
    """PEFT skips the norm, for all tokens, if single tokens are trained."""
    tiny_family("muse_glimmer", tmp_path / "model")
    engine = load_engine(tmp_path / "model", cache_dir, quantization="none")
    base = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    wrapped: Any = peft.get_peft_model(base, peft.LoraConfig(**({"target_modules": Q} | config)))
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="more than to look up") as caught:
        publish(engine, tmp_path / "adapter")
    assert [caught.value.param] == list(config)
