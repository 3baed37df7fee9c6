"""Adapters of experts: every tensor is matched, in both layouts; only configs that PEFT can train are accepted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapters.peft_format.directory import AdapterSpec, load_variants
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.inspection import inspect
from adapters.peft_format.outline import Outline
from adapters.peft_format.sizes import EXTRAS, ExpertsSize, LinearSize

PREFIX = "base_model.model."
MODULE = "model.layers.0.mlp.experts"
LINEARS = {"model.layers.0.self_attn.q_proj": LinearSize("q_proj", 8, 8)}
EXPERTS = {
    f"{MODULE}.gate_up_proj": ExpertsSize(3, 8, 24, ((f"{MODULE}.*.gate_proj",), (f"{MODULE}.*.up_proj",))),
    f"{MODULE}.down_proj": ExpertsSize(3, 12, 8, ((f"{MODULE}.*.down_proj",),)),
}
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
ATTENTION = {"self_attn.q_proj.lora_A": (2, 8), "self_attn.q_proj.lora_B": (8, 2)}
FUSED = {
    "mlp.experts.base_layer.lora_A": (3 * 2, 8),
    "mlp.experts.base_layer.lora_B": (24, 2 * 3),
    "mlp.experts.lora_A": (3 * 2, 12),
    "mlp.experts.lora_B": (8, 2 * 3),
}
SINGLE = {
    f"mlp.experts.{expert}.{part}.{letter}": shape
    for expert in range(3)
    for part, ins, outs in (("gate_proj", 8, 12), ("up_proj", 8, 12), ("down_proj", 12, 8))
    for letter, shape in (("lora_A", (2, ins)), ("lora_B", (outs, 2)))
}
SINGLE_MODULES = ["gate_proj", "up_proj", "down_proj"]


def adapter(path: Path, shapes: Mapping[str, tuple[int, ...]], layers: str = "model.layers", **config: Any) -> Path:
    path.mkdir()
    tensors = {f"{PREFIX}{layers}.0.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, path / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (path / "adapter_config.json").write_text(json.dumps(fields | config))
    return path


def check(directory: Path, experts: dict[str, ExpertsSize] | None = None) -> AdapterSpec:
    outline = Outline(experts=EXPERTS if experts is None else experts)
    return inspect(directory, LINEARS, "Qwen3MoeForCausalLM", outline)


def test_parameters_are_named_from_the_outermost_in(tmp_path: Path) -> None:
    spec = check(adapter(tmp_path / "a", ATTENTION | FUSED, target_parameters=BOTH))
    assert spec.variants.names == ["experts"]
    assert spec.variants.experts[f"{MODULE}.down_proj"].a == f"{PREFIX}{MODULE}.lora_A.weight"
    assert spec.variants.experts[f"{MODULE}.gate_up_proj"].a == f"{PREFIX}{MODULE}.base_layer.lora_A.weight"
    assert (spec.rank, set(spec.modules), spec.dtype) == (2, set(LINEARS), "float32")
    assert AdapterSpec.parse(json.dumps(spec.__dict__, default=lambda value: value.__dict__)) == spec
    assert len(load_variants(tmp_path / "a", spec)) == 4
    one = {name: FUSED[name] for name in ("mlp.experts.lora_A", "mlp.experts.lora_B")}
    alone = check(adapter(tmp_path / "one", one, target_modules=[], target_parameters=BOTH[1:]))
    assert set(alone.variants.experts) == {f"{MODULE}.down_proj"}
    assert alone.digest != spec.digest


def test_single_experts_are_parts_of_the_parameter(tmp_path: Path) -> None:
    directory = adapter(tmp_path / "a", SINGLE, target_modules=SINGLE_MODULES)
    spec = check(directory)
    up = spec.variants.experts[f"{MODULE}.*.up_proj"]
    assert (up.parameter, up.part, up.parts) == (f"{MODULE}.gate_up_proj", 1, 2)
    assert len(load_variants(directory, spec)) == len(SINGLE)
    gate_alone = {name: shape for name, shape in SINGLE.items() if "gate_proj" in name}
    assert set(check(adapter(tmp_path / "gate", gate_alone, target_modules=["gate_proj"])).variants.experts) == {
        f"{MODULE}.*.gate_proj"
    }


def test_memory_is_counted_only_where_experts_are_adapted(tmp_path: Path) -> None:
    assert EXTRAS not in check(adapter(tmp_path / "none", ATTENTION)).rows()
    fused = check(adapter(tmp_path / "fused", FUSED, target_modules=[], target_parameters=BOTH)).variants.device_bytes
    assert fused == 4 * 6 * (8 + 24 + 12 + 8)
    single = check(adapter(tmp_path / "single", SINGLE, target_modules=SINGLE_MODULES)).variants.device_bytes
    assert single == 4 * 6 * (2 * (8 + 24) + 12 + 8)  # gate and up each hold zeros for the other's outputs


def test_experts_of_a_text_model_within_a_wrapper_are_found(tmp_path: Path) -> None:
    for name, shapes, config in (
        ("fused", FUSED, {"target_parameters": BOTH, "target_modules": []}),
        ("single", SINGLE, {"target_modules": SINGLE_MODULES}),
    ):
        spec = check(adapter(tmp_path / name, shapes, "model.language_model.layers", **config))
        assert {module.parameter for module in spec.variants.experts.values()} == set(EXPERTS)


@pytest.mark.parametrize(
    ("shapes", "config", "param"),
    [
        (FUSED, {"target_modules": [], "lora_dropout": 0.1}, "lora_dropout"),
        (FUSED, {"target_modules": [], "fan_in_fan_out": True}, "fan_in_fan_out"),
        (FUSED, {"target_modules": [], "use_dora": True}, "use_dora"),
        (FUSED, {"target_modules": [], "lora_bias": True}, "lora_bias"),
        (FUSED, {"target_modules": [], "alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        (FUSED, {"target_modules": [], "r": 3}, f"{PREFIX}{MODULE}.base_layer.lora_A.weight"),
        (FUSED, {}, f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"),
        (FUSED, {"target_modules": [], "target_parameters": ["experts.w1"]}, "target_parameters"),
        (FUSED, {"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_parameters"),
        (FUSED, {"target_modules": [], "target_parameters": ["experts.down_proj_bias"]}, "target_parameters"),
        (FUSED, {"target_modules": [], "target_parameters": "experts.down_proj"}, "target_parameters"),
        (ATTENTION | FUSED, {"target_parameters": []}, f"{PREFIX}{MODULE}.base_layer.lora_A.weight"),
        (SINGLE, {"target_modules": SINGLE_MODULES, "target_parameters": [], "use_dora": True}, "use_dora"),
        (
            SINGLE,
            {"target_modules": SINGLE_MODULES, "target_parameters": [], "rank_pattern": {"experts.1.up_proj": 3}},
            "rank_pattern",
        ),
        (SINGLE, {"target_modules": r".*\.experts\.[01]\..*", "target_parameters": []}, "target_modules"),
    ],
)
def test_a_refusal_names_the_culprit(
    shapes: dict[str, tuple[int, ...]], config: dict[str, Any], param: str, tmp_path: Path
) -> None:
    directory = adapter(tmp_path / "a", shapes, **({"target_parameters": BOTH} | config))
    with pytest.raises(AdapterError) as fault:
        check(directory)
    assert fault.value.param == param


def test_a_base_without_experts_is_told_so(tmp_path: Path) -> None:
    directory = adapter(tmp_path / "a", FUSED, target_modules=[], target_parameters=BOTH)
    with pytest.raises(AdapterError, match="matches no experts of the base"):
        check(directory, {})


def test_an_entry_that_matches_nothing_is_a_warning_beside_others(tmp_path: Path) -> None:
    directory = adapter(tmp_path / "a", ATTENTION | FUSED, target_parameters=[*BOTH, "experts.w1"])
    assert any("'experts.w1', which matches no experts" in warning for warning in check(directory).warnings)
