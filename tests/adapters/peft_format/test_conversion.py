"""Weights in dtypes that are not served are converted as in torch; pickled ones are refused with usable advice."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.peft_format.conversion import convert
from adapters.peft_format.directory import load
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.inspection import Check, digest_of, inspect_adapter
from adapters.peft_format.packed_rows import ROWS_NAME
from adapters.peft_format.text import NO_TEXT
from adapters.safetensors_header import CONVERT_HINT
from tests.adapters.peft_format.test_directory import A0, CLASS, LINEARS, Q0, WEIGHTS, make


@pytest.mark.parametrize(
    ("dtype", "target"),
    [
        (torch.float64, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e5m2, torch.bfloat16),
    ],
)
def test_every_number_is_torchs(dtype: torch.dtype, target: torch.dtype, tmp_path: Path) -> None:
    if dtype == torch.float64:
        values = torch.randn(64, 32, dtype=dtype) * 10.0 ** torch.randint(-30, 30, (64, 1))
    else:
        values = torch.arange(256).to(torch.uint8).view(dtype).view(16, 16)
    kept = torch.randn(3, 4).half()
    save_file({"b": values, "a": kept, "c": values[:1].clone()}, tmp_path / WEIGHTS)
    [warning] = convert(tmp_path / WEIGHTS)
    assert f"converted to {'F32' if target == torch.float32 else 'BF16'}" in warning
    found = load_file(tmp_path / WEIGHTS)
    torch.testing.assert_close(found["b"], values.to(target), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found["c"], values[:1].to(target), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found["a"], kept)
    content = (tmp_path / WEIGHTS).read_bytes()
    assert convert(tmp_path / WEIGHTS) == []
    assert (tmp_path / WEIGHTS).read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]


def test_an_adapter_is_checked_and_kept_as_it_is_served(tmp_path: Path) -> None:
    tensors = make(tmp_path, dtype=torch.float64)
    spec = inspect_adapter(Check(tmp_path, LINEARS, CLASS, None, NO_TEXT))
    spec.save(tmp_path)
    assert spec.dtype == "float32"
    assert spec.warnings == ("weights in F64 were converted to F32",)
    assert spec.digest == digest_of(tmp_path)
    assert (tmp_path / ROWS_NAME).exists()
    assert torch.equal(load(tmp_path)[Q0][0], tensors[A0].float())


@pytest.mark.parametrize(("dtype", "value"), [(torch.float64, 1e300), (torch.float8_e4m3fn, float("nan"))])
def test_a_number_that_does_not_fit_is_refused(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    tensors = make(tmp_path)
    save_file(tensors | {A0: torch.full((4, 64), value, dtype=dtype)}, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError) as caught:
        inspect_adapter(Check(tmp_path, LINEARS, CLASS, None, NO_TEXT))
    assert (caught.value.param, caught.value.code) == (A0, "non_finite_weights")


def test_pickled_weights_are_refused_with_advice_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make(tmp_path)
    torch.save(tensors, tmp_path / "adapter_model.bin")
    for prepare in (
        (tmp_path / WEIGHTS).unlink,
        lambda: shutil.copy(tmp_path / "adapter_model.bin", tmp_path / WEIGHTS),
    ):
        prepare()
        with pytest.raises(AdapterError) as caught:
            inspect_adapter(Check(tmp_path, LINEARS, CLASS, None, NO_TEXT))
        assert caught.value.param == "weights"
        assert CONVERT_HINT in str(caught.value)
    monkeypatch.chdir(tmp_path)
    exec(CONVERT_HINT.partition('python -c "')[2].removesuffix('"'))
    assert inspect_adapter(Check(tmp_path, LINEARS, CLASS, None, NO_TEXT)).parameters == sum(
        t.numel() for t in tensors.values()
    )
