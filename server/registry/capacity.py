"""Device memory that adapters need: checks that one fits into an empty pool, and pinned ones into their share.

Arithmetic on rows of memory per module kind.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from adapters.device.rows import round_up
from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.sizes import EXTRAS, device_bytes
from adapters.storage.versions import Version
from server.client.engine import EngineClient, engine_info
from server.errors import Conflict
from server.messages.protocol import Ready
from server.settings import Settings

MAX_CUDA_RANK = 512  # of one adapter in the grouped LoRA kernels


def check_fit(spec: AdapterSpec, base: Ready) -> None:
    """Raise AdapterError for an adapter that an empty device pool, or the device's kernels, cannot hold."""
    if base.device.startswith("cuda") and spec.rank > MAX_CUDA_RANK:
        raise AdapterError(
            f"rank {spec.rank} is more than the {MAX_CUDA_RANK} that the GPU's kernels take", "r", "adapter_too_large"
        )
    vocabulary = base.vocab_size + spec.variants.new_tokens
    if spec.text.tokens and spec.text.tokens[-1].id >= vocabulary:
        raise AdapterError(
            f"the tokenizer has the new token {spec.text.tokens[-1].id}; base and weights have {vocabulary} rows. Save "
            "the adapter with its resized embeddings",
            "tokenizer",
        )
    for kind, rows in spec.rows(base.linears).items():
        capacity = base.pool_rows.get(kind, 0)
        if rows > capacity and kind == EXTRAS:
            raise AdapterError(
                f"besides its rank rows the adapter needs {rows} KiB on the device, and {capacity} KiB are there for "
                "that (see --adapter-bytes)",
                "weights",
                "adapter_too_large",
            )
        if rows > capacity:
            largest = capacity * spec.rank // rows
            raise AdapterError(
                f"rank {spec.rank} in {spec.dtype} needs {rows} rows of {kind}, and the device's pool has {capacity}: "
                f"the largest rank that can be served is {largest} (see --adapter-bytes)",
                "r",
                "adapter_too_large",
            )


def row_units(versions: Iterable[Version]) -> Counter[str]:
    """Return the row units per module kind that the versions take together."""
    needed: Counter[str] = Counter()
    for version in versions:
        needed.update({kind: round_up(units) for kind, units in version.receipt["rows"].items()})
    return needed


def first_that_fit(versions: Iterable[Version], room: Mapping[str, int]) -> list[Version]:
    """Return the longest leading part of the versions that fits into the room together."""
    found: list[Version] = []
    needed: Counter[str] = Counter()
    for version in versions:
        needed += row_units([version])
        if any(units > room.get(kind, 0) for kind, units in needed.items()):
            break
        found.append(version)
    return found


class PinLimit:
    """The limit on pinned adapters' memory on the device (`--adapter-pinned-bytes`)."""

    def __init__(self, settings: Settings, engine: EngineClient) -> None:
        self._allowed = settings.adapter_pinned_bytes
        self._engine = engine

    def room(self, base: Ready) -> dict[str, int]:
        """Return the row units per module kind that pins may take: the limit's share of all memory, of each kind."""
        total = device_bytes({kind: units for kind, units in base.pool_rows.items() if kind != EXTRAS}, base.linears)
        share = 0.5 if self._allowed is None else min(1.0, self._allowed / max(total, 1))
        return {kind: int(units * share) for kind, units in base.pool_rows.items()}

    def check(self, versions: Collection[Version]) -> None:
        """Raise Conflict when these together exceed the limit; EngineUnavailable while the engine is not up."""
        room = self.room(engine_info(self._engine))
        fitting = first_that_fit(versions, room)
        if len(fitting) < len(versions):
            excess = row_units([*fitting, list(versions)[len(fitting)]])
            kind = next(kind for kind in excess if excess[kind] > room.get(kind, 0))
            raise Conflict(
                f"Pinned adapters would take {excess[kind]} rows of {kind} on the device, and may take "
                f"{room.get(kind, 0)} (--adapter-pinned-bytes). Unpin one.",
                param="name",
                code="pin_limit",
            )
