"""Which way through which weights a sequence takes. By what it is alone: see paths.py."""

from collections.abc import Sequence as Seq

from adapters.device.pool import RowPool
from server.engine.paths import ForwardPath, Weights
from server.engine.sequence import Sequence, Work
from server.model.attention import KVCache
from server.model.base import Base


class Router:
    """Holds the weights that there are: the base's, and merged ones by the key that their sequences' adapter has.

    Args:
        planned: see `Weights`.
    """

    def __init__(self, base: Base, cache: KVCache, pool: RowPool, max_model_len: int, *, planned: bool = True) -> None:
        self._pool = pool
        self._settings = (cache, pool, max_model_len)
        self._planned = planned
        self.weights = self._made(base, merged=False)
        self.merged: dict[str, Weights] = {}

    @property
    def base(self) -> Base:
        """The base as requests run on it: with inputs rounded to int8, where that was asked for."""
        return self.weights.base

    def _made(self, base: Base, *, merged: bool) -> Weights:
        return Weights(base, *self._settings, merged=merged, planned=self._planned)

    def rebase(self, base: Base) -> None:
        """From now on run what is not merged on this view of the base. Nothing may be in flight."""
        self.weights = self._made(base, merged=False)

    def install(self, key: str, merged: Base) -> None:
        """From now on sequences whose adapter is called `key` run on this base, and its rows are nobody's."""
        self.merged[key] = self._made(merged, merged=True)

    def remove(self, key: str) -> None:
        """Undo `install`; no sequence may use it any more."""
        del self.merged[key]

    def route(self, sequence: Sequence) -> ForwardPath:
        """The path that a sequence takes."""
        if sequence.adapter and sequence.adapter[0][0] in self.merged:
            return self.merged[sequence.adapter[0][0]].path()
        modules, new_tokens = False, 0
        for digest, _ in sequence.adapter:
            adapter = self._pool.adapter(digest)
            if adapter is not None and adapter.extras is not None:
                modules |= adapter.extras.in_decoder
                new_tokens += adapter.extras.new_tokens  # one that has some is alone
        return self.weights.path(modules=modules, new_tokens=new_tokens)

    def passes(self, works: Seq[Work]) -> list[tuple[ForwardPath, Seq[int]]]:
        """The forward passes that works need: a path, and the places of those that take it."""
        places: dict[ForwardPath, list[int]] = {}
        for place, work in enumerate(works):
            places.setdefault(self.route(work.sequence), []).append(place)
        return list(places.items())
