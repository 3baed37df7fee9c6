"""Adapters with random configs, saved by PEFT: outputs equal PEFT's for every combination.

Every config here is served; refusals have their own tests. HYPOTHESIS_PROFILE=explore draws others.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.server.engine.test_whole_modules import World
from tests.support.tiny import tiny_adapter

pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore::UserWarning:peft")

# Norms with heads before tokens, scaled embeddings, tied matrices; biases and an untied head; a state.
FAMILIES = ["gemma3_text", "phi", "qwen3_5_text"]
IDS = [70, 5]  # tokens of the prompt

# Treatment of embedding and head: fields of the config, and names for `target_modules`.
tables: st.SearchStrategy[tuple[dict[str, Any], list[str]]] = st.sampled_from(
    [
        ({}, []),
        ({}, ["embed_tokens"]),
        ({}, ["lm_head"]),
        ({}, ["embed_tokens", "lm_head"]),
        ({"modules_to_save": ["embed_tokens"]}, []),
        ({"modules_to_save": ["lm_head", "norm"]}, ["lm_head"]),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, []),
        ({"modules_to_save": ["layernorm"]}, ["embed_tokens"]),
        ({"trainable_token_indices": IDS}, []),
        ({"trainable_token_indices": {"lm_head": IDS}}, []),
        ({"trainable_token_indices": IDS, "modules_to_save": ["norm"]}, []),
    ]
)
linears = st.sampled_from(
    [
        ["q_proj", "v_proj"],
        ["k_proj", "down_proj", "fc1", "in_proj_qkv"],
        ["self_attn.q_proj", "dense", "o_proj"],
        r".*\.(q|k)_proj",
        r"^(?!.*visual).*(?:q_proj|up_proj|fc2).*$",
        "all-linear",
    ]
)
patterns = st.sampled_from(
    ["q_proj", r".*\.1\..*", "layers.0.self_attn.k_proj", r"[a-z]_proj", r"layers\.\d{,2}\..*", "^model.*"]
)
rest = st.fixed_dictionaries(
    {"r": st.sampled_from([1, 3, 8, 17]), "lora_alpha": st.sampled_from([1, 7, 32])},
    optional={
        "use_rslora": st.just(True),
        "use_dora": st.just(True),
        "lora_bias": st.just(True),
        "bias": st.sampled_from(["lora_only", "none"]),
        "rank_pattern": st.dictionaries(patterns, st.integers(1, 9), min_size=1, max_size=1),
        "alpha_pattern": st.dictionaries(patterns, st.integers(1, 40), min_size=1, max_size=1),
        "exclude_modules": st.sampled_from([r".*\.0\..*mlp.*", ["up_proj"]]),
        "layers_to_transform": st.sampled_from([[0, 1], [1], 1]),
        "ensure_weight_tying": st.just(True),
        "dtype": st.sampled_from([torch.bfloat16, torch.float16]),
        "task_type": st.sampled_from(["CAUSAL_LM", None]),
    },
)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    config: dict[str, Any] = draw(rest)
    more, targets = draw(tables)
    config |= more
    chosen = draw(linears)
    if isinstance(chosen, list):
        chosen = [*chosen, *targets]
    else:  # a list's indices, in PEFT
        config.pop("layers_to_transform", None)
    if "ensure_weight_tying" in config:
        config.pop("dtype", None)  # a cast would separate tied matrices
    if "use_dora" in config:
        config.pop("lora_bias", None)
    return config | {"target_modules": chosen}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> World:
    return World(tmp_path_factory.mktemp("families"), cache_dir)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return functools.partial(tmp_path_factory.mktemp, "adapter")


@pytest.mark.parametrize("family", FAMILIES)
# Shrinking would take minutes and add nothing.
@settings(max_examples=12, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(config=configs())
def test_a_drawn_adapter_equals_pefts(family: str, config: dict[str, Any], world: World, directories: Any) -> None:
    directory = directories()
    tiny_adapter(directory, world.model(family), seed=len(str(config)), **config)
    world.check(family, directory)
