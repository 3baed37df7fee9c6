"""What a base's own files say of it: the parameters beside its linears, and their values when somebody asks.

Read from safetensors headers, with numpy only, so that an upload can be checked in a process that holds no model.
Trusts the files: they are the operator's.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adapters.safetensors_header import read_header

EMBEDDING, HEAD = "embed_tokens", "lm_head"  # the last parts of their names in every family that is served
_INDEX = "model.safetensors.index.json"


class Parameter(NamedTuple):
    """One tensor of the base's checkpoint."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it
    file: Path
    start: int  # in bytes, from the beginning of the file


@dataclass(frozen=True)
class Outline:
    """The parameters of a base by their full names. Without any, adapters may touch nothing but linears."""

    parameters: dict[str, Parameter] = field(default_factory=dict)
    new_tokens: int = 0  # that an adapter adds to the vocabulary

    @classmethod
    def read(cls, directory: Path) -> "Outline":
        """The outline of the model in `directory` (Hugging Face layout)."""
        index = directory / _INDEX
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        parameters: dict[str, Parameter] = {}
        for path in sorted(directory / name for name in names):
            parameters |= _parameters(path)
        return cls(parameters)

    def loaded(self, *, tied: bool) -> "Outline":
        """The outline of the model as it was loaded: `tied` when head and embedding became one matrix.

        A checkpoint may hold the head of a tied base once more, and the loaded model has one matrix all the same.
        """
        head = self._named(HEAD)
        if not tied or head is None or self.embedding is None:
            return self
        return replace(self, parameters={name: p for name, p in self.parameters.items() if name != f"{head}.weight"})

    @property
    def embedding(self) -> str | None:
        """Full name of the input embedding."""
        return self._named(EMBEDDING)

    @property
    def head(self) -> str | None:
        """Full name of the output head, which may have no parameters of its own."""
        return self._named(HEAD) or (HEAD if self.embedding else None)

    @property
    def tied(self) -> bool:
        """Whether the head's matrix is the embedding's."""
        return self._named(HEAD) is None

    @property
    def tables(self) -> list[str]:
        """Full names of embedding and head."""
        return [name for name in (self.embedding, self.head) if name is not None]

    @property
    def table_shape(self) -> tuple[int, int]:
        """Of embedding and head: (vocabulary, width)."""
        vocabulary, width = self.parameters[f"{self.embedding}.weight"].shape
        return vocabulary + self.new_tokens, width

    def grown(self, new_tokens: int) -> "Outline":
        """The same base with as many rows more in embedding and head."""
        return Outline(self.parameters, new_tokens)

    def equals(self, name: str, dtype: str, chunks: Iterator[bytes]) -> bool:
        """Whether a parameter's values, rounded to a dtype, are these.

        Args:
            name: full name; the weight of a tied head is the embedding's.
            dtype: "F32", "BF16" or "F16".
            chunks: the values to compare with, in that dtype.
        """
        if name not in self.parameters:
            name = f"{self.embedding}.weight"
        parameter = self.parameters[name]
        if parameter.dtype not in _ITEMS:
            return False
        with parameter.file.open("rb") as file:
            file.seek(parameter.start)
            size = _ITEMS[parameter.dtype]().itemsize
            for chunk in chunks:
                theirs = np.frombuffer(chunk, _ITEMS[dtype])
                ours = np.frombuffer(file.read(size * len(theirs)), _ITEMS[parameter.dtype])
                if not np.array_equal(_converted(ours, parameter.dtype, dtype), theirs):
                    return False
        return True

    def _named(self, last: str) -> str | None:
        for name in self.parameters:
            module, _, kind = name.rpartition(".")
            if kind == "weight" and module.rpartition(".")[2] == last:
                return module
        return None


def _parameters(path: Path) -> dict[str, Parameter]:
    with path.open("rb") as file:
        header = read_header(file)
    return {
        name: Parameter(tuple(entry["shape"]), entry["dtype"], path, header.data_start + entry["data_offsets"][0])
        for name, entry in header.tensors.items()
        if name.endswith((".weight", ".bias"))
    }


_ITEMS: dict[str, type[np.generic]] = {"F32": np.uint32, "BF16": np.uint16, "F16": np.uint16}  # raw bits


def _converted(bits: np.ndarray, source: str, target: str) -> np.ndarray:
    """Numbers of one dtype as the nearest of another, both as raw bits."""
    if source == target:
        return bits
    if source == "BF16":
        wide = bits.astype(np.uint32) << 16
    elif source == "F16":
        wide = bits.view(np.float16).astype(np.float32).view(np.uint32)
    else:
        wide = bits
    if target == "F32":
        return wide
    if target == "F16":
        with np.errstate(over="ignore"):
            return wide.view(np.float32).astype(np.float16).view(np.uint16)
    return ((wide + (((wide >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)  # round half to even
