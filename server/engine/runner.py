"""Running scheduled steps on the device: works are routed to forward paths, packed into tensors, and run.

A forward path is a way through a model, from packed works to logits to drawn tokens. It is chosen per sequence, and
works of one path share a forward pass. If other requests in the batch affected the choice, a request's bits would
depend on them.

A step is submitted without waiting, and the next may be submitted before its drawn tokens are read: they are taken
from the device.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from adapters import kernels
from adapters.device.lora import FrozenLinear
from adapters.device.pool import RowPool
from server.engine.batch import Batch, InFlightStep, Outcome, Packer, draw, needs_only_argmax
from server.engine.graphs import DecodeGraphs, DecodeStep
from server.engine.sampling import DrawnTokens, Readback
from server.engine.sequence import Sequence, Step, Work
from server.model.attention import KVCache
from server.model.base import Base
from server.model.states import StateCache


class Weights:
    """The weights of a forward pass: the base's, or merged ones.

    Args:
        merged: whether adapters are merged into the weights, so that their rank rows are not applied.
        planned: whether the planned decoder may be used, if there is one for the model's shape.
    """

    def __init__(
        self, base: Base, cache: KVCache, pool: RowPool, max_model_len: int, *, merged: bool, planned: bool
    ) -> None:
        self.base = base
        self.merged = merged
        self._embedding: nn.Module = base.model.get_input_embeddings()
        self._head: FrozenLinear = base.model.get_output_embeddings()
        # Hidden states to the argmax of each row's logits without computing all logits; None if not available.
        self.argmax = kernels.plan_argmax(self._head.weight, self._head.bias)
        # The planned decoder, if there is one for the model's shape; None: modules run.
        # It takes a single block table, so all layers must be of one group.
        self.plan = (
            kernels.plan_decoder(
                base.decoder, pool.a, pool.b, cache.k, cache.v, [layer.window for layer in base.layers]
            )
            if planned and len(cache.windows) == 1
            else None
        )
        self.graphs = (
            DecodeGraphs(
                lambda step: self.head(self.hidden(step)),
                linears=len(base.linears),
                max_blocks=-(-max_model_len // cache.block_size),
                device=base.device,
            )
            if base.device.type == "cuda" and self.plan is not None
            else None
        )
        weights = [linear.weight for linear in base.linears], [linear.weights for linear in base.experts]
        # Torch then does only small work, and its threads would compete with those of the native kernels for cores.
        self._one_thread = self.plan is not None or kernels.runs_natively(base.device, base.dtype, chain(*weights))
        self.has_logits_to_keep = "logits_to_keep" in inspect.signature(base.model.forward).parameters
        self._paths: dict[tuple[bool, int], ForwardPath] = {}

    def path(self, *, modules: bool = False, new_tokens: int = 0) -> "ForwardPath":
        """Return a path through these weights.

        Args:
            modules: whether the decoder's modules must run, for adapters' variants.
            new_tokens: added vocabulary entries; a forward pass has one size of vocabulary.
        """
        modules = modules or self.plan is None
        key = modules, new_tokens
        if key not in self._paths:
            self._paths[key] = (ModulesPath if modules else PlannedPath)(self)
        return self._paths[key]

    def threads(self) -> AbstractContextManager[None]:
        """Return a context that sets torch's number of threads while these weights are used."""
        return kernels.one_torch_thread() if self._one_thread else nullcontext()

    def hidden(self, step: DecodeStep) -> Tensor:
        """Return the planned decoder's output, [T, hidden]."""
        assert self.plan is not None
        embedded = self._embedding(step.ids)
        paging = step.slots, step.seqs, step.block_tables
        return self.plan.run(embedded, step.positions, *paging, step.table, step.scale)

    def head(self, hidden: Tensor) -> Tensor:
        """Return the logits, fp32 [K, V]."""
        logits: Tensor = self._head(hidden)
        return logits.float()


@dataclass(frozen=True, eq=False)
class ForwardPath(ABC):
    """A way through some weights."""

    weights: Weights

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, dict[int, Readback]]:
        """Return the logits at the logits indices, fp32 [K, V], and the scores of classifying works, by index."""

    def run(self, batch: Batch) -> Outcome:
        """Submit a forward pass, and the draw from its logits, to the device."""
        return draw(batch, *self.forward(batch), self.weights.base.eos_token_ids)

    def installed(self, batch: Batch) -> AbstractContextManager[None]:
        """Return a context in which the variants of the batch's adapters apply."""
        return batch.extras.installed(self.weights.base.model) if batch.extras else nullcontext()


class PlannedPath(ForwardPath):
    """The planned decoder, run as a recorded graph in decode steps on a GPU."""

    def run(self, batch: Batch) -> Outcome:
        argmax = self.weights.argmax
        if argmax is not None and batch.extras is None and all(map(needs_only_argmax, batch.works)):
            hidden = self.weights.hidden(batch.decode_step())
            return Outcome(
                batch.works, DrawnTokens(argmax(_logits_rows(hidden, batch))), classified=batch.classify(hidden)
            )
        return super().run(batch)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[int, Readback]]:
        weights = self.weights
        if weights.graphs is not None and batch.extras is None and batch.is_decode:
            logits = weights.graphs.run(batch.decode_step())
            if logits is not None:
                return logits, {}
        with self.installed(batch):
            hidden = weights.hidden(batch.decode_step())
            return weights.head(_logits_rows(hidden, batch)), batch.classify(hidden)


def _logits_rows(hidden: Tensor, batch: Batch) -> Tensor:
    """Return the rows with logits of a planned decoder's output, fp32 [K, hidden]."""
    return hidden if len(batch.logits_indices) == len(hidden) else hidden[batch.logits_indices]


