"""The works of a forward pass as tensors, and its results: tokens, log-probabilities, failures.

`Packer` packs the tokens into one row, with KV slots, block tables and adapter segments. An `Outcome` is made when the
forward pass is submitted to the device, and read when the step is collected.
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

from adapters.device.memory import to_device
from adapters.device.pool import RowPool, SegmentDeltas, Use
from adapters.device.variants import Classifier, ExtraUse, StepExtras
from server.engine.graphs import DecodeStep
from server.engine.sampling import Draw, DrawnTokens, Logprobs, Readback, Row, sample
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
    logits_indices: Tensor  # int64 [K], the logits indices: rows with logits
    logits_counts: list[int]  # per work, its number of consecutive entries in `logits_indices`
    extras: StepExtras | None  # adapters' variants, beyond rank rows
    states: StateStep | None  # of the layers that keep a state
    heads: dict[int, tuple[int, Classifier]]  # of classifying works, by index: row of the last token, head

    @property
    def is_decode(self) -> bool:
        """Whether each request computes one token, and all logits are wanted."""
        return len(self.ids) == len(self.attention.seqs) == len(self.logits_indices)

    def classify(self, hidden: Tensor) -> dict[int, Readback]:
        """Return the scores of classifying works, by index. hidden: the decoder's output for all rows, [T, hidden].

        Each head sees its row alone, so that no score depends on other requests in the batch.
        """
        return {index: Readback(head.scores(hidden[row])) for index, (row, head) in self.heads.items()}

    def decode_step(self) -> DecodeStep:
        """Return the batch as the input of a planned decoder."""
        attention, deltas = self.attention, self.deltas
        return DecodeStep(
            ids=self.ids,
            positions=self.positions,
            slots=attention.slots[0],  # a planned decoder has one KV group
            seqs=attention.seqs,
            block_tables=attention.block_tables[0],
            table=None if deltas is None else deltas.table,
            scale=None if deltas is None else deltas.scale,
        )


class Packer:
    """Packs works over one KV cache, one row pool, and the layers' states, if any."""

    def __init__(self, cache: KVCache, pool: RowPool, states: StateCache | None) -> None:
        self._cache = cache
        self._pool = pool
        self._states = states

    def pack(
        self,
        works: Seq[Work],
        pending_tokens: Callable[[Seq[Sequence]], Tensor] | None,
        *,
        adapters: bool,
        drafts_as_requests: bool,
    ) -> Batch:
        """Pack the works of one forward pass.

        Args:
            pending_tokens: returns the pending tokens of sequences, on the device; see `InFlightStep`.
            adapters: whether adapters are applied; false over merged weights.
            drafts_as_requests: let each draft attend as a request of its own, which fits the recorded decode graphs.
        """
        size = self._cache.block_size
        ids: list[int] = []
        positions: list[int] = []
        slots: list[list[int]] = [[] for _ in self._cache.windows]  # per group of KV layers
        logits_indices: list[int] = []
        uses: list[Use] = []
        logits_counts: list[int] = []
        seqs: list[tuple[int, int, int]] = []
        runs: list[tuple[int, ...]] = []
        pending: list[tuple[int, Sequence]] = []  # (index among the ids, sequence) of each pending token
        extra_uses: list[ExtraUse] = []
        extra_kept: list[ExtraUse] = []
        heads: dict[int, tuple[int, Classifier]] = {}
        width = max(-(-(work.start + work.count) // size) for work in works)
        height = len(works) + drafts_as_requests * sum(len(work.drafts) for work in works)
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
            own_positions = range(first, last)
            positions += own_positions
            for table, group in zip(sequence.tables, slots, strict=True):
                group += [table[position // size] * size + position % size for position in own_positions]
            begins = [first, *range(last - len(work.drafts), last)] if drafts_as_requests and work.drafts else [first]
            for begin, end in pairwise([*begins, last]):
                for table, rows in zip(sequence.tables, tables, strict=True):
                    blocks = table[: -(-last // size)]
                    rows[len(seqs), : len(blocks)] = blocks
                seqs.append((offset + begin - first, offset + end - first, end))
            own = [offset + p - first for p in work.prompt_rows]
            if work.samples:
                own += range(len(ids) - 1 - len(work.drafts) + work.skipped, len(ids))
            logits_indices += own
            logits_counts.append(len(own))
            for digest, weight in sequence.adapter if adapters else ():
                begin = max(offset, offset + sequence.adapter_starts.get(digest, 0) - first)
                if begin >= len(ids):  # an activated adapter not in force yet
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
                    extra_kept.append(
                        ExtraUse(len(logits_indices) - len(own) + skipped, len(logits_indices), extras, weight)
                    )
        device = self._pool.device

        def tensor(numbers: list[Any], dtype: type[np.generic] = np.int64) -> Tensor:
            return to_device(
                torch.from_numpy(np.array(numbers, dtype)), device
            )  # twice as fast as a tensor from a list

        attention = PagedAttention(
            self._cache,
            [tensor(group) for group in slots],
            tensor(seqs, np.int32),
            [to_device(torch.from_numpy(group), device) for group in tables],
        )
        packed = tensor(ids)
        if pending:
            assert pending_tokens is not None
            tokens = pending_tokens([sequence for _, sequence in pending])
            if len(pending) == len(ids):
                packed = tokens
            else:
                packed[tensor([place for place, _ in pending])] = tokens
        return Batch(
            works=works,
            ids=packed,
            positions=tensor(positions),
            attention=attention,
            deltas=self._pool.deltas(_join_adjacent(uses)),
            logits_indices=tensor(logits_indices),
            logits_counts=logits_counts,
            extras=StepExtras(extra_uses, extra_kept) if extra_uses else None,
            states=None if self._states is None else StateStep(self._states, tensor(runs, np.int32)),
            heads=heads,
        )


def _join_adjacent(uses: list[Use]) -> list[Use]:
    """Join adjacent uses of one adapter, unless several adapters apply to the same tokens."""
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
    """The results of one work."""

    tokens: list[int] = field(default_factory=list)  # drawn tokens: none in the middle of a prompt
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of those tokens, when requested
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # one per entry of `Work.prompt_rows`
    scores: list[float] = field(default_factory=list)  # of a classification head
    failed: bool = False  # its logits are not finite


@dataclass(frozen=True)
class Outcome:
    """Tokens drawn and prompt positions scored by one forward pass; `results` reads them.

    drawn: one row for each work that samples, and one more for each of its drafts that is verified; None if no work
        samples.
    scored: by work's index, for chunks of prompts: whether all logits are finite, and the log-probabilities.
    classified: by work's index, the scores of classified prompts.
    """

    works: Seq[Work]
    drawn: DrawnTokens | None
    scored: dict[int, tuple[Tensor, Logprobs]] = field(default_factory=dict)
    classified: dict[int, Readback] = field(default_factory=dict)

    def results(self) -> list[WorkResult]:
        """Wait for the device, and return one result per work, in order."""
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
                    accept(work, list(islice(draws, _num_draws(work))), result)
        return results


@dataclass(frozen=True)
class InFlightStep:
    """A step submitted to the device."""

    step: Step
    outcomes: list[tuple[Seq[int], Outcome]]  # per forward pass: the indices of its works in the step, its outcome

    def pending_tokens(self, sequences: Seq[Sequence]) -> Tensor:
        """Return the token that this step draws for each sequence: int64, on the device, perhaps not computed yet."""
        rows: dict[Sequence, int] = {}
        drawn: list[Tensor] = []
        count = 0
        for _, outcome in self.outcomes:
            if outcome.drawn is not None:
                drawn.append(outcome.drawn.tokens)
                for work in outcome.works:
                    if work.samples:
                        rows[work.sequence] = count
                        count += _num_draws(work)
        tokens = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
        indices = [rows[sequence] for sequence in sequences]
        if indices != list(range(len(tokens))):
            tokens = tokens[to_device(torch.tensor(indices), tokens.device)]
        return tokens.clamp(min=0)  # an arbitrary token where the logits were not finite

    def results(self) -> list[WorkResult]:
        """Wait for the device, and return one result per work, in order. To be called once."""
        results: dict[int, WorkResult] = {}
        for indices, outcome in self.outcomes:
            results |= zip(indices, outcome.results(), strict=True)
        return [results[index] for index in range(len(self.step.works))]


def draw(batch: Batch, logits: Tensor, classified: dict[int, Readback], eos_token_ids: Seq[int]) -> Outcome:
    """Score prompts and draw tokens. logits: fp32 [K, V], at the logits indices. classified: as in `Outcome`."""
    scored: dict[int, tuple[Tensor, Logprobs]] = {}
    drawn: list[int] = []  # logit rows
    rows: list[Row] = []
    end = 0
    for index, (work, count) in enumerate(zip(batch.works, batch.logits_counts, strict=True)):
        begin, end = end, end + count
        if work.prompt_rows:
            scored[index] = _score_prompt(work, logits[begin : begin + len(work.prompt_rows)])
        if work.samples:
            drawn += range(end - _num_draws(work), end)
            rows += _sampling_rows(work)
    if not rows:
        return Outcome(batch.works, None, scored, classified)
    # Usually all rows are drawn from: no copy.
    chosen = logits if len(drawn) == len(logits) else logits[to_device(torch.tensor(drawn), logits.device)]
    return Outcome(batch.works, sample(chosen, rows, eos_token_ids), scored, classified)


def needs_only_argmax(work: Work) -> bool:
    """Whether a work's tokens are the argmax of its logits, and the logits are needed for nothing else."""
    if work.sequence.constraint is not None:
        return False
    row = next(_sampling_rows(work))  # the rows after drafts have the same sampling
    return not work.prompt_rows and row.greedy and row.plain and row.sampling.logprobs is None


def accept(work: Work, draws: list[Draw], result: WorkResult) -> None:
    """Accept drawn tokens up to the first that differs from its draft: the same tokens as without drafts."""
    result.tokens += work.drafts[: work.skipped]
    for draw, draft in zip(draws, [*work.drafts[work.skipped :], None], strict=True):
        if draw.token is None:
            result.failed = not result.tokens  # otherwise the next step draws this token again, and fails
            return
        result.tokens.append(draw.token)
        if draw.logprob is not None:
            result.logprobs.append(draw.logprob)
        if draw.token != draft:
            return


def _score_prompt(work: Work, logits: Tensor) -> tuple[Tensor, Logprobs]:
    """Return whether all logits are finite, and the log-probabilities of the prompt tokens that follow."""
    sequence = work.sequence
    following = torch.tensor([sequence.tokens[position + 1] for position in work.prompt_rows])
    alternatives = sequence.sampling.prompt_logprobs or 0
    return logits.isfinite().all(), Logprobs(
        logits, to_device(following, logits.device), [alternatives] * len(following)
    )


def _num_draws(work: Work) -> int:
    """Return the number of a work's rows that are drawn from."""
    return 1 + len(work.drafts) - work.skipped


def _sampling_rows(work: Work) -> Iterator[Row]:
    """Yield the rows to draw from: after the last known token, and after each draft as if it were right."""
    sequence, drafts = work.sequence, work.drafts
    if sequence.constraint is not None:
        for count, (mask, ends) in enumerate(sequence.constraint.masks(), work.skipped):
            # Where the grammar allows only an end, the text ends even before `min_tokens`.
            sampling = replace(sequence.sampling, min_tokens=0) if ends else sequence.sampling
            before = [*sequence.tokens, *drafts[:count]]
            yield Row(sampling, before, len(sequence.prompt), torch.from_numpy(mask))
        return
    yield Row(sequence.sampling, sequence.tokens, len(sequence.prompt), pending=work.pending)
    for count in range(1, len(drafts) + 1):
        yield Row(sequence.sampling, [*sequence.tokens, *drafts[:count]], len(sequence.prompt))
