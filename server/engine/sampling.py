"""Sampling: penalties, truncation, the draw, and raw log-probabilities; vectorised over rows, on any device.

The steps for a row, in vLLM's order: allowed tokens, `min_tokens`, `logit_bias`, penalties; then temperature, `min_p`,
`top_k`, `top_p`; then one draw. Log-probabilities are those of the raw logits.

A row's outcome is a function of that row alone. Its randomness is a hash of (seed, position), so other requests in the
batch, preemption and speculation change nothing; and no reduction here depends on the number of rows (torch splits a
sum over threads when it yields a single number, so long sums go through blocks).

Nothing here waits for a GPU: results are read later, from asynchronous copies to the host.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters import kernels
from adapters.device.memory import row_index, to_device
from adapters.kernels import Truncation
from server.engine import drawing
from server.messages.protocol import Sampling, TokenLogprob

NO_TOKEN = -1  # in place of a token, as in `kernels.argmax`
GREEDY_BELOW = 1e-5  # temperatures below this count as 0, as in vLLM
_BYTES = torch.where((torch.arange(256)[:, None] >> torch.arange(8)) & 1 == 1, 0.0, -torch.inf)  # by a mask's byte
_CPU_SLICE = 2**18  # logits worked on at once on a CPU: temporaries of 1 MiB stay in its cache


@dataclass(frozen=True, slots=True)
class Row:
    """The sampling of one row of logits."""

    sampling: Sampling
    tokens: Sequence[int]  # all known tokens before the one to be drawn: prompt, then generated ones
    num_prompt: int
    allowed: Tensor | None = None  # int32 [ceil(vocabulary / 32)]: bit i % 32 of word i // 32 allows token i
    pending: int = 0  # tokens between those and the one to be drawn, not yet read back; 0 with penalties

    @property
    def position(self) -> int:
        """The number of tokens generated before this one."""
        return len(self.tokens) - self.num_prompt + self.pending

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.sampling.temperature < GREEDY_BELOW or self.sampling.top_p == 0

    @property
    def plain(self) -> bool:
        """Whether the logits are not adjusted before temperature and truncation."""
        sampling = self.sampling
        return (
            self.allowed is None
            and self.position >= sampling.min_tokens
            and not sampling.logit_bias
            and sampling.repetition_penalty == 1.0
            and not sampling.frequency_penalty
            and not sampling.presence_penalty
        )


@dataclass(frozen=True, slots=True)
class Draw:
    """The outcome of one row. No token: its logits were not all finite, or no token was allowed."""

    token: int | None
    logprob: TokenLogprob | None = None  # present when requested


class Readback:
    """Tensors being copied to the host."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._copied: torch.cuda.Event | None = None
        device = tensors[0].device
        if device.type == "cuda":
            self._tensors = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
            for copy, tensor in zip(self._tensors, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.current_stream(device).record_event()

    def lists(self) -> list[list[Any]]:
        """Wait for the copy, and return the tensors as lists."""
        if self._copied is not None:
            self._copied.synchronize()
        return [tensor.tolist() for tensor in self._tensors]


class Logprobs:
    """Log-probabilities of given tokens under the raw logits, with ranks and the likeliest alternatives.

    Used for generated and prompt tokens alike. `logits` may be overwritten after construction.

    Args:
        logits: float32 [rows, vocabulary].
        tokens: int64 [rows].
        counts: number of alternatives per row; ties are ordered by id.
    """

    def __init__(self, logits: Tensor, tokens: Tensor, counts: Sequence[int]) -> None:
        self._counts = counts
        self._parts = [
            Readback(tokens[part], *_logprobs(logits[part], tokens[part], max(counts[part])))
            for part in _slices(logits)
        ]

    def read(self) -> list[TokenLogprob]:
        """Wait for the device, and return one entry per row."""
        lines: list[TokenLogprob] = []
        for part in self._parts:
            for token, value, rank, ids, values in zip(*part.lists(), strict=True):
                count = self._counts[len(lines)]
                lines.append(TokenLogprob(token, value, rank, list(zip(ids[:count], values[:count], strict=True))))
        return lines


class DrawnTokens:
    """One drawn token per row, perhaps not computed yet.

    tokens: int64 [rows], on the logits' device; `NO_TOKEN` for a row with logits that were not all finite, or with all
        tokens forbidden.
    logprobs: of the rows `scored`, in order.
    """

    def __init__(self, tokens: Tensor, logprobs: Logprobs | None = None, scored: Sequence[int] = ()) -> None:
        self.tokens = tokens
        self._host = Readback(tokens)
        self._logprobs = logprobs
        self._scored = scored

    def draws(self) -> list[Draw]:
        """Wait for the device, and return the drawn tokens, one per row."""
        [tokens] = self._host.lists()
        logprobs = dict(zip(self._scored, self._logprobs.read(), strict=True)) if self._logprobs else {}
        return [
            Draw(None) if token == NO_TOKEN else Draw(token, logprobs.get(index)) for index, token in enumerate(tokens)
        ]


def sample(logits: Tensor, rows: Sequence[Row], eos_token_ids: Collection[int] = ()) -> DrawnTokens:
    """Draw one token per row.

    Args:
        logits: float32 [rows, vocabulary]; not modified.
        rows: one per row of logits.
        eos_token_ids: forbidden (unless the row ignores EOS) until `min_tokens`, as are the row's stop tokens.
    """
    parts = [_sample(logits[part], rows[part], eos_token_ids) for part in _slices(logits)]
    tokens = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
    scored = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
    if not scored:
        return DrawnTokens(tokens)
    places = row_index(scored, logits)
    counts = [rows[index].sampling.logprobs or 0 for index in scored]
    return DrawnTokens(tokens, Logprobs(logits[places], tokens[places].clamp(min=0), counts), scored)


def _sample(logits: Tensor, rows: Sequence[Row], eos_token_ids: Collection[int]) -> Tensor:
    tokens = kernels.argmax(logits)
    scores = logits
    if not all(row.plain for row in rows):
        scores = _adjust(logits, rows, eos_token_ids)
        # A bias may overflow, and a mask may leave nothing.
        tokens = torch.where(tokens == NO_TOKEN, NO_TOKEN, kernels.argmax(scores, masked=True))
    drawn = [index for index, row in enumerate(rows) if not row.greedy]
    if drawn:
        places = row_index(drawn, scores)
        samplings = [(rows[index].sampling, rows[index].position) for index in drawn]
        truncations = [Truncation(each.temperature, each.min_p, each.top_k, each.top_p) for each, _ in samplings]
        uniforms = [uniform(each.seed, position) for each, position in samplings]
        draw = compiled.draw if (compiled := kernels.cpu_kernels(scores)) else drawing.draw
        found = draw(scores[places], truncations, uniforms)
        tokens[places] = torch.where(tokens[places] == NO_TOKEN, NO_TOKEN, found)
    return tokens


def _logprobs(logits: Tensor, tokens: Tensor, max_alternatives: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each token's log-probability and rank, and ids and log-probabilities [rows, most] of the likeliest."""
    if compiled := kernels.cpu_kernels(logits):
        return compiled.logprobs(logits, tokens, max_alternatives)
    vocabulary = logits.shape[1]
    peak = logits.amax(-1, keepdim=True)
    total = drawing.block_sums((logits - peak).exp_()).sum(-1)  # float64 [rows]
    log_total = peak.double() + total.log()[:, None]  # [rows, 1]
    own = logits.gather(1, tokens[:, None])  # [rows, 1]
    values = (own.double() - log_total).squeeze(1)
    ranks = (logits > own).sum(-1) + 1
    if not max_alternatives:
        nothing = tokens.new_empty(len(tokens), 0)
        return values, ranks, nothing, nothing.double()
    # topk orders ties arbitrarily; so it ranks unique keys: the logit's bits, mapped so that integers order as the
    # logits do, then the id, the lowest first.
    bits = (logits + 0.0).view(torch.int32)  # -0 becomes 0
    ids = torch.arange(vocabulary - 1, -1, -1, device=logits.device)
    keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | ids
    best = vocabulary - 1 - (keys.topk(min(max_alternatives, vocabulary)).values & 0xFFFFFFFF)
    return values, ranks, best, logits.gather(1, best).double() - log_total


def _slices(logits: Tensor) -> Iterator[slice]:
    """Return the slices of rows to be processed one after the other."""
    rows = len(logits)
    if logits.device.type == "cpu":
        step = max(1, _CPU_SLICE // logits.shape[1])
    else:  # a GPU's order of summation depends on the number of rows
        step = 1 if kernels.is_deterministic() else max(1, rows)
    return (slice(start, start + step) for start in range(0, rows, step))


# --- masks, biases and penalties -----------------------------------------------------------------


def _adjust(logits: Tensor, rows: Sequence[Row], eos_token_ids: Collection[int]) -> Tensor:
    """Return a copy of the logits with masks, biases and penalties applied."""
    scores = logits.clone(memory_format=torch.contiguous_format)
    compiled = kernels.cpu_kernels(scores)
    for index, row in enumerate(rows):
        if row.allowed is not None and compiled:
            compiled.mask_(scores[index], row.allowed)
        elif row.allowed is not None:
            scores[index] += _mask_bias(row.allowed, logits)

    early = [index for index, row in enumerate(rows) if row.position < row.sampling.min_tokens]
    if early:
        ends = {True: array("q"), False: array("q", eos_token_ids)}
        stops = [
            [token for token in row.sampling.stops[1] + ends[row.sampling.ignore_eos] if token < logits.shape[1]]
            for row in (rows[index] for index in early)
        ]
        where, ids = _token_indices(early, stops, logits)
        scores[where, ids] = scores.new_full((len(ids),), -torch.inf)  # a Python number would synchronise with the GPU

    for index, row in enumerate(rows):
        if row.sampling.logit_bias:
            tokens, biases = row.sampling.biases
            columns = to_device(torch.frombuffer(tokens, dtype=torch.int64), logits.device)
            scores[index, columns] += to_device(torch.frombuffer(biases, dtype=torch.float32), logits.device)

    repeating = [index for index, row in enumerate(rows) if row.sampling.repetition_penalty != 1.0]
    if repeating:
        where, ids = _token_indices(repeating, [rows[index].tokens for index in repeating], logits)
        penalty = _column(rows, lambda sampling: sampling.repetition_penalty, logits)[where]
        seen = scores[where, ids]
        scores[where, ids] = torch.where(seen > 0, seen / penalty, seen * penalty)  # the same value for repeated tokens

    counting = [i for i, row in enumerate(rows) if row.sampling.frequency_penalty or row.sampling.presence_penalty]
    if counting:
        counts = [Counter(rows[index].tokens[rows[index].num_prompt :]) for index in counting]
        where, ids = _token_indices(counting, [list(count) for count in counts], logits)
        times = torch.tensor([times for count in counts for times in count.values()], dtype=torch.float32)
        frequency = _column(rows, lambda sampling: sampling.frequency_penalty, logits)[where]
        presence = _column(rows, lambda sampling: sampling.presence_penalty, logits)[where]
        scores[where, ids] -= frequency * to_device(times, logits.device) + presence
    return scores


def _mask_bias(allowed: Tensor, logits: Tensor) -> Tensor:
    """Return a mask as an addend to a row of logits: 0 or -inf; tokens beyond the mask are not allowed."""
    vocabulary = logits.shape[1]
    missing = -(-vocabulary // 32) - len(allowed)
    words = F.pad(allowed, (0, missing)) if missing > 0 else allowed
    if logits.is_cpu:  # a table lookup per byte is many times as fast as expanding bits
        return _BYTES.index_select(0, words.view(torch.uint8).int()).flatten()[:vocabulary]
    bits = (to_device(words, logits.device)[:, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1
    return torch.where(bits.flatten()[:vocabulary].bool(), 0.0, -torch.inf)


def _token_indices(rows: Sequence[int], tokens: Sequence[Sequence[int]], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return an index into the logits of every token in each row's list, repetitions included."""
    flat = array("q")  # far faster than a tensor from a list, and histories are long
    for line in tokens:
        flat.extend(line)
    ids = torch.frombuffer(flat, dtype=torch.int64) if flat else torch.empty(0, dtype=torch.int64)
    lengths = torch.tensor([len(line) for line in tokens])
    return to_device(torch.tensor(rows).repeat_interleave(lengths), logits.device), to_device(ids, logits.device)


def _column(rows: Sequence[Row], value: Callable[[Sampling], float], like: Tensor) -> Tensor:
    """Return one number of every row's sampling, float32 [rows]."""
    return to_device(torch.tensor([value(row.sampling) for row in rows], dtype=torch.float32), like.device)


# --- randomness ------------------------------------------------------------------------------------


def uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1), uniform over seeds and positions, and the same on every machine."""
    key = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53
