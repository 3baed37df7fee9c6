"""Variants' demands on file and base: matched if the base has the modules, else refused with the name of the field."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapters.peft_format.directory import AdapterSpec, load_variants
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.inspection import inspect
from adapters.peft_format.outline import Outline
from adapters.peft_format.sizes import LinearSize
from tests.support.tiny import VOCAB
from tests.support.variants import VARIANTS, Variant, make_base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CLASSES = {"tied": "LlamaForCausalLM", "untied": "Qwen3ForCausalLM", "fused": "Phi3ForCausalLM"}
# PEFT's advice about merging and tied embeddings, given for every such adapter.
pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore::UserWarning:peft")


class Shelf:
    """Bases, and adapters for them, each saved once by PEFT."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models: dict[str, Path] = {}
        self.linears: dict[str, dict[str, LinearSize]] = {}

    def base(self, name: str) -> Path:
        if name not in self.models:
            self.models[name] = make_base(name, self.root / name)
            model = transformers.AutoModelForCausalLM.from_pretrained(self.models[name]).get_decoder()
            self.linears[name] = {
                f"model.{path}": LinearSize(path.rpartition(".")[2], module.in_features, module.out_features)
                for path, module in model.named_modules()
                if isinstance(module, torch.nn.Linear)
            }
        return self.models[name]

    def copy(self, variant: str, target: Path) -> Path:
        """Copy the adapter, to be spoilt."""
        made = VARIANTS[variant]
        kept = self.root / variant.replace(" ", "_")
        if not kept.exists():
            made.save(kept, self.base(made.base), 1)
        shutil.copytree(kept, target)
        return target

    def inspect(self, base: str, directory: Path) -> AdapterSpec:
        outline = Outline.read(self.base(base))
        return inspect(directory, self.linears[base], CLASSES[base], outline)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("shelf"))


def spoil(directory: Path, config: dict[str, Any], change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    fields = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(fields | config))
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_that_peft_saves_has_a_home_and_a_spec_survives_being_kept(
    name: str, shelf: Shelf, tmp_path: Path
) -> None:
    directory = shelf.copy(name, tmp_path / "adapter")
    spec = shelf.inspect(VARIANTS[name].base, directory)
    spec.save(directory)
    assert AdapterSpec.read(directory) == spec
    tensors = load_variants(directory, spec)
    saved = load_file(directory / WEIGHTS)
    rows = {tensor for module in spec.modules.values() for tensor in (module.a, module.b)}
    # The other tensors are copies of the base that PEFT saves beside adapted embeddings.
    assert {key for key in saved if not key.endswith("base_layer.weight")} == rows | tensors.keys()
    if name in ("plain", "excluded", "fused"):
        assert (spec.variants.names, spec.variants.device_bytes) == ([], 0)
    else:
        assert spec.variants.names


def test_biases_that_older_peft_did_not_save_are_the_bases(shelf: Shelf, tmp_path: Path) -> None:
    """Older PEFT looked for biases of `lora_only` under their names from before it wrapped linears."""

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".bias")]:
            del tensors[name]

    directory = shelf.copy("trained biases", tmp_path / "adapter")
    assert shelf.inspect("untied", directory).variants.names == ["bias"]
    spoil(directory, {}, drop)
    spec = shelf.inspect("untied", directory)
    assert spec.variants.names == []
    assert "no trained bias was saved" in spec.warnings[0]


@pytest.mark.parametrize(
    "name",
    ["plain", "embedding", "saved embedding", "saved head", "tokens", "saved both, untied", "tokens, untied"],
)
def test_embedding_and_head_may_be_saved_as_well(name: str, shelf: Shelf, tmp_path: Path) -> None:
    """`save_embedding_layers` adds the base's matrices, and once more those that the adapter replaces."""
    spoken_for = shelf.inspect(VARIANTS[name].base, shelf.copy(name, tmp_path / "adapter"))
    base = transformers.AutoModelForCausalLM.from_pretrained(shelf.base(VARIANTS[name].base), dtype=torch.float32)
    loaded: Any = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    loaded.save_pretrained(tmp_path / "whole", save_embedding_layers=True)
    added = load_file(tmp_path / "whole" / WEIGHTS).keys() - load_file(tmp_path / "adapter" / WEIGHTS).keys()
    assert bool(added) == (name != "embedding")  # PEFT saves that one anyway
    spec = shelf.inspect(VARIANTS[name].base, tmp_path / "whole")
    assert (spec.modules, spec.variants) == (spoken_for.modules, spoken_for.variants)


def test_digests_of_plain_adapters_do_not_depend_on_support_for_variants(shelf: Shelf, tmp_path: Path) -> None:
    directory = shelf.copy("plain", tmp_path / "adapter")
    with_outline = shelf.inspect("tied", directory)
    assert inspect(directory, shelf.linears["tied"], CLASSES["tied"]).digest == with_outline.digest
    (directory / "copy").mkdir()
    spoil(directory, {"alora_invocation_tokens": [5]}, lambda tensors: None)
    assert shelf.inspect("tied", directory).digest != with_outline.digest


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
DELTA = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"


