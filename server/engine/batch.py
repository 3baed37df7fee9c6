"""A forward pass's works as tensors, and the results that come back: tokens, log-probabilities, failures.

`Packer` lays the tokens in one row, with the places of keys, values and adapters. An `Outcome` is made when the forward
pass is submitted to the device, and read when the step is collected.
"""

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from adapters.device.memory import sent
from adapters.device.pool import RowPool, SegmentDeltas, Use
from adapters.device.variants import Classifier, ExtraUse, StepExtras
from server.engine.graphs import DecodeStep
from server.engine.sampling import Draw, Drawn, Logprobs, Readback, Row, sample
from server.engine.sequence import Sequence, Step, Work
from server.messages.protocol import TokenLogprob
from server.model.attention import KVCache, PagedAttention
from server.model.states import StateCache, StateStep


@dataclass(frozen=True)
class Batch:
    """T packed tokens of R requests."""

    works: Seq[Work]
    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    attention: PagedAttention
    deltas: SegmentDeltas | None
    keep: Tensor  # int64 [K], the logits indices: rows whose logits are wanted
    kept: list[int]  # how many consecutive ones of them are each work's own
    extras: StepExtras | None  # what its adapters do besides rank rows
    states: StateStep | None  # of the layers that keep some
    heads: dict[int, tuple[int, Classifier]]  # by work's index, of those that classify: row of its last token, head

    @property
    def decodes(self) -> bool:
        """Whether it is one token of each request, and all of their logits are wanted."""
        return len(self.ids) == len(self.attention.seqs) == len(self.keep)

    def classified(self, hidden: Tensor) -> dict[int, Readback]:
        """Scores of the works that classify, by their index. hidden: the decoder's output for all rows, [T, hidden].

        Each head sees its row alone, so that no score depends on the company.
        """
        return {index: Readback(head.scores(hidden[row])) for index, (row, head) in self.heads.items()}

    def planned(self) -> DecodeStep:
        """The batch as a planned decoder takes it."""
        attention, deltas = self.attention, self.deltas
        return DecodeStep(
            ids=self.ids,
            positions=self.positions,
            slots=attention.slots[0],  # of a planned decoder's one group
            seqs=attention.seqs,
            block_tables=attention.block_tables[0],
            table=None if deltas is None else deltas.table,
            scale=None if deltas is None else deltas.scale,
        )