class ModulesPath(ForwardPath):
    """Transformers' modules, which read the batch from the model's slot."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[int, Readback]]:
        base = self.weights.base
        slot, model = base.slot, base.model
        slot.deltas = batch.extras.wrap_deltas(batch.deltas) if batch.extras else batch.deltas
        slot.experts = batch.extras.experts if batch.extras else None
        slot.attention, slot.states = batch.attention, batch.states
        hidden: list[Tensor] = []  # the decoder's output for all rows, if any work classifies
        try:
            classified = _capture_output(base.decoder, hidden if batch.heads else None)
            with self.installed(batch), classified, self._narrow_head_input(batch.logits_indices):
                inputs = {"input_ids": batch.ids[None], "position_ids": batch.positions[None], "use_cache": False}
                if not len(batch.logits_indices):  # in the middle of prompts the head is not run
                    base.decoder(**inputs)
                    logits = torch.empty(0, base.vocab_size)
                else:
                    logits = model(**inputs, logits_to_keep=batch.logits_indices).logits[0].float()
                return logits, batch.classify(hidden[0]) if hidden else {}
        finally:
            slot.deltas = slot.experts = slot.attention = slot.states = None

    def _narrow_head_input(self, indices: Tensor) -> AbstractContextManager[Any]:
        """Return a context that limits the head to these rows in models without a `logits_to_keep` argument."""
        if self.weights.has_logits_to_keep or not len(indices):
            return nullcontext()

        def narrow(module: nn.Module, args: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state[:, indices]
            return output

        return self.weights.base.decoder.register_forward_hook(narrow)


@contextmanager
def _capture_output(decoder: nn.Module, outputs: list[Tensor] | None) -> Iterator[None]:
    """Append the decoder's output, [T, hidden], to `outputs` within the context; do nothing if it is None."""
    if outputs is None:
        yield
        return

    def capture(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0][0])

    with decoder.register_forward_hook(capture):
        yield


class Runner:
    """Runs steps on the base's weights and on merged ones, which are found by the adapter key of their sequences.

    Args:
        planned: see `Weights`.
        states: of the layers that keep a state, if any.
    """

    def __init__(
        self,
        base: Base,
        cache: KVCache,
        pool: RowPool,
        max_model_len: int,
        *,
        planned: bool = True,
        states: StateCache | None = None,
    ) -> None:
        self._pool = pool
        self._packer = Packer(cache, pool, states)
        self._settings = (cache, pool, max_model_len)
        self._planned = planned
        self.weights = self._make_weights(base, merged=False)
        self.merged: dict[str, Weights] = {}

    @property
    def base(self) -> Base:
        """The base on which unmerged requests run: with inputs rounded to int8, if that is switched on."""
        return self.weights.base

    def _make_weights(self, base: Base, *, merged: bool) -> Weights:
        return Weights(base, *self._settings, merged=merged, planned=self._planned)

    def replace_base(self, base: Base) -> None:
        """Run unmerged sequences on this view of the base from now on. Nothing may be in flight."""
        self.weights = self._make_weights(base, merged=False)

    def install(self, key: str, merged: Base) -> None:
        """Run sequences with adapter `key` on this base from now on, without rank rows."""
        self.merged[key] = self._make_weights(merged, merged=True)

    def remove(self, key: str) -> None:
        """Undo `install`; no sequence may use the key any more."""
        del self.merged[key]

    def route(self, sequence: Sequence) -> ForwardPath:
        """Return the path of a sequence."""
        if sequence.adapter and sequence.adapter[0][0] in self.merged:
            return self.merged[sequence.adapter[0][0]].path()
        modules, new_tokens = False, 0
        for digest, _ in sequence.adapter:
            adapter = self._pool.adapter(digest)
            if adapter is not None and adapter.extras is not None:
                modules |= adapter.extras.in_decoder
                if adapter.extras.classifier is None:
                    new_tokens += adapter.extras.new_tokens  # such an adapter is never combined with others
        return self.weights.path(modules=modules, new_tokens=new_tokens)

    def _group_by_path(self, works: Seq[Work]) -> list[tuple[ForwardPath, Seq[int]]]:
        """Group works into forward passes: each path with the indices of its works."""
        indices: dict[ForwardPath, list[int]] = {}
        for index, work in enumerate(works):
            indices.setdefault(self.route(work.sequence), []).append(index)
        return list(indices.items())

    @torch.no_grad()
    def warm_up(self, requests: int) -> None:
        """Compile, tune and record a GPU's kernels for decoding up to `requests` requests."""
        if self.weights.graphs is not None:
            self.weights.graphs.warm_up(requests)

    @torch.no_grad()
    def submit(self, step: Step, previous: InFlightStep | None = None) -> InFlightStep:
        """Submit a step to the device without waiting for it.

        Args:
            previous: the previous step, if it is in flight: pending tokens are taken from it.
        """
        outcomes: list[tuple[Seq[int], Outcome]] = []
        for path, indices in self._group_by_path(step.works):
            works = step.works if len(indices) == len(step.works) else [step.works[index] for index in indices]
            with path.weights.threads():
                outcomes.append((indices, path.run(self._pack(path, works, previous))))
        return InFlightStep(step, outcomes)

    @torch.no_grad()
    def logits(self, works: Seq[Work]) -> Tensor:
        """Return the logits of works of one forward pass, fp32 [K, V]: one row per prompt row, work by work."""
        path = self.route(works[0].sequence)
        with path.weights.threads():
            return path.forward(self._pack(path, works))[0]

    def _pack(self, path: ForwardPath, works: Seq[Work], previous: InFlightStep | None = None) -> Batch:
        return self._packer.pack(
            works,
            None if previous is None else previous.pending_tokens,
            adapters=not path.weights.merged,
            drafts_as_requests=path.weights.graphs is not None,
        )
