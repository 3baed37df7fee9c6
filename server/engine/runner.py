"""One scheduled step -> tensors -> the model -> what each sequence gets.

Packs the step's tokens into one row, installs the step in the model's slot (segments for the linears, block tables for
attention), runs the model and the sampler. A step is given to the device as a whole, and the next may be as well before
the tokens that it drew were read: those are taken on the device. What runs is decided by scheduler.py.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapters import kernels
from adapters.device.lora import FrozenLinear
from adapters.device.memory import sent
from adapters.device.pool import RowPool, SegmentDeltas, Use
from adapters.device.variants import ExtraUse, StepExtras
from server.engine.graphs import DecodeGraphs, DecodeStep
from server.engine.sampling import Draw, Drawn, Logprobs, Row, sample
from server.engine.sequence import Sequence, Step, Work
from server.messages.protocol import TokenLogprob
from server.model.attention import KVCache, PagedAttention
from server.model.base import Base


@dataclass
class WorkResult:
    """What one work of a step gave."""

    tokens: list[int] = field(default_factory=list)  # drawn after it: none in the middle of a prompt
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of those tokens, when asked for
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # one per entry of `Work.prompt_rows`
    failed: bool = False  # its logits are not finite


@dataclass(frozen=True)
class Batch:
    """A step as tensors. T packed tokens of R requests."""

    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    attention: PagedAttention
    deltas: SegmentDeltas | None
    keep: Tensor  # int64 [K], the rows whose logits somebody wants
    extras: StepExtras | None  # what its adapters do besides rank rows

    @property
    def decodes(self) -> bool:
        """Whether it is one token of each request, and all of their logits are wanted."""
        return len(self.ids) == len(self.attention.seqs) == len(self.keep)

    def planned(self) -> DecodeStep:
        """As a planned decoder takes it."""
        attention, deltas = self.attention, self.deltas
        return DecodeStep(
            ids=self.ids,
            positions=self.positions,
            slots=attention.slots,
            seqs=attention.seqs,
            block_tables=attention.block_tables,
            table=None if deltas is None else deltas.table,
            scale=None if deltas is None else deltas.scale,
        )


@dataclass(frozen=True)
class _Pass:
    """Works that shared a forward pass, and what comes of it."""

    results: list[WorkResult]
    sampling: list[tuple[Work, WorkResult]]  # those among the works that draw, in order
    drawn: Drawn | None  # for each of them one row, and one more for each draft
    scored: list[tuple[WorkResult, Tensor, Logprobs]]  # parts of prompts: whether their logits are finite, and these

    def finish(self) -> list[WorkResult]:
        """Wait for what came out."""
        for result, finite, logprobs in self.scored:
            result.failed = not finite
            result.prompt_logprobs = [] if result.failed else logprobs.read()
        if self.drawn is not None:
            draws = iter(self.drawn.draws())
            for work, result in self.sampling:
                accept(work, list(islice(draws, 1 + len(work.drafts))), result)
        return self.results


@dataclass(frozen=True)
class InFlightStep:
    """A step that was given to the device."""

    step: Step
    _passes: list[tuple[list[int], _Pass]]  # the works of each by index

    def tokens_after(self, sequences: Seq[Sequence]) -> Tensor:
        """The token that each of them is given by this step: int64, on the device, which may not have got so far."""
        rows: dict[Sequence, int] = {}
        drawn: list[Tensor] = []
        count = 0
        for _, part in self._passes:
            if part.drawn is not None:
                drawn.append(part.drawn.tokens)
                for work, _ in part.sampling:
                    rows[work.sequence] = count
                    count += 1 + len(work.drafts)
        tokens = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
        places = [rows[sequence] for sequence in sequences]
        if places != list(range(len(tokens))):
            tokens = tokens[sent(torch.tensor(places), tokens.device)]
        return tokens.clamp(min=0)  # any, where the logits were not finite

    def results(self) -> list[WorkResult]:
        """Wait for what came out. One result per work, in order; to be asked for once."""
        results: dict[int, WorkResult] = {}
        for indices, part in self._passes:
            results |= zip(indices, part.finish(), strict=True)
        return [results[index] for index in range(len(self.step.works))]


class _Model:
    """What a forward pass goes through: the base, or the base with merged weights."""

    def __init__(self, base: Base, cache: KVCache, pool: RowPool, max_model_len: int) -> None:
        self.base = base
        self._embedding: nn.Module = base.model.get_input_embeddings()
        self._head: FrozenLinear = base.model.get_output_embeddings()
        # Hidden states to the likeliest token of each row, where that reads less than all logits; or None.
        self.likeliest = kernels.plan_likeliest(self._head.weight, self._head.bias)
        # All decoder layers at once, where the model is of a known shape; None: through its modules.
        self.plan = kernels.plan_decoder(base.decoder, pool.a, pool.b, cache.k, cache.v, base.windows)
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

    def hidden(self, step: DecodeStep) -> Tensor:
        """Through the planned decoder: [T, hidden]."""
        assert self.plan is not None
        embedded = self._embedding(step.ids)
        paging = step.slots, step.seqs, step.block_tables
        return self.plan.run(embedded, step.positions, *paging, step.table, step.scale)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits, fp32 [K, V]."""
        logits: Tensor = self._head(hidden)
        return logits.float()


