"""Sequences, and the parts of them that a step computes. `scheduler` decides, `runner` computes.

A step is *submitted* to the device, is in flight, and is *collected* when the tokens that it drew have been read. A
sequence's lengths advance when a step is submitted, its `tokens` when that is collected: `pending` counts the
difference.
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
    """One request's tokens and how far they have got. The scheduler alone changes it, but for `device_seconds`."""

    id: str
    prompt: Seq[int]
    sampling: Sampling
    adapter: AdapterKey = ()
    tenant: str = ""
    weight: float = 1.0  # of the tenant, beside others'
    priority: int = 0  # among the tenant's; the lowest comes first
    cache_salt: str = ""
    arrival: float = 0.0  # seconds, on the clock of `schedule`
    background: bool = False  # it runs only in steps that no other sequence can use; the scheduler may end that
    constraint: Constraint | None = None  # by its grammar

    tokens: list[int] = field(init=False)  # prompt, then what was generated
    pending: int = field(init=False, default=0)  # tokens after those, drawn on the device and not yet read
    limit: int = field(init=False, default=0)  # tokens that it may generate
    num_computed: int = field(init=False, default=0)  # leading tokens that are computed, by the steps submitted
    in_flight: int = field(init=False, default=0)  # works submitted and not yet collected
    # Per group of KV layers a block table: entry i holds tokens [i * size, ...). None: it does not run.
    tables: list[list[int]] = field(init=False, default_factory=list)
    slot: int = field(init=False, default=0)  # of its state, where layers keep one
    origin: int = field(init=False, default=0)  # the slot that its next work goes on from
    needs_tokens: bool = field(init=False)  # the next is drawn, or drafted, by what the host knows of the last ones
    prompt_scored: int = field(init=False, default=0)  # prompt positions whose log-probabilities were delivered
    starts: Mapping[str, int] = field(init=False, default_factory=dict)  # digest -> first position under that adapter
    cached_tokens: int = field(init=False, default=0)  # prompt tokens found in the prefix cache at first admission
    first_scheduled: float | None = field(init=False, default=None)
    device_seconds: float = field(init=False, default=0.0)  # that were not reported yet
    finish_reason: FinishReason | None = field(init=False, default=None)
    stop_token: int | None = field(init=False, default=None)  # the token that ended it, also the last of `tokens`
    error: str | None = field(init=False, default=None)
    code: str | None = field(init=False, default=None)

    # Those in the background come last; then by priority and arrival.
    order: tuple[bool, int, int] = field(init=False, default=(False, 0, -1))
    refused_since: int | None = field(init=False, default=None)  # the step in which its adapter first found no room
    block_keys: list[bytes] = field(init=False, default_factory=list)  # chain keys of the leading full blocks
    drafter: Drafter | None = field(init=False, default=None)  # None: it does not speculate

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        sampling = self.sampling
        penalized = sampling.repetition_penalty != 1.0 or sampling.frequency_penalty or sampling.presence_penalty
        self.needs_tokens = bool(penalized or sampling.speculative_tokens or sampling.grammar is not None)
        if sampling.speculative_tokens:
            self.drafter = Drafter(sampling.speculative_tokens)

    @property
    def length(self) -> int:
        """All of its tokens, those included that are pending."""
        return len(self.tokens) + self.pending

    @property
    def num_generated(self) -> int:
        """Generated tokens that were read."""
        return len(self.tokens) - len(self.prompt)

    @property
    def ended(self) -> bool:
        """Whether nothing will be computed for it any more."""
        return self.finish_reason is not None or self.error is not None

    @property
    def remaining(self) -> int:
        """Tokens that no submitted step has; 1 while decoding."""
        return len(self.tokens) + self.pending - self.num_computed

    @property
    def left(self) -> int:
        """Tokens that it may generate after those it has, pending ones included."""
        return self.limit - (self.length - len(self.prompt))

    @property
    def waits(self) -> bool:
        """Whether it goes no further until its pending token is read."""
        return bool(self.pending) and (self.needs_tokens or self.left == 0)

    def end_by_newest(self, eos: Collection[int]) -> None:
        """Set why the newest token ends it, if it does. `eos`: tokens that do unless they are ignored."""
        token, sampling = self.tokens[-1], self.sampling
        ends = token in sampling.stops[0] or (token in eos and not sampling.ignore_eos)
        if ends and self.num_generated >= sampling.min_tokens:
            self.stop_token, self.finish_reason = token, "stop"
        elif self.constraint is not None and self.constraint.consume(token):
            self.finish_reason = "stop"
        elif self.num_generated >= self.limit:
            self.finish_reason = "length"

    def work(self, budget: int) -> "Work":
        """What it may compute next, of so many tokens at most."""
        start, remaining = self.num_computed, self.remaining
        count = min(remaining, budget)
        scored = range(0)
        if self.sampling.prompt_logprobs is not None:
            scored = range(max(start, self.prompt_scored), min(start + count, len(self.prompt) - 1))
        return Work(self, start, count, count == remaining and self.left > 0, scored)

    def guess(self, most: int, price: float) -> list[int]:
        """What it will probably say next, where each token must be right with the probability `price`."""
        drafts = [] if self.drafter is None else self.drafter.draft(self.tokens, most, price)
        return drafts if self.constraint is None else self.constraint.valid(drafts)


