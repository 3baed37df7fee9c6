"""Reading an adapter's directory into host memory: from its row file if there is one, else from its weights."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from adapters.device.host import HostAdapter, adapter_from_row_file, host_adapter
from adapters.device.lora import LoraLinear
from adapters.device.variant_builder import build
from adapters.peft_format import packed_rows, record
from adapters.peft_format.directory import WEIGHTS_NAME, AdapterSpec, load, load_variants


class AdapterLoader:
    """Reads adapters of one base. May be called in any thread.

    Args:
        model: the base, as transformers' model.
        linears: the base's linears that adapters may target.
        device: the target device; rows for a GPU are in pinned memory.
    """

    def __init__(self, model: nn.Module, linears: Sequence[LoraLinear], device: torch.device) -> None:
        self._model = model
        self._linears = {linear.name: linear for linear in linears}
        self._sizes = {linear.name: linear.size for linear in linears}
        self._device = device

    def __call__(self, digest: str, path: str) -> HostAdapter:
        """Read a published adapter, checking all bytes used against its record.

        Raises DamagedFile, OSError and others for a damaged or missing directory.
        """
        directory = Path(path)
        spec = AdapterSpec.read(directory)
        dtype: torch.dtype = getattr(torch, spec.dtype)
        rows = packed_rows.find(directory, spec, self._sizes)
        if rows is not None:
            return adapter_from_row_file(digest, rows, dtype, self._device)
        record.check(directory, [WEIGHTS_NAME])
        modules = {name: (a, b, spec.modules[name].scaling) for name, (a, b) in load(directory, spec).items()}
        adapter = host_adapter(digest, modules, dtype, pin=self._device.type == "cuda")
        if not spec.variants.names:
            return adapter
        values = load_variants(directory, spec)
        with torch.no_grad():
            extras = build(spec.variants, values, modules, self._linears, self._model)
        return dataclasses.replace(
            adapter,
            bytes=adapter.bytes + spec.variants.device_bytes,
            rank=spec.rank,
            extras=extras,
            extra_bytes=spec.variants.device_bytes,
            invocation=tuple(spec.variants.invocation),
        )
