"""Adapters saved by PEFT are read correctly; inconsistent files are refused with the name of the culprit."""

import dataclasses
import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapters.peft_format.directory import AdapterSpec, load, write
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.inspection import inspect
from adapters.peft_format.sizes import LinearSize
from adapters.peft_format.weights import MAX_HEADER_BYTES, read_header
from tests.support.tiny import tiny_adapter

ROOT = Path(__file__).parents[3]
CLASS = "LlamaForCausalLM"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj"
A0 = f"base_model.model.{Q0}.lora_A.weight"


# Two layers of a base with two kinds of linears: enough for all tests without PEFT's own adapters.
LINEARS = {
    f"model.layers.{i}.self_attn.{kind}": LinearSize(kind, 64, out)
    for i in range(2)
    for kind, out in [("q_proj", 64), ("v_proj", 32)]
}


def make(directory: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> dict[str, torch.Tensor]:
    """Write a sound rank-4 adapter for `LINEARS` and return its tensors, so that a test can spoil them."""
    directory.mkdir(parents=True, exist_ok=True)
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | config
    (directory / CONFIG).write_text(json.dumps(fields))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in LINEARS.items():
        a = torch.randn(4, shape.in_features, generator=generator)
        b = torch.randn(shape.out_features, 4, generator=generator)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(dtype)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return tensors


def refusal(directory: Path) -> AdapterError:
    with pytest.raises(AdapterError) as caught:
        inspect(directory, LINEARS, CLASS)
    assert len(str(caught.value)) < 1000
    assert str(directory) not in str(caught.value)
    return caught.value


# --- adapters saved by PEFT ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linears(model_dir: Path) -> dict[str, LinearSize]:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    return {
        name: LinearSize(name.rpartition(".")[2], module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"r": 3}, torch.float32),
        ({"r": 17, "lora_alpha": 5, "use_rslora": True}, torch.bfloat16),
        ({"r": 64, "target_modules": ["q_proj", "down_proj"], "task_type": None}, torch.float16),
        ({"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.1\..*"}, torch.float32),
        ({"target_modules": "all-linear", "layers_pattern": None}, torch.float32),
        ({"target_modules": ["v_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}, torch.float32),
        (
            {
                "rank_pattern": {"q_proj": 2, "layers.1.mlp.*": 12},
                "alpha_pattern": {r".*\.2\..*": 3},
                "use_rslora": True,
            },
            torch.float32,
        ),
    ],
    ids=["fp32", "rslora-bf16", "subset-fp16", "regex", "all-linear", "layers", "patterns"],
)
def test_adapters_saved_by_peft_are_read_correctly(
    tmp_path: Path, model_dir: Path, linears: dict[str, LinearSize], options: dict[str, Any], dtype: torch.dtype
) -> None:
    tiny_adapter(tmp_path, model_dir, dtype=dtype, **options)
    spec = inspect(tmp_path, linears, CLASS)
    tensors = load(tmp_path, spec)

    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    oracle = peft.PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    layers: dict[str, Any] = {
        name.removeprefix("base_model.model."): layer
        for name, layer in oracle.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert spec.modules.keys() == tensors.keys() == layers.keys()
    for name, layer in layers.items():
        a, b = tensors[name]
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a.float(), layer.lora_A["default"].weight.float())
        assert torch.equal(b.float(), layer.lora_B["default"].weight.float())
        assert spec.modules[name].rank == layer.r["default"] == a.shape[0]
        assert spec.modules[name].scaling == layer.scaling["default"]
    assert spec.dtype == str(dtype).removeprefix("torch.")
    assert spec.rank == max(layer.r["default"] for layer in layers.values())
    assert spec.parameters == sum(a.numel() + b.numel() for a, b in tensors.values())
    assert spec.bytes == spec.parameters * dtype.itemsize
    width = 2 if dtype == torch.float32 else 1
    for kind, units in spec.rows(linears).items():
        assert units == width * max(m.rank for name, m in spec.modules.items() if name.endswith(kind))


def test_what_we_write_peft_loads(tmp_path: Path, model_dir: Path, linears: dict[str, LinearSize]) -> None:
    tensors = {Q0: (torch.randn(4, 64), torch.randn(64, 4)[:, :4])}
    write(tmp_path, {"r": 4, "lora_alpha": 2, "target_modules": [Q0], "task_type": "CAUSAL_LM"}, tensors)
    spec = inspect(tmp_path, linears, CLASS)
    assert spec.modules[Q0].scaling == 0.5
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    layer: Any = peft.PeftModel.from_pretrained(base, tmp_path).get_submodule(f"base_model.model.{Q0}")
    for loaded, ours, oracle in zip(load(tmp_path, spec)[Q0], tensors[Q0], (layer.lora_A, layer.lora_B), strict=True):
        assert torch.equal(loaded, ours)
        assert torch.equal(oracle["default"].weight, ours)


# --- the spec --------------------------------------------------------------------------------------


def test_a_spec_survives_being_kept(tmp_path: Path) -> None:
    make(tmp_path, rank_pattern={"v_proj": 4})
    spec = dataclasses.replace(inspect(tmp_path, LINEARS, CLASS), warnings=("careful",))
    spec.save(tmp_path)
    assert AdapterSpec.read(tmp_path) == spec
    assert load(tmp_path).keys() == spec.modules.keys()


def test_the_digest_is_the_mathematics(tmp_path: Path) -> None:
    tensors = make(tmp_path / "a")
    digest = inspect(tmp_path / "a", LINEARS, CLASS).digest

    # Saved again: other metadata, another order in the file, another spelling of the same mathematics.
    make(tmp_path / "b", target_modules="all-linear", lora_dropout=0.3, rank_pattern={"q_proj": 4}, revision="x")
    save_file(dict(reversed(tensors.items())), tmp_path / "b" / WEIGHTS, metadata={"written": "yesterday"})
    assert inspect(tmp_path / "b", LINEARS, CLASS).digest == digest

    make(tmp_path / "c", lora_alpha=9)
    save_file(tensors, tmp_path / "d.safetensors")
    tensors[A0][0, 0] += 1
    make(tmp_path / "d")
    save_file(tensors, tmp_path / "d" / WEIGHTS)
    make(tmp_path / "e", dtype=torch.bfloat16)
    others = {inspect(tmp_path / name, LINEARS, CLASS).digest for name in "cde"}
    assert len(others | {digest}) == 4


def test_files_of_mixed_dtypes_become_float32(tmp_path: Path) -> None:
    tensors = make(tmp_path)
    tensors[A0] = tensors[A0].half()
    save_file(tensors, tmp_path / WEIGHTS)
    spec = inspect(tmp_path, LINEARS, CLASS)
    assert spec.dtype == "float32"
    a, b = load(tmp_path, spec)[Q0]
    assert a.dtype == b.dtype == torch.float32
    assert torch.equal(a, tensors[A0].float())


# --- tensors that do not fit -------------------------------------------------------------------------


def _rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[new] = tensors.pop(old)

    return spoil


def _put(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("spoil", "culprit", "words"),
    [
        (_rename(A0, f"base_model.model.{Q0}.lora_A.default.weight"), "lora_A.default", "adapter's name"),
        (_rename(A0, f"{Q0}.lora_A.weight"), Q0, "is not a LoRA adapter's"),
        (_rename(A0, A0.replace("layers.0", "layers.9")), "layers.9", "does not have"),
        (_rename(A0, A0.replace("q_proj", "k_proj")), "k_proj", "does not have"),
        (lambda tensors: tensors.pop(A0), A0, "lack"),
        (_put(f"base_model.model.{Q0}.lora_magnitude_vector", torch.zeros(64, 1)), "magnitude", "is not expected"),
        (_put(f"base_model.model.{Q0}.lora_B.bias", torch.zeros(64, 1)), "bias", "is not expected"),
        (_put("base_model.model.lm_head.weight", torch.zeros(64, 64)), "lm_head", "is not expected"),
        (
            _put("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 9)),
            "embed_tokens",
            "does not have",
        ),
        (_put("x" * 3000, torch.zeros(1, 1)), "xxx", "is not a LoRA adapter's"),
        (_put(A0, torch.zeros(8, 64)), A0, "[8, 64]"),
        (_put(A0, torch.zeros(4, 63)), A0, "[4, 63]"),
        (_put(A0, torch.zeros(64, 4)), A0, "[64, 4]"),
        (_put(A0, torch.zeros(0, 64)), A0, "[0, 64]"),
        (_put(A0, torch.zeros(256)), A0, "[256]"),
        (_put(A0, torch.zeros(1, 4, 64)), A0, "a shape"),
        (_put(A0, torch.zeros(4, 64, dtype=torch.float64)), A0, "F64"),
        (_put(A0, torch.zeros(4, 64, dtype=torch.int8)), A0, "I8"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(
    tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], Any], culprit: str, words: str
) -> None:
    tensors = make(tmp_path)
    spoil(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    fault = refusal(tmp_path)
    assert culprit in fault.param
    assert words in str(fault)


def test_tensors_must_belong_to_modules_that_the_config_selects(tmp_path: Path) -> None:
    make(tmp_path, target_modules=["q_proj"])
    assert "v_proj" in refusal(tmp_path).param


def test_the_configured_rank_must_be_the_tensors(tmp_path: Path) -> None:
    make(tmp_path, r=8)
    assert refusal(tmp_path).param == A0
    make(tmp_path, rank_pattern={"layers.1.self_attn.v_proj": 3})
    assert "layers.1.self_attn.v_proj" in refusal(tmp_path).param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    tensors = make(tmp_path, dtype=dtype)
    tensors[A0][3, 63] = value
    save_file(tensors, tmp_path / WEIGHTS)
    fault = refusal(tmp_path)
    assert (fault.param, fault.code) == (A0, "non_finite_weights")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_largest_and_smallest_finite_values_are_accepted(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = make(tmp_path, dtype=dtype)
    limits = torch.finfo(dtype)
    tensors[A0][0, :4] = torch.tensor([limits.max, limits.min, limits.smallest_normal / 2, -0.0], dtype=dtype)
    save_file(tensors, tmp_path / WEIGHTS)
    inspect(tmp_path, LINEARS, CLASS)


def test_large_tensors_are_looked_at_to_the_end(tmp_path: Path) -> None:
    linears = {"layers.0.wide": LinearSize("wide", 3 << 20, 1)}  # 12 MiB: several chunks
    a = torch.zeros(1, 3 << 20)
    write(tmp_path, {"r": 1, "target_modules": ["wide"]}, {"layers.0.wide": (a, torch.ones(1, 1))})
    inspect(tmp_path, linears, CLASS)
    a[0, -1] = float("nan")
    write(tmp_path, {"r": 1, "target_modules": ["wide"]}, {"layers.0.wide": (a, torch.ones(1, 1))})
    with pytest.raises(AdapterError, match="NaN"):
        inspect(tmp_path, linears, CLASS)


# --- invalid headers -----------------------------------------------------------------------------


def entry(begin: int, end: int, *, dtype: Any = "F32", shape: Any = (1, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def container(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b"", "weights"),
        (b"\0\0\0", "weights"),
        (container({}), "weights"),
        (container(b"[]"), "weights"),
        (container(b"nonsense"), "weights"),
        (container(b"\xff\xff"), "weights"),
        (container({"x": entry(0, 8)}, b"", length=2**63), "weights"),
        (container({"x": entry(0, 8)}, bytes(8), length=10**9), "weights"),
        (container(b" " * (MAX_HEADER_BYTES + 1)), "weights"),
        (container(json.dumps({f"{i}": entry(0, 0) for i in range(100_001)}).encode()), "weights"),
        (container(b'{"x":' + b"[" * 200_000), "weights"),
        (container(b'{"x": {}, "x": {}}'), "weights"),
        (container({"__metadata__": {"x": 1}, "y": entry(0, 8)}, bytes(8)), "weights"),
        (container({"__metadata__": [], "y": entry(0, 8)}, bytes(8)), "weights"),
        (container({"__metadata__": {}}), "weights"),
        (container({"x": entry(0, 8)}, bytes(7)), "weights"),
        (container({"x": entry(0, 8)}, bytes(9)), "weights"),
        (container({"x": entry(8, 16)}, bytes(16)), "x"),
        (container({"x": entry(0, 8), "y": entry(4, 12)}, bytes(12)), "y"),
        (container({"x": entry(0, 8), "y": entry(0, 8)}, bytes(8)), "y"),
        (container({"x": entry(0, 8), "y": entry(12, 20)}, bytes(20)), "y"),
        (container({"x": entry(-8, 0)}, bytes(8)), "x"),
        (container({"x": entry(8, 0)}, bytes(8)), "x"),
        (container({"x": entry(0, 16)}, bytes(16)), "x"),
        (container({"x": entry(0, 8, shape=[2**62, 2**62])}, bytes(8)), "x"),
        (container({"x": entry(0, 0, shape=[2**63, 0])}), "x"),
        (container({"x": entry(0, 8, shape=[-1, -2])}, bytes(8)), "x"),
        (container({"x": entry(0, 8, shape=[1.0, 2.0])}, bytes(8)), "x"),
        (container({"x": entry(0, 8, shape=[True, 2])}, bytes(8)), "x"),
        (container({"x": entry(0, 8, shape="12")}, bytes(8)), "x"),
        (container({"x": entry(0, 8, shape=None)}, bytes(8)), "x"),
        (container({"x": entry(0, 8, dtype="F8_E4M3")}, bytes(8)), "x"),
        (container({"x": entry(0, 8, dtype=["F32"])}, bytes(8)), "x"),
        (container({"x": [0, 8]}, bytes(8)), "x"),
        (container({"x": entry(0, 8) | {"extra": 1}}, bytes(8)), "x"),
        (container({"x": {"dtype": "F32", "shape": [1, 2]}}, bytes(8)), "x"),
    ],
    ids=lambda item: repr(item[8:50]) if isinstance(item, bytes) else None,
)
def test_a_header_that_lies_is_refused(tmp_path: Path, raw: bytes, param: str) -> None:
    make(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(raw)
    assert refusal(tmp_path).param == param


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    for cut in [*range(1, 40), *range(40, len(whole), 997)]:
        (tmp_path / WEIGHTS).write_bytes(whole[:-cut])
        assert refusal(tmp_path).param == "weights"


@given(st.data())
def test_a_damaged_header_is_refused_or_still_true(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray(container({"x": entry(0, 8), "y": entry(8, 16)}, bytes(16)))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "x"
    path.write_bytes(raw)
    with path.open("rb") as file:
        try:
            tensors = read_header(file)
        except AdapterError:
            return
    for tensor in tensors.values():
        itemsize = 4 if tensor.dtype == "F32" else 2
        assert 8 <= tensor.start <= tensor.end <= len(raw)
        assert tensor.end - tensor.start == math.prod(tensor.shape) * itemsize


class Canary:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_neither_run_nor_mistaken(tmp_path: Path, zipped: bool) -> None:
    make(tmp_path)
    torch.save({"x": Canary()}, tmp_path / WEIGHTS, _use_new_zipfile_serialization=zipped)
    assert "pickle" in str(refusal(tmp_path))
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    assert "pickle" in str(refusal(tmp_path))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n", "git lfs pull"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
        (b"<!DOCTYPE html><html><title>404</title>", "web page"),
        (b"\x1f\x8b\x08\x00" + bytes(64), "compressed"),
        (b"\xff" * 64, "not a safetensors file"),
    ],
)
def test_other_content_in_place_of_weights_is_named(tmp_path: Path, content: bytes, named: str) -> None:
    make(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(content)
    fault = refusal(tmp_path)
    assert (fault.param, named in str(fault)) == ("weights", True)


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert refusal(tmp_path).param == "config"
    make(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    assert refusal(tmp_path).param == "weights"


def test_tensors_need_not_be_aligned(tmp_path: Path) -> None:
    tensors = make(tmp_path)
    raw = (tmp_path / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip() + b" "
    header += b" " * (1 - len(header) % 2)  # an odd length
    (tmp_path / WEIGHTS).write_bytes(container(header, raw[8 + length :]))
    assert torch.equal(load(tmp_path, inspect(tmp_path, LINEARS, CLASS))[Q0][0], tensors[A0])


def test_validation_needs_no_torch(tmp_path: Path) -> None:
    make(tmp_path)
    program = f"""
import sys
from pathlib import Path
from adapters.peft_format.sizes import LinearSize
from adapters.peft_format.inspection import inspect
linears = {LINEARS!r}
print(inspect(Path({str(tmp_path)!r}), linears, {CLASS!r}).digest)
assert not {{"torch", "peft", "transformers", "safetensors"}} & set(sys.modules)
"""
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == inspect(tmp_path, LINEARS, CLASS).digest


def test_our_reader_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    tensors = make(tmp_path, dtype=torch.bfloat16)
    with (tmp_path / WEIGHTS).open("rb") as file:
        header = read_header(file)
        raw = (tmp_path / WEIGHTS).read_bytes()
    for name, tensor in load_file(tmp_path / WEIGHTS).items():
        found = np.frombuffer(raw[header[name].start : header[name].end], dtype="<u2").reshape(header[name].shape)
        assert np.array_equal(found, tensor.view(torch.uint16).numpy())
        assert torch.equal(tensor, tensors[name])
