"""A job's encoded examples, and the file that hands them from the API process to the engine process."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file


@dataclass
class Report:
    """Counts of a file's examples. Over-long ones are cut at the limit; empty ones (nothing to learn) are left out."""

    examples: int = 0
    duplicates: int = 0
    empty: int = 0
    over_long: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def __str__(self) -> str:
        text = f"{self.examples} examples, {self.tokens} tokens ({self.trained_tokens} trained on)"
        oddities = {"duplicate": self.duplicates, "empty": self.empty, "over-long": self.over_long}
        return ", ".join([text, *(f"{count} {name}" for name, count in oddities.items() if count)])


@dataclass
class Dataset:
    """Encoded sequences, concatenated."""

    tokens: npt.NDArray[np.int32]  # [total]
    trained: npt.NDArray[np.bool_]  # [total]
    bounds: npt.NDArray[np.int64]  # [sequences + 1]
    report: Report = field(default_factory=Report)
    stop_tokens: tuple[int, ...] = ()  # the tokens that ended turns of its chats; like the report, not saved
    tool_format: str | None = None  # of its tool calls, if any; not saved either
    reasoning_format: str | None = None

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """`[sequences]`"""
        return np.diff(self.bounds)

    def sequence(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Token ids and loss mask of one sequence."""
        span = slice(int(self.bounds[index]), int(self.bounds[index + 1]))
        return self.tokens[span], self.trained[span]

    def save(self, path: Path) -> None:
        """Write the arrays, and nothing else, as one safetensors file."""
        save_file({"tokens": self.tokens, "trained": self.trained, "bounds": self.bounds}, path)

    @classmethod
    def load(cls, path: Path) -> "Dataset":
        arrays = load_file(path)
        return cls(arrays["tokens"], arrays["trained"], arrays["bounds"])
