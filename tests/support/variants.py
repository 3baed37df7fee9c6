"""Every served variant of LoRA, as arguments for PEFT: one table for all tests that run them."""

from pathlib import Path
from typing import Any, NamedTuple

import transformers

from tests.support.tiny import tiny_adapter, tiny_model

BASES: dict[str, dict[str, Any]] = {
    "tied": {},
    # Biases in attention, norms on queries and keys, an untied head.
    "untied": {
        "config_class": transformers.Qwen3Config,
        "model_class": transformers.Qwen3ForCausalLM,
        "head_dim": 32,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    "fused": {"config_class": transformers.Phi3Config, "model_class": transformers.Phi3ForCausalLM},
}
INVOCATION = [300, 301, 302]
_Q = ["q_proj"]


class Variant(NamedTuple):
    """A base of `BASES`, and the arguments of `peft.LoraConfig`."""

    base: str
    config: dict[str, Any]

    def save(self, path: Path, model: Path, seed: int) -> Path:
        """An adapter of this kind, saved by PEFT."""
        return tiny_adapter(path, model, seed=seed, **self.config)


VARIANTS: dict[str, Variant] = {
    "plain": Variant("tied", {}),
    "DoRA": Variant("tied", {"use_dora": True}),
    "DoRA with patterns": Variant("tied", {"use_dora": True, "rank_pattern": {"q_proj": 3}, "use_rslora": True}),
    "lora_bias": Variant("tied", {"lora_bias": True}),
    "embedding": Variant("tied", {"target_modules": [*_Q, "embed_tokens"]}),
    "embedding alone": Variant("tied", {"target_modules": ["embed_tokens"], "r": 5}),
    "head": Variant("tied", {"target_modules": [*_Q, "lm_head"]}),
    "embedding and head": Variant("tied", {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True}),
    "embedding, tied": Variant("tied", {"target_modules": [*_Q, "embed_tokens"], "ensure_weight_tying": True}),
    "saved embedding": Variant("tied", {"target_modules": _Q, "modules_to_save": ["embed_tokens"]}),
    "saved embedding, tied": Variant(
        "tied", {"target_modules": _Q, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "saved head": Variant("tied", {"target_modules": _Q, "modules_to_save": ["lm_head"]}),
    "every norm": Variant("tied", {"target_modules": _Q, "modules_to_save": ["norm"]}),
    "last norm": Variant("tied", {"target_modules": _Q, "modules_to_save": ["model.norm"], "use_dora": True}),
    "tokens": Variant("tied", {"target_modules": _Q, "trainable_token_indices": [70, 5, 300]}),
    "tokens of the embedding": Variant(
        "tied", {"target_modules": _Q, "trainable_token_indices": {"embed_tokens": [70, 5], "lm_head": [71]}}
    ),
    "excluded": Variant("tied", {"exclude_modules": r".*\.1\..*|.*mlp.*"}),
    "all-linear": Variant("tied", {"target_modules": "all-linear", "use_dora": True}),
    "expression": Variant("tied", {"target_modules": r".*(self_attn\.[qk]_proj|embed_tokens)"}),
    "activated": Variant("tied", {"alora_invocation_tokens": INVOCATION}),
    "embedding, untied": Variant("untied", {"target_modules": [*_Q, "embed_tokens"], "use_dora": True}),
    "head, untied": Variant("untied", {"target_modules": [*_Q, "lm_head"], "use_dora": True}),
    "saved both, untied": Variant("untied", {"target_modules": _Q, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "tokens, untied": Variant(
        "untied", {"target_modules": _Q, "trainable_token_indices": {"embed_tokens": [70, 5], "lm_head": [4, 2]}}
    ),
    "trained biases": Variant("untied", {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "all biases": Variant("untied", {"target_modules": _Q, "bias": "all"}),
    "DoRA over biases": Variant("untied", {"use_dora": True, "bias": "all"}),
    "fused": Variant("fused", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "fused DoRA": Variant("fused", {"target_modules": "all-linear", "use_dora": True, "modules_to_save": ["norm"]}),
    "norms of queries": Variant("untied", {"target_modules": _Q, "modules_to_save": ["q_norm", "k_norm"]}),
}


def make_base(name: str, path: Path, **overrides: Any) -> Path:
    """One of `BASES`, small and random."""
    return tiny_model(path, **(BASES[name] | overrides))