class Runner:
    """Runs steps on one base with one KV cache and one row pool."""

    def __init__(self, base: Base, cache: KVCache, pool: RowPool, max_model_len: int) -> None:
        self._base = base
        self._cache = cache
        self._pool = pool
        self._max_model_len = max_model_len
        self._model = _Model(base, cache, pool, max_model_len)
        self._merged: dict[str, _Model] = {}

    @property
    def base(self) -> Base:
        """What sequences run on that no `install` concerns."""
        return self._base

    def rebase(self, base: Base) -> None:
        """From now on run on this view of the base. Nothing may be under way."""
        self._base = base
        self._model = _Model(base, self._cache, self._pool, self._max_model_len)

    def install(self, key: str, merged: Base) -> None:
        """From now on sequences whose adapter is called `key` run on this base, and its rows are nobody's."""
        self._merged[key] = _Model(merged, self._cache, self._pool, self._max_model_len)

    def remove(self, key: str) -> None:
        """Undo `install`; no sequence may use it any more."""
        del self._merged[key]

    @torch.no_grad()
    def warm_up(self, requests: int) -> None:
        """Compile, tune and record on a GPU what decoding up to `requests` requests will need."""
        if self._model.graphs is not None:
            self._model.graphs.warm_up(requests)

    @torch.no_grad()
    def submit(self, step: Step, before: InFlightStep | None = None) -> InFlightStep:
        """Give a step to the device, which is not waited for.

        Args:
            before: the step that was given before it, if that is in flight: pending tokens are taken from there.
        """
        with self._threads():
            return InFlightStep(
                step,
                [
                    (indices, self._run([step.works[index] for index in indices], before))
                    for indices in self._passes(step.works)
                ],
            )

    @torch.no_grad()
    def logits(self, works: Seq[Work]) -> Tensor:
        """Of works that share a forward pass, fp32 [K, V]: one row per prompt row, work by work."""
        model = self._model_of(works)
        with self._threads():
            return self._forward(self._pack(works, None, merged=model is not self._model)[0], model)

    def _threads(self) -> AbstractContextManager[None]:
        return kernels.one_torch_thread() if self._model.plan is not None else nullcontext()

    def _passes(self, works: Seq[Work]) -> list[list[int]]:
        """The works by index, those together that can share a forward pass.

        A request takes the same path whatever its neighbours, or its bits would depend on them.
        """
        passes: dict[tuple[str, bool, int], list[int]] = {("", False, 0): list(range(len(works)))}
        if self._merged or self._pool.extras:
            passes = {}
            for index, work in enumerate(works):
                sequence = work.sequence
                path = self._merge_of(sequence), self._through_modules(sequence), self._new_tokens(sequence)
                passes.setdefault(path, []).append(index)
        return list(passes.values())

    def _merge_of(self, sequence: Sequence) -> str:
        """The merged weights that it runs on; empty for the base's."""
        key = sequence.adapter[0][0] if sequence.adapter else ""
        return key if key in self._merged else ""

    def _through_modules(self, sequence: Sequence) -> bool:
        """Whether its adapters change the decoder in ways that a plan does not know."""
        extras = self._pool.extras
        if not extras or self._model.plan is None:
            return False
        return any(digest in extras and extras[digest].in_decoder for digest, _ in sequence.adapter)

    def _new_tokens(self, sequence: Sequence) -> int:
        """By how much its vocabulary is larger than the base's; it has one adapter then."""
        extras = self._pool.extras.get(sequence.adapter[0][0]) if sequence.adapter else None
        return 0 if extras is None else extras.new_tokens

    def _run(self, works: Seq[Work], before: InFlightStep | None) -> _Pass:
        model = self._model_of(works)
        batch, wanted = self._pack(works, before, merged=model is not self._model)
        planned = batch.extras is None and model.plan is not None
        if planned and model.likeliest is not None and all(map(_takes_likeliest, works)):
            return self._take(works, model.likeliest(self._hidden(batch, model)))
        return self._draw(works, self._forward(batch, model), wanted)

    def _model_of(self, works: Seq[Work]) -> _Model:
        """What works that share a forward pass go through."""
        return self._merged.get(self._merge_of(works[0].sequence), self._model)

    # --- in --------------------------------------------------------------------------------------------

    def _pack(self, works: Seq[Work], before: InFlightStep | None, *, merged: bool) -> tuple[Batch, list[int]]:
        """A forward pass as tensors, and how many kept logit rows each work has. `merged`: adapters add nothing."""
        size = self._cache.block_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        keep: list[int] = []
        uses: list[Use] = []
        wanted: list[int] = []
        seqs: list[tuple[int, int, int]] = []
        pending: list[tuple[int, Sequence]] = []  # whose last token is pending, and where that comes among the ids
        extra_uses: list[ExtraUse] = []
        extra_kept: list[ExtraUse] = []
        width = max(-(-(work.start + work.count) // size) for work in works)
        apart = self._model.graphs is not None  # then a draft attends as a request of its own: as decoding is recorded
        tables = np.zeros((len(works) + apart * sum(len(work.drafts) for work in works), width), np.int32)
        for work in works:
            sequence, first, last = work.sequence, work.start, work.start + work.count
            offset = len(ids)
            ids += sequence.tokens[first : last - len(work.drafts)]
            ids += work.drafts  # none after a pending token
            if work.pending:
                pending.append((len(ids), sequence))
                ids.append(0)
            blocks = sequence.blocks[: -(-last // size)]
            positions += range(first, last)
            slots += [blocks[position // size] * size + position % size for position in range(first, last)]
            begins = [first, *range(last - len(work.drafts), last)] if apart and work.drafts else [first]
            for begin, end in pairwise([*begins, last]):
                tables[len(seqs), : len(blocks)] = blocks
                seqs.append((offset + begin - first, offset + end - first, end))
            kept = [offset + p - first for p in work.prompt_rows]
            if work.samples:
                kept += range(len(ids) - 1 - len(work.drafts), len(ids))
            keep += kept
            wanted.append(len(kept))
            for digest, weight in () if merged else sequence.adapter:
                begin = max(offset, offset + sequence.starts.get(digest, 0) - first)
                if begin >= len(ids):  # an activated adapter that is not in force yet
                    continue
                uses.append(Use(begin, len(ids), digest, weight))
                extras = self._pool.extras.get(digest)
                if extras is not None:
                    skipped = sum(token < begin for token in kept)
                    extra_uses.append(ExtraUse(begin, len(ids), extras, weight))
                    extra_kept.append(ExtraUse(len(keep) - len(kept) + skipped, len(keep), extras, weight))
        device = self._base.device

        def tensor(numbers: list[Any], dtype: type[np.generic] = np.int64) -> Tensor:
            return sent(torch.from_numpy(np.array(numbers, dtype)), device)  # half as long as a tensor from a list

        attention = PagedAttention(
            self._cache,
            tensor(slots),
            tensor(seqs, np.int32),
            sent(torch.from_numpy(tables), device),
        )
        packed = tensor(ids)
        if pending:
            assert before is not None
            tokens = before.tokens_after([sequence for _, sequence in pending])
            if len(pending) == len(ids):
                packed = tokens
            else:
                packed[tensor([place for place, _ in pending])] = tokens
        batch = Batch(
            ids=packed,
            positions=tensor(positions),
            attention=attention,
            deltas=self._pool.deltas(_merged(uses)),
            keep=tensor(keep),
            extras=StepExtras(extra_uses, extra_kept) if extra_uses else None,
        )
        return batch, wanted

    # --- through -----------------------------------------------------------------------------------------

    def _forward(self, batch: Batch, model: _Model) -> Tensor:
        """Logits of the kept rows, fp32 [K, V]."""
        with batch.extras.installed(self._base.model) if batch.extras else nullcontext():
            if model.plan is None or (batch.extras is not None and batch.extras.in_decoder):
                return self._forward_modules(batch, model.base)
            # One token of each request, and its logits: what most steps are, and what graphs are recorded for.
            if model.graphs is not None and batch.extras is None and batch.decodes:
                logits = model.graphs.run(batch.planned())
                if logits is not None:
                    return logits
            return model.head(self._hidden(batch, model))

    def _hidden(self, batch: Batch, model: _Model) -> Tensor:
        """What the planned decoder makes of the kept rows, fp32 [K, hidden]."""
        hidden = model.hidden(batch.planned())
        return hidden if len(batch.keep) == len(hidden) else hidden[batch.keep]

    def _forward_modules(self, batch: Batch, base: Base) -> Tensor:
        """The same through transformers' modules, which find the step in the model's slot."""
        slot, model = base.slot, base.model
        slot.deltas = batch.extras.over(batch.deltas) if batch.extras else batch.deltas
        slot.attention = batch.attention
        try:
            inputs = {"input_ids": batch.ids[None], "position_ids": batch.positions[None], "use_cache": False}
            if not len(batch.keep):  # the middle of prompts: no head
                base.decoder(**inputs)
                return torch.empty(0, base.vocab_size)
            return model(**inputs, logits_to_keep=batch.keep).logits[0].float()
        finally:
            slot.deltas = slot.attention = None

    # --- out ---------------------------------------------------------------------------------------------

    @staticmethod
    def _take(works: Seq[Work], tokens: Tensor) -> _Pass:
        """Tokens that are drawn already, in the order of the works that draw."""
        results = [WorkResult() for _ in works]
        sampling = [(work, result) for work, result in zip(works, results, strict=True) if work.samples]
        return _Pass(results, sampling, Drawn(tokens), [])

    def _draw(self, works: Seq[Work], logits: Tensor, wanted: list[int]) -> _Pass:
        """Score prompts and draw tokens. `wanted`: how many consecutive logit rows are each work's own."""
        made = _Pass([WorkResult() for _ in works], [], None, [])
        drawn: list[int] = []  # logit rows
        rows: list[Row] = []
        end = 0
        for work, result, count in zip(works, made.results, wanted, strict=True):
            begin, end = end, end + count
            if work.prompt_rows:
                made.scored.append((result, *_score_prompt(work, logits[begin : begin + len(work.prompt_rows)])))
            if work.samples:
                made.sampling.append((work, result))
                drawn += range(end - 1 - len(work.drafts), end)
                rows += _rows(work)
        if not rows:
            return made
        # Mostly all of them: no copy.
        chosen = logits if len(drawn) == len(logits) else logits[sent(torch.tensor(drawn), logits.device)]
        return replace(made, drawn=sample(chosen, rows, self._base.eos_token_ids))


def _score_prompt(work: Work, logits: Tensor) -> tuple[Tensor, Logprobs]:
    """Whether all logits are finite, and the log-probabilities of the prompt tokens that follow."""
    sequence = work.sequence
    following = torch.tensor([sequence.tokens[position + 1] for position in work.prompt_rows])
    alternatives = sequence.sampling.prompt_logprobs or 0
    return logits.isfinite().all(), Logprobs(logits, sent(following, logits.device), [alternatives] * len(following))


def accept(work: Work, draws: list[Draw], result: WorkResult) -> None:
    """Take draws for as long as what was drafted is what was drawn: then they are those of single steps."""
    for draw, draft in zip(draws, [*work.drafts, None], strict=True):
        if draw.token is None:
            result.failed = not result.tokens  # else once more in a step of its own, to fail there
            return
        result.tokens.append(draw.token)
        if draw.logprob is not None:
            result.logprobs.append(draw.logprob)
        if draw.token != draft:
            return


def _takes_likeliest(work: Work) -> bool:
    """Whether a work's tokens are the likeliest ones, and nothing else is wanted of its logits."""
    row = next(_rows(work))  # those after drafts are no different
    return not work.prompt_rows and row.greedy and row.plain and row.sampling.logprobs is None


def _rows(work: Work) -> Iterator[Row]:
    """How a work's tokens are to be drawn: after the last known one, and after each draft as if it were right."""
    sequence, drafts = work.sequence, work.drafts
    yield Row(sequence.sampling, sequence.tokens, len(sequence.prompt), pending=work.pending)
    for count in range(1, len(drafts) + 1):
        yield Row(sequence.sampling, [*sequence.tokens, *drafts[:count]], len(sequence.prompt))


def _merged(uses: list[Use]) -> list[Use]:
    """Neighbouring runs of one adapter become one, unless several adapters lie on the same tokens."""
    merged: list[Use] = []
    for use in uses:
        last = merged[-1] if merged else None
        if last is not None and last.end == use.start and last[2:] == use[2:]:
            merged[-1] = last._replace(end=use.end)
        else:
            merged.append(use)
    return merged
