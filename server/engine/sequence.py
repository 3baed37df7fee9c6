"""Sequences, and the works of a step. `scheduler` decides, `runner` computes.

A step is *submitted* to the device, is in flight, and is *collected* when its drawn tokens have been read. A sequence's
lengths advance when a step is submitted, its `tokens` when the step is collected: `pending` counts the difference.
"""

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal, Protocol

from server.engine.grammar import Constraint
from server.engine.prompt_lookup import Drafter
from server.messages.protocol import FinishReason, Sampling

AdapterKey = tuple[tuple[str, float], ...]  # (digest, weight) of each adapter, in order of application; () is the base


@dataclass(eq=False, slots=True, kw_only=True)
class Sequence:
    """One request's tokens and progress. Only the scheduler changes it, except for `device_seconds`."""

    id: str
    prompt: Seq[int]
    sampling: Sampling
    adapter: AdapterKey = ()
    tenant: str = ""
    weight: float = 1.0  # of the tenant, relative to others
    priority: int = 0  # among the tenant's sequences; the lowest comes first
    cache_salt: str = ""
    arrival: float = 0.0  # seconds, on the clock of `schedule`
    background: bool = False  # runs only in steps that no other sequence can use; the scheduler may lift this
    constraint: Constraint | None = None  # of the grammar

    tokens: list[int] = field(init=False)  # prompt, then generated tokens
    pending: int = field(init=False, default=0)  # further tokens, drawn on the device and not yet read
    max_new_tokens: int = field(init=False, default=0)  # most tokens to generate
    num_computed: int = field(init=False, default=0)  # leading tokens computed by submitted steps
    in_flight: int = field(init=False, default=0)  # works submitted and not yet collected
    # A block table per group of KV layers: entry i holds tokens [i * size, ...). Empty while not running.
    tables: list[list[int]] = field(init=False, default_factory=list)
    slot: int = field(init=False, default=0)  # of its state, where layers keep one
    source_slot: int = field(init=False, default=0)  # slot of the state before the next work
    needs_tokens: bool = field(init=False)  # the next token's draw, or its drafts, need the last ones on the host
    prompt_scored: int = field(init=False, default=0)  # prompt positions with log-probabilities delivered
    adapter_starts: Mapping[str, int] = field(
        init=False, default_factory=dict
    )  # digest -> first position under that adapter
    cached_tokens: int = field(init=False, default=0)  # prompt tokens found in the prefix cache at first admission
    first_scheduled: float | None = field(init=False, default=None)
    device_seconds: float = field(init=False, default=0.0)  # not reported yet
    finish_reason: FinishReason | None = field(init=False, default=None)
    stop_token: int | None = field(init=False, default=None)  # the token that ended it, also the last of `tokens`
    error: str | None = field(init=False, default=None)
    code: str | None = field(init=False, default=None)

    # Background sequences come last; then by priority and arrival.
    order: tuple[bool, int, int] = field(init=False, default=(False, 0, -1))
    refused_since: int | None = field(init=False, default=None)  # the step in which its adapter first found no room
    block_keys: list[bytes] = field(init=False, default_factory=list)  # chain keys of the leading full blocks
    drafter: Drafter | None = field(init=False, default=None)  # None: no speculation

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        sampling = self.sampling
        penalized = sampling.repetition_penalty != 1.0 or sampling.frequency_penalty or sampling.presence_penalty
        self.needs_tokens = bool(penalized or sampling.speculative_tokens or sampling.grammar is not None)
        if sampling.speculative_tokens:
            self.drafter = Drafter(sampling.speculative_tokens)

    @property
    def length(self) -> int:
        """The number of all tokens, pending ones included."""
        return len(self.tokens) + self.pending

    @property
    def num_generated(self) -> int:
        """The number of generated tokens that have been read."""
        return len(self.tokens) - len(self.prompt)

    @property
    def ended(self) -> bool:
        """Whether it has finished or failed."""
        return self.finish_reason is not None or self.error is not None

    @property
    def num_uncomputed(self) -> int:
        """The number of tokens in no submitted step yet; 1 while decoding."""
        return len(self.tokens) + self.pending - self.num_computed

    @property
    def tokens_left(self) -> int:
        """The number of tokens that it may still generate, after pending ones."""
        return self.max_new_tokens - (self.length - len(self.prompt))

    @property
    def awaits_token(self) -> bool:
        """Whether it cannot be scheduled until its pending token is read."""
        return bool(self.pending) and (self.needs_tokens or self.tokens_left == 0)

    def check_stop(self, eos: Collection[int]) -> None:
        """Set `finish_reason` if the newest token ends the sequence. `eos`: the base's, which requests may ignore."""
        token, sampling = self.tokens[-1], self.sampling
        ends = token in sampling.stops[0] or (token in eos and not sampling.ignore_eos)
        if ends and self.num_generated >= sampling.min_tokens:
            self.stop_token, self.finish_reason = token, "stop"
        elif self.constraint is not None and self.constraint.consume(token):
            self.finish_reason = "stop"
        elif self.num_generated >= self.max_new_tokens:
            self.finish_reason = "length"

    def work(self, budget: int) -> "Work":
        """Return the next work, of at most `budget` tokens."""
        start, remaining = self.num_computed, self.num_uncomputed
        count = min(remaining, budget)
        scored = range(0)
        if self.sampling.prompt_logprobs is not None:
            scored = range(max(start, self.prompt_scored), min(start + count, len(self.prompt) - 1))
        return Work(self, start, count, count == remaining and self.tokens_left > 0, scored)

    def draft(self, max_drafts: int, min_probability: float) -> list[int]:
        """Return up to `max_drafts` drafts, each accepted with probability `min_probability` at least."""
        drafts = [] if self.drafter is None else self.drafter.draft(self.tokens, max_drafts, min_probability)
        return drafts if self.constraint is None else self.constraint.valid_prefix(drafts)


