"""Sizes of the base's linears, and of adapters on the device.

Adapters' rows are counted in row units, cells of two bytes for each input (or output) of a linear: a rank row takes one
in bf16 or fp16 and two, one after the other, in fp32. So adapters of every dtype share one pool. All other device
memory of an adapter is counted under the kind `EXTRAS`, in units of `EXTRAS_UNIT` bytes. No torch here.
"""

from collections.abc import Mapping
from typing import NamedTuple

UNIT_BYTES = 2
EXTRAS = "extras"
EXTRAS_UNIT = 1024


class LinearSize(NamedTuple):
    """One linear of the base: its kind (last component of its name: `q_proj`, `down_proj`, ...) and its sizes."""

    kind: str
    in_features: int
    out_features: int

    @property
    def unit_bytes(self) -> int:
        """Device memory of one row unit of A and one of B."""
        return UNIT_BYTES * (self.in_features + self.out_features)

    @property
    def pairs(self) -> int:
        """The number of pairs of A and B that adapt it."""
        return 1


class ExpertsSize(NamedTuple):
    """A parameter of the base that holds one linear of every expert of a layer.

    Attributes:
        parts: the linears in it, from its first output on, all of one size, where each expert has its own; each by all
            its names, with a * for the expert. Empty: experts are nowhere stored apart.
    """

    experts: int
    in_features: int
    out_features: int
    parts: tuple[tuple[str, ...], ...] = ()

    @property
    def pairs(self) -> int:
        """The number of pairs of A and B that adapt it."""
        return self.experts


def units_per_row(dtype: str) -> int:
    """Row units of one rank row. `dtype`: "float32", "bfloat16" or "float16"."""
    return 2 if dtype == "float32" else 1


def extra_units(size: int) -> int:
    """Units under `EXTRAS` for `size` bytes."""
    return -(-size // EXTRAS_UNIT)


def device_bytes(units: Mapping[str, int], linears: Mapping[str, LinearSize]) -> int:
    """Device memory of these units per kind: a kind has as many rows in each of its linears."""
    rows = sum(units.get(linear.kind, 0) * linear.unit_bytes for linear in linears.values())
    return rows + EXTRAS_UNIT * units.get(EXTRAS, 0)