def same(tensors: dict[str, torch.Tensor]) -> None:
    pass


def put(name: str, *shape: int, fill: float = 0.5) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.full(shape, fill)})


@pytest.mark.parametrize(
    ("variant", "config", "change", "param", "words"),
    [
        ("DoRA", {}, lambda t: t.pop(f"{Q0}.lora_magnitude_vector"), "lora_magnitude_vector", "use_dora"),
        ("DoRA", {}, put(f"{Q0}.lora_magnitude_vector", 63), "lora_magnitude_vector", "[64]"),
        ("DoRA", {}, put(f"{Q0}.lora_magnitude_vector", 64, 1), "lora_magnitude_vector", "[64]"),
        ("DoRA", {}, put(f"{Q0}.lora_magnitude_vector", 64, fill=float("nan")), "lora_magnitude_vector", "NaN"),
        ("DoRA", {"use_dora": False}, same, "lora_magnitude_vector", "is not expected"),
        ("DoRA", {"lora_bias": True}, same, "lora_bias", "use_dora"),
        ("lora_bias", {}, put(f"{Q0}.lora_B.bias", 1), "lora_B.bias", "[64]"),
        ("lora_bias", {"lora_bias": False}, same, "lora_B.bias", "is not expected"),
        ("all biases", {}, put(f"{Q0}.base_layer.bias", 64, 64), "base_layer.bias", "[128]"),
        ("all biases", {"bias": "lora_only"}, same, ".bias", "is not expected"),
        ("trained biases", {"bias": "all"}, same, ".bias", "lack"),
        ("embedding", {}, put(f"{EMBEDDING}.lora_embedding_A", 8, VOCAB + 1), "lora_embedding_A", f"[8, {VOCAB}]"),
        ("embedding", {}, put(f"{EMBEDDING}.base_layer.weight", VOCAB, 64), "base_layer.weight", "another base"),
        (
            "embedding",
            {},
            put(f"{EMBEDDING}.base_layer.weight", VOCAB + 8, 64),
            "lora_embedding_A",
            f"[8, {VOCAB + 8}]",
        ),
        ("plain", {}, put(f"{HEAD}.weight", VOCAB + 8, 64), "weights", "new tokens"),
        ("plain", {}, put(f"{HEAD}.weight", VOCAB - 8, 64), "lm_head.weight", "must both have"),
        ("plain", {}, put(f"{HEAD}.weight", VOCAB, 64), "lm_head.weight", "modules_to_save"),
        ("saved head", {}, put(f"{HEAD}.weight", VOCAB, 65), "lm_head.weight", f"[{VOCAB}, 64]"),
        ("saved head", {"target_modules": ["lm_head"]}, same, "modules_to_save", "every module"),
        *[
            ("plain", {"modules_to_save": [name]}, same, "modules_to_save", words)
            for name, words in {
                "down_proj": "target_modules",
                "mlp": "only embedding, head, norms",
                "model": "every module",
            }.items()
        ],
        ("tokens", {"trainable_token_indices": [70, 5, VOCAB]}, same, "trainable_token_indices", f"{VOCAB} tokens"),
        ("tokens", {"trainable_token_indices": [2**31 - 1]}, same, "trainable_token_indices", f"{VOCAB} tokens"),
        ("tokens", {"trainable_token_indices": [70, 5]}, same, DELTA, "[2, 64]"),
        ("tokens", {"trainable_token_indices": {"wte": [1]}}, same, "trainable_token_indices", "neither"),
        ("tokens", {"trainable_token_indices": None}, same, DELTA, "is not expected"),
        ("tokens", {"modules_to_save": ["embed_tokens"]}, same, "trainable_token_indices", "modules_to_save"),
        ("tokens", {"target_modules": ["q_proj", "embed_tokens"]}, same, "trainable_token_indices", "target_modules"),
        ("tokens of the embedding", {"ensure_weight_tying": True}, same, "trainable_token_indices", "tying"),
        ("embedding, tied", {}, put(f"{HEAD}.lora_A.weight", 8, 64), "lm_head.lora_A.weight", "transpose"),
        ("embedding, tied", {}, put(f"{HEAD}.lora_B.weight", VOCAB, 8), "lm_head.lora_B.weight", "transpose"),
        ("saved embedding, tied", {}, put(f"{HEAD}.weight", VOCAB, 64), "lm_head.weight", "both are one parameter"),
        ("activated", {"alora_invocation_tokens": [VOCAB]}, same, "alora_invocation_tokens", f"{VOCAB} tokens"),
        ("activated", {"use_dora": True}, same, "use_dora", "alora"),
        ("activated", {"modules_to_save": ["norm"]}, same, "modules_to_save", "alora"),
        ("embedding", {"alora_invocation_tokens": [5]}, same, "target_modules", "activated"),
    ],
)
def test_mismatches_with_the_base_are_refused_by_name(
    variant: str,
    config: dict[str, Any],
    change: Callable[[dict[str, torch.Tensor]], Any],
    param: str,
    words: str,
    shelf: Shelf,
    tmp_path: Path,
) -> None:
    directory = shelf.copy(variant, tmp_path / "adapter")
    spoil(directory, config, change)
    with pytest.raises(AdapterError) as caught:
        shelf.inspect(VARIANTS[variant].base, directory)
    assert caught.value.param.endswith(param)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_modules_to_save_that_are_not_there_are_passed_over(shelf: Shelf, tmp_path: Path) -> None:
    directory = shelf.copy("plain", tmp_path / "adapter")
    spoil(directory, {"modules_to_save": ["score", "x" * 1000]}, same)
    assert [warning[:30] for warning in shelf.inspect("tied", directory).warnings] == [
        "modules_to_save has 'score', w",
        "modules_to_save has 'xxxxxxxxx",
    ]
    spoil(directory, {}, put("base_model.model.score.weight", 2, 64))
    with pytest.raises(AdapterError, match=r"score\.weight"):
        shelf.inspect("tied", directory)


