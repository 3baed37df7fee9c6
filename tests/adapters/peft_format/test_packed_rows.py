"""Rows packed at upload equal the rows packed at load."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.device import host
from adapters.device.host import HostAdapter, adapter_from_row_file, host_adapter
from adapters.device.pool import RowPool
from adapters.peft_format import packed_rows
from adapters.peft_format.directory import WEIGHTS_NAME, AdapterSpec, load
from adapters.peft_format.inspection import inspect
from adapters.peft_format.modules import Variants
from adapters.peft_format.record import DamagedFile
from tests.support.harness import LAYERS, base_info, write_adapter

BASE = base_info()
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def accepted(directory: Path) -> AdapterSpec:
    spec = inspect(directory, BASE.linears, BASE.architecture)
    packed_rows.write(directory, spec)
    spec.save(directory)
    return spec


def cast(directory: Path, *dtypes: torch.dtype) -> None:
    """Save the file again with its tensors in these dtypes in turn."""
    tensors = load_file(directory / WEIGHTS_NAME)
    turns = {name: tensor.to(dtypes[i % len(dtypes)]) for i, (name, tensor) in enumerate(sorted(tensors.items()))}
    save_file(turns, directory / WEIGHTS_NAME)


def from_rows(directory: Path, spec: AdapterSpec) -> HostAdapter:
    found = packed_rows.find(directory, spec, BASE.linears)
    assert found is not None
    assert found.path.stat().st_size == found.bytes
    return adapter_from_row_file(spec.digest, found, getattr(torch, spec.dtype), CPU)


def from_tensors(directory: Path, spec: AdapterSpec) -> HostAdapter:
    modules = {name: (a, b, spec.modules[name].scaling) for name, (a, b) in load(directory, spec).items()}
    return host_adapter(spec.digest, modules, getattr(torch, spec.dtype))


@pytest.mark.parametrize("at_once", [0, 1 << 20], ids=["straight from the file", "by way of memory"])
@pytest.mark.parametrize("dtypes", [*([dtype] for dtype in DTYPES), DTYPES], ids=str)
def test_the_pool_holds_the_same_either_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtypes: list[torch.dtype], at_once: int
) -> None:
    monkeypatch.setattr(host, "AT_ONCE_BYTES", at_once)
    monkeypatch.setattr(packed_rows, "_READ_BYTES", 100)  # so that reads begin and end anywhere
    directory = write_adapter(tmp_path / "one", rank_pattern={"layers.0.self_attn.q_proj": 4})
    cast(directory, *dtypes)
    spec = accepted(directory)
    adapters = from_rows(directory, spec), from_tensors(directory, spec)
    assert adapters[0].bytes == adapters[1].bytes
    assert adapters[0].rank == adapters[1].rank
    assert (adapters[0].file is None) == bool(at_once)
    pools = []
    for adapter in adapters:
        pools.append(RowPool(BASE.linears, dict(BASE.pool_rows), CPU))
        assert pools[-1].insert(adapter)
    assert len(spec.modules) == 2 * LAYERS
    for name in spec.modules:
        got, want = (pool.factors(spec.digest, name) for pool in pools)
        assert got is not None
        assert want is not None
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        assert got[2] == want[2]


def test_a_file_that_is_cut_short_is_not_half_an_adapter(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "one")
    spec = accepted(directory)
    found = packed_rows.find(directory, spec, BASE.linears)
    assert found is not None
    found.path.write_bytes(found.path.read_bytes()[:-1])
    with pytest.raises(DamagedFile, match="cut short"):
        found.read_into([np.zeros(found.bytes // 2, np.int16)])


def test_adapters_that_are_more_than_rows_have_no_such_file(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "one")
    spec = inspect(directory, BASE.linears, BASE.architecture)
    spec = dataclasses.replace(spec, variants=Variants(invocation=[5]))
    packed_rows.write(directory, spec)
    assert not (directory / packed_rows.ROWS_NAME).exists()
    assert packed_rows.find(directory, spec, BASE.linears) is None


def test_adapters_of_earlier_releases_have_none(tmp_path: Path) -> None:
    directory = write_adapter(tmp_path / "one")
    spec = accepted(directory)
    (directory / packed_rows.ROWS_NAME).unlink()
    assert packed_rows.find(directory, spec, BASE.linears) is None
