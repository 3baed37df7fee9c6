"""Tiny random models of every type that transformers registers, with settings like those of real ones except for size.

A config is the class's own default with small sizes, also in nested configs: the specifics of a family
(windows, norms, scalings, tied matrices, experts) keep their defaults.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
WRAPPERS = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

VOCAB = 512
LAYERS = 2
# Attribute of a config -> tiny value, applied if the class has the attribute.
SIZES: dict[str, int] = (
    dict.fromkeys(
        ["hidden_size", "d_model", "n_embd", "emb_dim", "embed_dim", "dim_model", "dim", "embedding_size"], 64
    )
    | dict.fromkeys(
        ["word_embed_proj_dim", "d_embed", "hidden_dim", "output_dim", "projection_dim", "out_hidden_size"], 64
    )
    | dict.fromkeys(["intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff", "dim_ff", "n_inner", "d_inner"], 128)
    | dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "mlp_hidden_size", "intermediate_size_mlp"], 128)
    | dict.fromkeys(
        ["moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"], 32
    )
    | dict.fromkeys(
        ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"], LAYERS
    )
    | dict.fromkeys(["num_encoder_layers", "num_decoder_layers", "depth"], LAYERS)
    | dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], 4)
    | dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4)
    | dict.fromkeys(["head_dim", "attention_head_size", "global_head_dim", "kv_channels", "dim_head", "d_head"], 16)
    | dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length"], 512)
    | dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCAB)
    | dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4)
    | dict.fromkeys(["num_experts_per_tok", "moe_top_k", "experts_per_token", "moe_k"], 2)
    | {
        "encoder_hash_byte_group_vocab": 1024,
        "hidden_size_global": 64,
        "sliding_window": 32,
        "rotary_dim": 8,
        "hidden_size_per_layer_input": 32,
        "num_kv_shared_layers": 0,
        "lru_width": 64,
        "attention_window_size": 32,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "image_size": 32,
        "patch_size": 8,
    }
)
DERIVED = {"head_dim": 16, "num_key_value_heads": 4}  # applied if the class has None
LISTS_BY_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "layers_block_type",
    "activation_sparsity_pattern",
)
# Further settings of a type, where its parts must fit together or its default lacks a feature.
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
NEMOTRON = {
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
}
GEMMA4 = {  # all features at once: K = V in full layers, fewer and larger heads there, layers that read others' keys
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "attention_k_eq_v": True,
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 30.0,
    "per_layer_config": {layer: {"head_dim": 32, "num_key_value_heads": 1} for layer in (1, 3)},
}
COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    },
}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}  # half a head
MULTIMODAL_ROPE = (
    *("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "paddleocr_vl", "glm4v", "glm46v", "glm_ocr", "glmga"),
    "video_llama_3",
)
OTHER: dict[str, dict[str, Any]] = {
    **{name: {"text_config": {"rope_parameters": MROPE}} for name in MULTIMODAL_ROPE},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": MROPE | {"mrope_section": [3, 3, 2]}}},
    "glm4v_moe": {"text_config": {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}}},
    "laguna": {"num_attention_heads_per_layer": [4] * LAYERS},
    "hunyuan_vl": {"text_config": {"rope_parameters": MROPE | {"mrope_section": [2, 2, 2, 2]}}},
    "chameleon": {"vocabulary_map": {"<image>": 5, "IMGIMGAZ": 6}},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6, "<|visual token 000000|>": 7}},
    "mllama": {"text_config": {"cross_attention_layers": [1]}},
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1]},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "cohere_compass_text": COMPASS,
    "cohere_compass": {"text_config": COMPASS},
    "dbrx": {
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [128] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": {k: v for k, v in GEMMA4.items() if k not in {"attention_k_eq_v", "use_double_wide_mlp"}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 128},
    "granitemoehybrid": MAMBA | {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "muse_spark": {"audio_config": {"patch_sizes": [8, 8], "hidden_sizes": [64, 64], "depths": [1, 1]}},
    "nemotron_h": NEMOTRON,
    "nemotron_h_omni": {"text_config": NEMOTRON},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 32], "attn_layers": ["local", "lsh"]},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_head_dim": 32,
        "attention_hidden_size": 128,
        "mamba_dt_rank": 8,
    },
    "zamba2": {"attention_head_dim": 32, "attention_hidden_size": 128},
}

# Further published settings of a type, by the names of the type and the variant.
VARIANTS: dict[str, dict[str, Any]] = {
    "falcon_h1, normed": {"mamba_rms_norm": True, "mamba_n_groups": 2, "ssm_multipliers": [0.4, 1.5, 0.7, 1.2, 0.5]},
    "granitemoehybrid, dense": {"num_local_experts": 0, "layer_types": ["attention"] * LAYERS},  # Granite 4 micro
    "nemotron_h, latent": {"moe_latent_size": 32},  # Nemotron 3 Super
    "phi3, longrope": {
        "original_max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 256,
            "short_factor": [1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2],
            "long_factor": [1.0, 1.3, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0],
        },
    },
}


def tiny_config(model_type: str) -> Any:
    """The config of a tiny model of this type or variant. Raises the errors of the class if it cannot have one."""
    model_type, variant = model_type.partition(",")[0], VARIANTS.get(model_type, {})
    if model_type == "gemma4_assistant":  # its own default is not accepted by it
        text = tiny_config("gemma4_text").to_dict() | {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "use_double_wide_mlp": False,
            "num_kv_shared_layers": 4,
        }
        made: Any = CONFIG_MAPPING[model_type]
        return made(text_config=text)
    settings = _shrunk(CONFIG_MAPPING[model_type]().to_dict())
    for name, value in OTHER.get(model_type, {}).items():
        nested = name in ("text_config", "audio_config", "adapter_config")
        settings[name] = settings[name] | value if nested else value
    return CONFIG_MAPPING[model_type](**settings | variant)


def _shrunk(default: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, value in default.items():
        if name in ("transformers_version", "architectures", "dtype"):
            continue
        if value is None and name in DERIVED:
            settings[name] = DERIVED[name]
            continue
        if name == "rope_parameters" and not value:
            continue
        if name == "rope_parameters" and "mrope_section" in value:
            value = value | {"mrope_section": MROPE["mrope_section"]}
        if name == "per_layer_config" and value:
            settings[name] = {LAYERS - 1: {key: 2 * SIZES[key] for key in next(iter(value.values())) if key in SIZES}}
        elif isinstance(value, dict) and name.endswith("config"):
            settings[name] = _shrunk(value)
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool) and value:
            settings[name] = SIZES[name]
        elif name in SIZES and isinstance(value, list):
            settings[name] = [SIZES[name]] * LAYERS
        elif name == "num_key_value_heads" and value:
            heads = default.get("num_attention_heads") or value
            settings[name] = 4 if value == heads else 1 if value == 1 else 2
        elif name in LISTS_BY_LAYER and isinstance(value, list) and value:
            kinds = list(dict.fromkeys(value))[:LAYERS]
            settings[name] = [*kinds, *[kinds[-1]] * (LAYERS - len(kinds))]
        elif name.endswith("_token_id") and isinstance(value, int) and value >= VOCAB:
            settings[name] = 2
        elif name.endswith("_token_id") and isinstance(value, list):
            settings[name] = [min(token, 2 + i) for i, token in enumerate(value)]
        elif name == "is_decoder":
            settings[name] = True  # for families that are encoders by default
        else:
            settings[name] = value
    return settings


def auto_class(model_type: str) -> Any:
    """The transformers class that loads a type: for wrappers of text and images, or for causal models."""
    return transformers.AutoModelForImageTextToText if model_type in WRAPPERS else transformers.AutoModelForCausalLM


def tiny_family(model_type: str, path: Path, seed: int = 0) -> None:
    """Write a tiny random model of this type to `path`. Raises the errors of transformers if there is none."""
    config = tiny_config(model_type)
    torch.manual_seed(seed)
    model = auto_class(model_type).from_config(config).float()
    with torch.no_grad():  # with the small default initialisation all logits are alike
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or (parameter.dim() == 3 and "experts." in name):
                parameter.normal_(0.0, 1.0 if "embed" in name or "wte" in name else 1.5 * parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    model.save_pretrained(path)