class Packer:
    """Packs works over one KV cache, one row pool, and the states of layers that keep some."""

    def __init__(self, cache: KVCache, pool: RowPool, states: StateCache | None) -> None:
        self._cache = cache
        self._pool = pool
        self._states = states

    def pack(
        self,
        works: Seq[Work],
        tokens_after: Callable[[Seq[Sequence]], Tensor] | None,
        *,
        adapters: bool,
        drafts_apart: bool,
    ) -> Batch:
        """Works that share a forward pass.

        Args:
            tokens_after: gives the pending tokens of sequences, on the device; see `InFlightStep`.
            adapters: whether sequences' adapters add anything.
            drafts_apart: a draft attends as a request of its own: as decoding is recorded.
        """
        size = self._cache.block_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[list[int]] = [[] for _ in self._cache.windows]  # per group of KV layers
        keep: list[int] = []
        uses: list[Use] = []
        kept: list[int] = []
        seqs: list[tuple[int, int, int]] = []
        runs: list[tuple[int, ...]] = []
        pending: list[tuple[int, Sequence]] = []  # whose last token is pending, and where that comes among the ids
        extra_uses: list[ExtraUse] = []
        extra_kept: list[ExtraUse] = []
        heads: dict[int, tuple[int, Classifier]] = {}
        width = max(-(-(work.start + work.count) // size) for work in works)
        height = len(works) + drafts_apart * sum(len(work.drafts) for work in works)
        tables = np.zeros((len(slots), height, width), np.int32)
        for index, work in enumerate(works):
            sequence, first, last = work.sequence, work.start, work.start + work.count
            offset = len(ids)
            ids += sequence.tokens[first : last - len(work.drafts)]
            ids += work.drafts  # none after a pending token
            if work.pending:
                pending.append((len(ids), sequence))
                ids.append(0)
            runs += [
                (offset + begin - first, offset + end - first, read, write) for begin, end, read, write in work.runs
            ]
            places = range(first, last)
            positions += places
            for table, group in zip(sequence.tables, slots, strict=True):
                group += [table[position // size] * size + position % size for position in places]
            begins = [first, *range(last - len(work.drafts), last)] if drafts_apart and work.drafts else [first]
            for begin, end in pairwise([*begins, last]):
                for table, rows in zip(sequence.tables, tables, strict=True):
                    blocks = table[: -(-last // size)]
                    rows[len(seqs), : len(blocks)] = blocks
                seqs.append((offset + begin - first, offset + end - first, end))
            own = [offset + p - first for p in work.prompt_rows]
            if work.samples:
                own += range(len(ids) - 1 - len(work.drafts) + work.skipped, len(ids))
            keep += own
            kept.append(len(own))
            for digest, weight in sequence.adapter if adapters else ():
                begin = max(offset, offset + sequence.starts.get(digest, 0) - first)
                if begin >= len(ids):  # an activated adapter that is not in force yet
                    continue
                uses.append(Use(begin, len(ids), digest, weight))
                adapter = self._pool.adapter(digest)
                if adapter is None or (extras := adapter.extras) is None:
                    continue
                if work.classifies and extras.classifier is not None:
                    heads[index] = len(ids) - 1, extras.classifier
                if extras.in_model:
                    skipped = sum(token < begin for token in own)
                    extra_uses.append(ExtraUse(begin, len(ids), extras, weight))
                    extra_kept.append(ExtraUse(len(keep) - len(own) + skipped, len(keep), extras, weight))
        device = self._pool.device

        def tensor(numbers: list[Any], dtype: type[np.generic] = np.int64) -> Tensor:
            return sent(torch.from_numpy(np.array(numbers, dtype)), device)  # half as long as a tensor from a list

        attention = PagedAttention(
            self._cache,
            [tensor(group) for group in slots],
            tensor(seqs, np.int32),
            [sent(torch.from_numpy(group), device) for group in tables],
        )
        packed = tensor(ids)
        if pending:
            assert tokens_after is not None
            tokens = tokens_after([sequence for _, sequence in pending])
            if len(pending) == len(ids):
                packed = tokens
            else:
                packed[tensor([place for place, _ in pending])] = tokens
        return Batch(
            works=works,
            ids=packed,
            positions=tensor(positions),
            attention=attention,
            deltas=self._pool.deltas(_joined(uses)),
            keep=tensor(keep),
            kept=kept,
            extras=StepExtras(extra_uses, extra_kept) if extra_uses else None,
            states=None if self._states is None else StateStep(self._states, tensor(runs, np.int32)),
            heads=heads,
        )


def _joined(uses: list[Use]) -> list[Use]:
    """Neighbouring runs of one adapter become one, unless several adapters lie on the same tokens."""
    joined: list[Use] = []
    for use in uses:
        last = joined[-1] if joined else None
        if last is not None and last.end == use.start and last[2:] == use[2:]:
            joined[-1] = last._replace(end=use.end)
        else:
            joined.append(use)
    return joined


@dataclass
class WorkResult:
    """What one work of a step gave."""

    tokens: list[int] = field(default_factory=list)  # drawn after it: none in the middle of a prompt
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of those tokens, when asked for
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # one per entry of `Work.prompt_rows`
    scores: list[float] = field(default_factory=list)  # of a classification head
    failed: bool = False  # its logits are not finite


@dataclass(frozen=True)
class Outcome:
    """Tokens drawn and prompt positions scored by one forward pass; `results` reads them.

    drawn: for each work that samples one row, and one more for each of its drafts that is looked at; None where none
        samples.
    scored: by work's index, of a part of a prompt: whether all logits are finite, and the log-probabilities.
    classified: by work's index, of a prompt that is classified.
    """

    works: Seq[Work]
    drawn: Drawn | None
    scored: dict[int, tuple[Tensor, Logprobs]] = field(default_factory=dict)
    classified: dict[int, Readback] = field(default_factory=dict)

    def results(self) -> list[WorkResult]:
        """Wait for the device. One result per work, in order."""
        results = [WorkResult() for _ in self.works]
        for index, (finite, logprobs) in self.scored.items():
            if finite:
                results[index].prompt_logprobs = logprobs.read()
            else:
                results[index].failed = True
        for index, scores in self.classified.items():
            [results[index].scores] = scores.lists()
            results[index].failed = not all(map(math.isfinite, results[index].scores))
        if self.drawn is not None:
            draws = iter(self.drawn.draws())
            for work, result in zip(self.works, results, strict=True):
                if work.samples:
                    accept(work, list(islice(draws, _draws_of(work))), result)
        return results


@dataclass(frozen=True)
class InFlightStep:
    """A step that was submitted to the device."""

    step: Step
    outcomes: list[tuple[Seq[int], Outcome]]  # of each forward pass, and the places of its works in the step

    def tokens_after(self, sequences: Seq[Sequence]) -> Tensor:
        """The token that each of them is given by this step: int64, on the device, which may not have got so far."""
        rows: dict[Sequence, int] = {}
        drawn: list[Tensor] = []
        count = 0
        for _, outcome in self.outcomes:
            if outcome.drawn is not None:
                drawn.append(outcome.drawn.tokens)
                for work in outcome.works:
                    if work.samples:
                        rows[work.sequence] = count
                        count += _draws_of(work)
        tokens = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
        places = [rows[sequence] for sequence in sequences]
        if places != list(range(len(tokens))):
            tokens = tokens[sent(torch.tensor(places), tokens.device)]
        return tokens.clamp(min=0)  # any, where the logits were not finite

    def results(self) -> list[WorkResult]:
        """Wait for the device. One result per work, in order; to be called once."""
        results: dict[int, WorkResult] = {}
        for places, outcome in self.outcomes:
            results |= zip(places, outcome.results(), strict=True)
        return [results[place] for place in range(len(self.step.works))]


def draw(batch: Batch, logits: Tensor, classified: dict[int, Readback], eos_token_ids: Seq[int]) -> Outcome:
    """Score prompts and draw tokens. logits: fp32 [K, V], of the batch's kept rows. classified: as in `Outcome`."""
    scored: dict[int, tuple[Tensor, Logprobs]] = {}
    drawn: list[int] = []  # logit rows
    rows: list[Row] = []
    end = 0
    for index, (work, count) in enumerate(zip(batch.works, batch.kept, strict=True)):
        begin, end = end, end + count
        if work.prompt_rows:
            scored[index] = _score_prompt(work, logits[begin : begin + len(work.prompt_rows)])
        if work.samples:
            drawn += range(end - _draws_of(work), end)
            rows += _rows(work)
    if not rows:
        return Outcome(batch.works, None, scored, classified)
    # Mostly all of them: no copy.
    chosen = logits if len(drawn) == len(logits) else logits[sent(torch.tensor(drawn), logits.device)]
    return Outcome(batch.works, sample(chosen, rows, eos_token_ids), scored, classified)


def takes_argmax(work: Work) -> bool:
    """Whether a work's tokens are its logits' argmax, and nothing else is wanted of those."""
    if work.sequence.constraint is not None:
        return False
    row = next(_rows(work))  # those after drafts are no different
    return not work.prompt_rows and row.greedy and row.plain and row.sampling.logprobs is None


def accept(work: Work, draws: list[Draw], result: WorkResult) -> None:
    """Accept drawn tokens up to the first that differs from its draft: they equal those of single steps."""
    result.tokens += work.drafts[: work.skipped]
    for draw, draft in zip(draws, [*work.drafts[work.skipped :], None], strict=True):
        if draw.token is None:
            result.failed = not result.tokens  # else once more in a step of its own, to fail there
            return
        result.tokens.append(draw.token)
        if draw.logprob is not None:
            result.logprobs.append(draw.logprob)
        if draw.token != draft:
            return


def _score_prompt(work: Work, logits: Tensor) -> tuple[Tensor, Logprobs]:
    """Whether all logits are finite, and the log-probabilities of the prompt tokens that follow."""
    sequence = work.sequence
    following = torch.tensor([sequence.tokens[position + 1] for position in work.prompt_rows])
    alternatives = sequence.sampling.prompt_logprobs or 0
    return logits.isfinite().all(), Logprobs(logits, sent(following, logits.device), [alternatives] * len(following))


def _draws_of(work: Work) -> int:
    """How many rows of a work are drawn from."""
    return 1 + len(work.drafts) - work.skipped


def _rows(work: Work) -> Iterator[Row]:
    """How a work's tokens are to be drawn: after the last known one, and after each draft as if it were right."""
    sequence, drafts = work.sequence, work.drafts
    if sequence.constraint is not None:
        for count, (mask, ends) in enumerate(sequence.constraint.masks(), work.skipped):
            # Where a grammar has nothing more, the text ends, however short it is.
            sampling = replace(sequence.sampling, min_tokens=0) if ends else sequence.sampling
            before = [*sequence.tokens, *drafts[:count]]
            yield Row(sampling, before, len(sequence.prompt), torch.from_numpy(mask))
        return
    yield Row(sequence.sampling, sequence.tokens, len(sequence.prompt), pending=work.pending)
    for count in range(1, len(drafts) + 1):
        yield Row(sequence.sampling, [*sequence.tokens, *drafts[:count]], len(sequence.prompt))