def test_embeddings_that_were_rounded_on_the_way_are_the_bases(shelf: Shelf, tmp_path: Path) -> None:
    directory = shelf.copy("embedding", tmp_path / "adapter")
    name = f"{EMBEDDING}.base_layer.weight"
    for dtype in (torch.bfloat16, torch.float16):
        rounded = load_file(shelf.base("tied") / "model.safetensors")["model.embed_tokens.weight"].to(dtype).float()
        spoil(directory, {}, lambda tensors: tensors.update({name: rounded}))  # noqa: B023 - called at once
        [warning] = shelf.inspect("tied", directory).warnings
        assert f"'{name}' is the base's, rounded to {'BF16' if dtype == torch.bfloat16 else 'F16'}" in warning
        rounded.view(torch.int32)[-1, -1] ^= 1 << 16
        spoil(directory, {}, lambda tensors: tensors.update({name: rounded}))  # noqa: B023
        with pytest.raises(AdapterError, match="another base"):
            shelf.inspect("tied", directory)


def test_the_bases_embeddings_may_lie_beside_in_any_dtype(shelf: Shelf, tmp_path: Path) -> None:
    directory = shelf.copy("embedding", tmp_path / "adapter")
    whole = load_file(directory / WEIGHTS)[f"{EMBEDDING}.base_layer.weight"]
    for name in (f"{EMBEDDING}.base_layer.weight", f"{HEAD}.weight"):  # a tied head is the same matrix
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            spoil(directory, {}, lambda tensors: tensors.update({name: whole.to(dtype)}))  # noqa: B023 - called at once
            assert shelf.inspect("tied", directory).variants.names == ["adapted_embeddings"]
        one_bit = whole.clone()
        one_bit.view(torch.int32)[-1, -1] ^= 1
        spoil(directory, {}, lambda tensors: tensors.update({name: one_bit}))  # noqa: B023
        with pytest.raises(AdapterError) as caught:
            shelf.inspect("tied", directory)
        assert (caught.value.param, caught.value.code) == (name, "base_mismatch")
        spoil(directory, {}, lambda tensors: tensors.update({name: whole}))  # noqa: B023


def test_without_an_outline_only_linears_can_be_adapted(shelf: Shelf, tmp_path: Path) -> None:
    directory = Variant("tied", {"target_modules": ["lm_head", "q_proj"]}).save(tmp_path, shelf.base("tied"), 0)
    with pytest.raises(AdapterError, match="lm_head"):
        inspect(directory, shelf.linears["tied"], CLASSES["tied"])


@pytest.mark.parametrize(("target", "loaded"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_rounding_is_torchs(target: str, loaded: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4096, 16, generator=generator) * 10.0 ** torch.randint(-9, 5, (4096, 1), generator=generator)
    outlines = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        (tmp_path / str(dtype)).mkdir()
        save_file({"model.embed_tokens.weight": values.to(dtype)}, tmp_path / str(dtype) / "model.safetensors")
        outlines[dtype] = Outline.read(tmp_path / str(dtype))
    for dtype, outline in outlines.items():
        rounded = values.to(dtype).to(loaded).view(torch.int16).numpy().tobytes()
        assert outline.matching_dtype("model.embed_tokens.weight", target, iter([rounded[:4096], rounded[4096:]]))
        widened = values.to(dtype).float().numpy().tobytes()
        assert outline.matching_dtype("lm_head.weight", "F32", iter([widened]))
        assert not outline.matching_dtype("lm_head.weight", "F32", iter([widened[:-1] + b"\1"]))


def test_an_outline_of_a_base_in_several_files(shelf: Shelf, tmp_path: Path) -> None:
    whole = Outline.read(shelf.base("untied"))
    model = transformers.AutoModelForCausalLM.from_pretrained(shelf.base("untied"))
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    split = Outline.read(tmp_path)
    assert len({parameter.file for parameter in split.parameters.values()}) > 1
    assert {name: p.shape for name, p in split.parameters.items()} == {n: p.shape for n, p in whole.parameters.items()}
    assert (split.embedding, split.head, split.tied) == ("model.embed_tokens", "lm_head", False)
    assert split.table_shape == (VOCAB, 64)
