"""Parameters of mixing and merging, without torch: sent by an API process, carried out by helper processes."""

from dataclasses import dataclass
from typing import Literal

Method = Literal[
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]
MergedDtype = Literal["nf4", "bf16"]  # of merged weights that are served


@dataclass(frozen=True)
class Recipe:
    """The parameters of a mix.

    Attributes:
        weights: one per adapter.
        density: share of the numbers kept by pruning, above 0 and at most 1.
        majority_sign: how `ties` elects a sign: by the sum of values, or by their number.
        rank: of the result of an `svd` method; by default the largest of the sources'.
        seed: of random pruning (`dare`).
    """

    method: Method
    weights: tuple[float, ...]
    density: float = 1.0
    majority_sign: Literal["total", "frequency"] = "total"
    rank: int | None = None
    seed: int = 0
