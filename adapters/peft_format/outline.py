"""The outline of a base from its own files: the parameters beside its linears, and their values on demand.

Read from safetensors headers, with numpy only, so that an upload can be checked in a process without the model. The
files are trusted, since the operator provides them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adapters.peft_format.sizes import ExpertsSize
from adapters.safetensors_header import read_header

EMBEDDING, HEAD = "embed_tokens", "lm_head"  # last parts of these tables' names in most families
_INDEX = "model.safetensors.index.json"


class Parameter(NamedTuple):
    """One tensor of the base's checkpoint."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it
    file: Path
    start: int  # in bytes, from the beginning of the file


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights of the model in `directory` (Hugging Face layout)."""
    index = directory / _INDEX
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return sorted(directory / name for name in names)


@dataclass(frozen=True)
class Outline:
    """The parameters of a base by their full names. Without parameters, adapters may change linears only.

    Attributes:
        embedding: full name of the input embedding.
        head: full name of the output head, which may have no parameters of its own.
        tied: the head's matrix is the embedding's.
        non_text_modules: full names of modules not used for text, such as an image encoder.
        new_tokens: the number of tokens that an adapter adds to the vocabulary; negative: it has as many fewer.
        experts: full names of the parameters that hold experts' linears, in the order of their modules.
        norms: full names of the norms that an adapter may replace; None: the files do not tell, and every module that
            is neither linear nor table counts as one.
        routers: full names of routers to experts, also replaceable; adapters may have pairs of A and B for their
            weights.
        per_token_tables: full names of tables besides embedding and head that have a row for each token.
        opaque_embedding: the input embedding does more than look up rows and scale them.
    """

    parameters: dict[str, Parameter] = field(default_factory=dict)
    embedding: str | None = None
    head: str | None = None
    tied: bool = True
    non_text_modules: tuple[str, ...] = ()
    new_tokens: int = 0
    experts: dict[str, ExpertsSize] = field(default_factory=dict)
    norms: tuple[str, ...] | None = None
    routers: tuple[str, ...] = ()
    per_token_tables: tuple[str, ...] = ()
    opaque_embedding: bool = False

    @classmethod
    def read(cls, directory: Path) -> "Outline":
        """The outline of the model in `directory` (Hugging Face layout), as far as its files tell."""
        parameters: dict[str, Parameter] = {}
        for path in weight_files(directory):
            parameters |= _parameters(path)
        embedding, head = (_find_module(parameters, last) for last in (EMBEDDING, HEAD))
        return cls(parameters, embedding, head or (HEAD if embedding else None), tied=head is None)

    def as_loaded(
        self,
        *,
        tied: bool,
        embedding: str | None = None,
        head: str | None = None,
        non_text_modules: Sequence[str] = (),
        renamed: Mapping[str, str] | None = None,
        experts: Mapping[str, ExpertsSize] | None = None,
        norms: Sequence[str] | None = None,
        routers: Sequence[str] = (),
        per_token_tables: Sequence[str] = (),
        opaque_embedding: bool = False,
    ) -> "Outline":
        """The outline of the model as loaded.

        Args:
            tied: head and embedding became one matrix; the files may still hold it twice.
            renamed: name in the files -> name in the model, of parameters for which these differ.
        """
        renamed = renamed or {}
        embedding, head = embedding or self.embedding, head or self.head
        parameters = {renamed.get(name, name): parameter for name, parameter in self.parameters.items()}
        twin = f"{head}.weight" if tied else None
        if twin in parameters:
            parameters.setdefault(f"{embedding}.weight", parameters[twin])
        if f"{embedding}.weight" not in parameters:
            embedding = head = None
        non_text_prefixes = tuple(f"{module}." for module in non_text_modules)
        parameters = {n: p for n, p in parameters.items() if n != twin and not n.startswith(non_text_prefixes)}
        return Outline(
            parameters,
            embedding,
            head,
            tied,
            tuple(non_text_modules),
            experts=dict(experts or {}),
            norms=None if norms is None else tuple(norms),
            routers=tuple(routers),
            per_token_tables=tuple(per_token_tables),
            opaque_embedding=opaque_embedding,
        )

    @property
    def tables(self) -> list[str]:
        """Full names of embedding and head."""
        return [name for name in (self.embedding, self.head) if name is not None]

    @property
    def table_shape(self) -> tuple[int, int]:
        """The shape of embedding and head: (vocabulary, width)."""
        vocabulary, width = self.parameters[f"{self.embedding}.weight"].shape
        return vocabulary + self.new_tokens, width

    @property
    def head_bias(self) -> tuple[int] | None:
        """The shape of the head's bias, if it has one."""
        return (self.table_shape[0],) if f"{self.head}.bias" in self.parameters else None

    def with_new_tokens(self, new_tokens: int) -> "Outline":
        """The same base with this many more rows in embedding and head, or fewer."""
        return replace(self, new_tokens=new_tokens)

    def without_head(self) -> "Outline":
        """The same base without its output head."""
        remaining = {
            name: parameter for name, parameter in self.parameters.items() if name.rpartition(".")[0] != self.head
        }
        return replace(self, parameters=remaining, head=None)

    def resolve_parameter(self, name: str) -> Parameter:
        """A parameter by its full name; the weight of a tied head is the embedding's."""
        return self.parameters.get(name) or self.parameters[f"{self.embedding}.weight"]

    def matching_dtype(self, name: str, dtype: str, chunks: Iterator[bytes]) -> str | None:
        """Compare a parameter's first values with `chunks`, which may have been rounded to a narrower dtype: models are
        often trained in bf16 and saved in fp32.

        Args:
            name: full name, as for `resolve_parameter`.
            dtype: "F32", "BF16" or "F16".
            chunks: the values to compare with, in that dtype.

        Returns:
            The dtype that they were rounded to, such as the parameter's own; None when they differ.
        """
        parameter = self.resolve_parameter(name)
        if parameter.dtype not in _ITEMS:
            return None
        candidates = [parameter.dtype, "BF16", "F16"]
        with parameter.file.open("rb") as file:
            file.seek(parameter.start)
            size = _ITEMS[parameter.dtype]().itemsize
            for chunk in chunks:
                theirs = np.frombuffer(chunk, _ITEMS[dtype])
                ours = np.frombuffer(file.read(size * len(theirs)), _ITEMS[parameter.dtype])
                candidates = [
                    candidate
                    for candidate in candidates
                    if np.array_equal(
                        _converted(_converted(ours, parameter.dtype, candidate), candidate, dtype), theirs
                    )
                ]
                if not candidates:
                    return None
        return candidates[0]


def _find_module(parameters: Mapping[str, Parameter], last: str) -> str | None:
    """The full name of the first module with a weight and this last part of its name."""
    for name in parameters:
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
    """Numbers of one dtype rounded to the nearest of another, both as raw bits."""
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