@dataclass(frozen=True, slots=True)
class Work:
    """A sequence's part of a step: tokens [start, start + count), the last of which are drafts.

    Drafts follow the last known token. A draft is accepted if it equals the token drawn from the logits before it;
    forced drafts are always accepted.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool  # whether it has the last token: its logits give the next one, as do those of accepted drafts
    prompt_rows: range  # positions within the chunk with logits that score the following prompt token
    drafts: Seq[int] = ()
    forced: bool = False  # a grammar allows nothing but these drafts
    runs: Seq[tuple[int, int, int, int]] = ()  # (begin, end, slot of the state before, slot of the state after)

    @property
    def classifies(self) -> bool:
        """Whether a classification head scores its last token."""
        return self.sequence.sampling.classify and self.start + self.count == len(self.sequence.prompt)

    @property
    def skipped(self) -> int:
        """The number of drafts accepted without looking at logits."""
        return len(self.drafts) if self.forced and self.sequence.sampling.logprobs is None else 0

    @property
    def pending(self) -> int:
        """The number of its tokens that were pending when it was submitted."""
        missing = self.start + self.count - len(self.drafts) - len(self.sequence.tokens)
        return missing if missing > 0 else 0


@dataclass(frozen=True, slots=True)
class Step:
    """The works of one step: those of one adapter are adjacent, the bare base's come first."""

    works: tuple[Work, ...]

    @property
    def num_adapters(self) -> int:
        """The number of distinct adapter keys, without the bare base."""
        return len({work.sequence.adapter for work in self.works} - {()})


@dataclass(slots=True)
class Counters:
    """Totals since the caller last replaced this object."""

    prefix_queries: int = 0  # prompt tokens of sequences admitted for the first time
    prefix_hits: int = 0  # those found in the prefix cache
    preemptions: int = 0
    drafted: int = 0  # drafts computed, without forced tokens
    accepted: int = 0  # those accepted


class AdapterResidency(Protocol):
    """The residency of adapters on the device, as the scheduler uses it."""

    def acquire(self, key: AdapterKey) -> Literal["ready", "loading", "full", "failed"]:
        """Request the adapters' rows on the device.

        "ready": they are resident, and a reference was taken. "loading": they are being loaded. "full": the adapters
        in use leave no room. "failed": they cannot be loaded; see `error`.
        """

    def release(self, key: AdapterKey) -> None:
        """Release the reference taken by a "ready"."""

    def error(self, key: AdapterKey) -> str:
        """Return the reason why the last `acquire` of this key failed, as a message for the client."""