@dataclass(frozen=True, slots=True)
class Work:
    """A sequence's part in a step: tokens [start, start + count) go through the model, drafts being the last of them.

    Drafts follow the last known token. Each is right if it is what the logits before it give; those that a grammar
    forces are right whatever these are.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool  # the last token is among these: its logits give the next token, as do those of right drafts
    prompt_rows: range  # positions within the chunk whose logits score the prompt token that follows them
    drafts: Seq[int] = ()
    forced: bool = False  # a grammar allows nothing but these drafts
    runs: Seq[tuple[int, int, int, int]] = ()  # first position, one past the last, slots of the states before and after

    @property
    def classifies(self) -> bool:
        """Whether a classification head sees its last token."""
        return self.sequence.sampling.classify and self.start + self.count == len(self.sequence.prompt)

    @property
    def skipped(self) -> int:
        """How many drafts are taken without a look at logits."""
        return len(self.drafts) if self.forced and self.sequence.sampling.logprobs is None else 0

    @property
    def pending(self) -> int:
        """How many of its tokens were not read when it was submitted."""
        missing = self.start + self.count - len(self.drafts) - len(self.sequence.tokens)
        return missing if missing > 0 else 0


@dataclass(frozen=True, slots=True)
class Step:
    """The works of one step. Those of one adapter are neighbours, the bare base's come first."""

    works: tuple[Work, ...]

    @property
    def num_adapters(self) -> int:
        """Distinct adapter keys, the bare base not counted."""
        return len({work.sequence.adapter for work in self.works} - {()})


@dataclass(slots=True)
class Counters:
    """Totals since the caller last put a fresh one in place."""

    prefix_queries: int = 0  # prompt tokens of the sequences admitted (for the first time)
    prefix_hits: int = 0  # those among them that the prefix cache held
    preemptions: int = 0
    drafted: int = 0  # tokens computed on speculation
    accepted: int = 0  # those among them that were right and used


class AdapterResidency(Protocol):
    """Where adapters are. The scheduler asks, and never loads anything itself."""

    def acquire(self, key: AdapterKey) -> Literal["ready", "loading", "full", "failed"]:
        """Ask for the adapters' rows on the device.

        "ready": they are there, and a reference was taken. "loading": they are on their way. "full": those in use
        leave no room. "failed": they will not come, and `error` says why.
        """

    def release(self, key: AdapterKey) -> None:
        """Give back the reference that a "ready" took."""

    def error(self, key: AdapterKey) -> str:
        """Why the last `acquire` of this key failed, in words fit for the client."""
