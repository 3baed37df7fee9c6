"""The scheduler in a simulated world: a fake model whose next token is a hash of all tokens that it should see.

`World` records the content of each KV slot and lets a sequence read only through its block table, so a block shared too
widely, reused too early or published too soon shows as a wrong read. Every stream must equal the one computed alone.
"""

import math
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from server.engine.block_pool import BlockPool
from server.engine.blocks import BlockGroups
from server.engine.scheduler import Scheduler
from server.engine.sequence import AdapterKey, Sequence, Step, Work
from server.engine.state_slots import StateSlots
from server.messages.protocol import Grammar, Sampling

EOS = 0
VOCABULARY = 12

BASE: AdapterKey = ()
A: AdapterKey = (("a", 1.0),)
B: AdapterKey = (("b", 1.0),)
BIG: AdapterKey = (("big", 1.0),)
BOTH: AdapterKey = (("a", 1.0), ("b", 0.5))
BROKEN: AdapterKey = (("broken", 1.0),)
ROWS = {"a": 1, "b": 1, "big": 3, "broken": 1}
MOST_ROWS = 3


GRAMMAR = Grammar("regex", "")


class FakeConstraint:
    """A grammar in which some tokens force the next two, and one then ends the text."""

    def __init__(self) -> None:
        self.forced: list[int] = []
        self.stopped = False

    @property
    def complete(self) -> bool:
        return self.stopped and not self.forced

    def consume(self, token: int) -> bool:
        assert not self.complete
        if self.forced:
            assert self.forced.pop(0) == token
        elif token % 5 == 3:
            self.forced = [(token + 1) % VOCABULARY, 11]
            self.stopped = token == 8
        return self.complete

    def final_forced_tokens(self, sampling: Sampling) -> list[int]:
        return list(self.forced) if self.stopped and sampling.logprobs is None else []

    def valid_prefix(self, drafts: list[int]) -> list[int]:
        return [draft for draft in drafts if draft != 5]


def followed(tokens: list[int]) -> FakeConstraint:
    """The constraint after these generated tokens."""
    constraint = FakeConstraint()
    for token in tokens:
        constraint.consume(token)
    return constraint


def next_token(sequence: Sequence, tokens: list[int]) -> int:
    """A hash of all tokens that mostly depends on the last one, so that the text repeats itself."""
    if sequence.sampling.grammar is not None:
        forced = followed(tokens[len(sequence.prompt) :]).forced
        if forced:
            return forced[0]
    everything = zlib.crc32(repr((sequence.adapter, tokens)).encode())
    return (everything >> 8 if everything % 4 == 0 else zlib.crc32(bytes(tokens[-1:]))) % VOCABULARY


@dataclass
class FakeResidency:
    """Three rows, evicted least recently used first; an adapter takes `delay` steps to load."""

    delay: int = 0
    device: list[str] = field(default_factory=list)
    references: Counter[str] = field(default_factory=Counter)
    due: dict[str, int] = field(default_factory=dict)
    errors_read: int = 0

    def tick(self) -> None:
        self.due = {digest: max(0, steps - 1) for digest, steps in self.due.items()}

    def acquire(self, key: AdapterKey) -> Literal["ready", "loading", "full", "failed"]:
        digests = [digest for digest, _ in key]
        if "broken" in digests:
            return "failed"
        for digest in digests:
            self.due.setdefault(digest, self.delay)
        if any(self.due[digest] for digest in digests):
            return "loading"
        kept = [digest for digest in self.device if self.references[digest] or digest in digests]
        wanted = kept + [digest for digest in digests if digest not in kept]
        if sum(ROWS[digest] for digest in wanted) > MOST_ROWS:
            return "full"
        idle = [digest for digest in self.device if digest not in kept]
        while sum(ROWS[digest] for digest in idle + wanted) > MOST_ROWS:
            idle.pop(0)
        self.device = idle + wanted
        self.references.update(digests)
        return "ready"

    def release(self, key: AdapterKey) -> None:
        for digest, _ in key:
            assert self.references[digest] > 0
            self.references[digest] -= 1

    def error(self, key: AdapterKey) -> str:
        self.errors_read += 1
        return f"{key[0][0]} is broken"


Slot = tuple[int, int, int]  # group, block, and place in it


@dataclass(frozen=True)
class Given:
    """A submitted step, and the results of the device."""

    step: Step
    drawn: list[list[int] | None]  # per work; None: its logits are not finite
    written: dict[Slot, object]


class World:
    """A scheduler with a simulated environment; with `depth` 1 a step is collected after the next is submitted.

    With `sliding` blocks there is a second group of layers, which see the last `window` keys, read by eights. With
    `slots` there are layers that keep a state.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 16,
        caching: bool = True,
        delay: int = 0,
        batch_tokens: int = 8,
        batch_requests: int = 4,
        model_len: int = 40,
        patience: int = 4,
        free_rows: int = 8,
        depth: int = 0,
        sliding: int = 0,
        window: int = 6,
        slots: int = 0,
        background_seconds: float = math.inf,
    ) -> None:
        counts = [num_blocks, sliding] if sliding else [num_blocks]
        self.windows = [0, window][: len(counts)]
        states = StateSlots(slots, 4, caching, interval=3) if slots else None
        pools = [BlockPool(count, 4, caching) for count in counts]
        self.blocks = BlockGroups(pools, self.windows, batch_tokens, 8, states)
        self.residency = FakeResidency(delay)
        self.scheduler = Scheduler(
            self.blocks,
            self.residency,
            max_batch_tokens=batch_tokens,
            max_batch_requests=batch_requests,
            max_model_len=model_len,
            eos_token_ids=[EOS],
            patience=patience,
            doubling_tokens=free_rows,
            background_seconds=background_seconds,
        )
        self.batch_tokens, self.batch_requests, self.model_len = batch_tokens, batch_requests, model_len
        self.depth = depth
        self.kv: dict[Slot, object] = {}
        self.states: dict[int, object] = {}  # by slot, the tokens taken into the state
        self.sequences: dict[str, Sequence] = {}
        self.outputs: dict[str, list[int]] = {}
        self.scored: dict[str, list[int]] = {}
        self.poisoned: set[str] = set()
        self.steps = 0
        self.in_flight: Given | None = None
        self.unread: dict[str, list[int]] = {}  # tokens not yet read back
        self.ahead: Counter[str] = Counter()  # works of each sequence that used an unread token

    def add(
        self,
        prompt: list[int],
        adapter: AdapterKey = BASE,
        *,
        tenant: str = "",
        weight: float = 1.0,
        priority: int = 0,
        background: bool = False,
        **sampling: object,
    ) -> Sequence:
        sequence = Sequence(
            id=str(len(self.sequences)),
            prompt=prompt,
            sampling=Sampling(**{"ignore_eos": True, **sampling}),  # type: ignore[arg-type]
            adapter=adapter,
            tenant=tenant,
            weight=weight,
            priority=priority,
            background=background,
            arrival=float(self.steps),
            constraint=FakeConstraint() if sampling.get("grammar") else None,  # type: ignore[arg-type]
        )
        self.sequences[sequence.id] = sequence
        self.outputs[sequence.id] = []
        self.scored[sequence.id] = []
        self.unread[sequence.id] = []
        self.scheduler.add(sequence)
        return sequence

    def schedule(self) -> Step | None:
        self.steps += 1
        self.residency.tick()
        favoured = (
            self.scheduler._shares.tenants_of_next_step(self.scheduler.running, self.scheduler.waiting) or frozenset()
        )
        step = self.scheduler.schedule(float(self.steps))
        works = {} if step is None else {work.sequence.id: work for work in step.works}
        tenants = {work.sequence.tenant for work in works.values()}
        for sequence in self.scheduler.running:
            # A sequence runs in every step unless it waits for its own tokens.
            waits = self.unread[sequence.id] and (sequence.needs_tokens or self.is_full(sequence))
            if sequence.background and not all(other.background for other in self.scheduler.running):
                assert sequence.id not in works, "something in the background runs beside others"
                continue
            if sequence.background and self.scheduler._to_preempt is not None:
                continue
            if sequence.tenant not in tenants and tenants <= favoured:
                continue  # the step belongs to favoured tenants
            if sequence in (self.scheduler._preempting, self.scheduler._to_preempt):
                assert self.depth
                continue
            if sequence.id not in works and sequence.num_uncomputed == 1 and not waits:
                assert self.depth
                assert not all(pool.available for pool in self.blocks.pools)
        if step is None:
            stalled = len(self.windows) > 1 and self.scheduler.counters.preemptions
            assert not self.scheduler.running or self.in_flight is not None or stalled
            return None
        assert 0 < sum(work.count for work in step.works) <= self.batch_tokens
        assert len(step.works) <= self.batch_requests
        assert len(works) == len(step.works)
        keys = [work.sequence.adapter for work in step.works]
        assert keys == sorted(keys)
        return step

    def is_full(self, sequence: Sequence) -> bool:
        """Whether it has all the tokens that it may generate."""
        generated = len(self.inputs(sequence)) - len(sequence.prompt)
        return generated == min(sequence.sampling.max_tokens, self.model_len - len(sequence.prompt))

    def inputs(self, sequence: Sequence) -> list[int]:
        """Its tokens, including unread ones."""
        return [*sequence.tokens, *self.unread[sequence.id]]

    def compute(self, step: Step) -> Given:
        """Simulate the model: write every key and value, then check everything that a row may see, and draw tokens."""
        written: dict[Slot, object] = {}
        drawn: list[list[int] | None] = []
        for work in step.works:
            sequence = work.sequence
            assert all(self.residency.references[digest] for digest, _ in sequence.adapter)
            assert not (work.drafts and self.unread[sequence.id])
            for position in range(work.start, work.start + work.count):
                for group, table in enumerate(sequence.tables):
                    slot = group, table[position // 4], position % 4
                    assert slot[1]
                    assert slot not in written
                    written[slot] = self.content(work, position)
        self.kv |= written
        if self.blocks.states is not None:
            self.run_states(step)
        for work in step.works:
            sequence, end = work.sequence, work.start + work.count
            for group, (window, table) in enumerate(zip(self.windows, sequence.tables, strict=True)):
                first = max(0, work.start - window + 1) // 8 * 8 if window else 0
                for position in range(first, end):
                    slot = group, table[position // 4], position % 4
                    assert self.kv[slot] == self.content(work, position), "read a slot that holds something else"
            if work.samples:
                assert end == len(self.inputs(sequence)) + len(work.drafts)
                assert not (sequence.needs_tokens and self.unread[sequence.id])
            drawn.append(None if sequence.id in self.poisoned else self.draw(work))
        for work, tokens in zip(step.works, drawn, strict=True):
            self.ahead[work.sequence.id] += bool(self.unread[work.sequence.id])
            self.unread[work.sequence.id] += [1] * work.samples if tokens is None else tokens
        return Given(step, drawn, written)

    def run_states(self, step: Step) -> None:
        """Check that every run starts from a state of exactly the tokens before it."""
        for work in step.works:
            position = work.start
            for begin, end, read, write in work.runs:
                assert begin == position
                assert (self.states[read] == self.content(work, begin - 1)) if read else not begin
                assert write
                self.states[write] = self.content(work, end - 1)
                position = end
            assert position == work.start + work.count
            assert work.runs[-1][3] == work.sequence.slot

    def content(self, work: Work, position: int) -> object:
        sequence = work.sequence
        return sequence.tenant, sequence.adapter, (*self.inputs(sequence), *work.drafts)[: position + 1]

    def draw(self, work: Work) -> list[int]:
        """The next token, and one more for each accepted draft."""
        drawn: list[int] = []
        for draft in [*work.drafts, None] if work.samples else []:
            known = [*self.inputs(work.sequence), *drawn]
            if work.sequence.sampling.grammar is not None and followed(known[len(work.sequence.prompt) :]).complete:
                drawn.append(EOS)  # discarded
                break
            drawn.append(next_token(work.sequence, known))
            if drawn[-1] != draft:
                break
        return drawn

    def take_in(self, given: Given) -> None:
        for slot, content in given.written.items():
            assert self.kv[slot] == content, "blocks of a step in flight were reassigned"
        for work, drawn in zip(given.step.works, given.drawn, strict=True):
            sequence = work.sequence
            del self.unread[sequence.id][: work.samples if drawn is None else len(drawn)]
            if drawn is None and not sequence.ended:
                self.scheduler.fail(sequence.id, "not finite", "non_finite")
            if sequence.ended:
                assert self.scheduler.advance(work, drawn or []) == []
                continue
            assert drawn is not None
            self.scored[sequence.id] += work.prompt_rows
            kept = self.scheduler.advance(work, drawn)
            assert kept[: len(drawn)] == drawn[: len(kept)]
            assert len(kept) == len(drawn) or sequence.finish_reason
            self.outputs[sequence.id] += kept

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> Step | None:
        """Schedule and submit a step, then collect one; `meanwhile` runs in between."""
        step = self.schedule()
        given = None if step is None else self.compute(step)
        meanwhile()
        collected, self.in_flight = (self.in_flight, given) if self.depth else (given, None)
        if collected is not None:
            self.take_in(collected)
        return step

    def run(self, most: int = 2000) -> None:
        for _ in range(most):
            if self.scheduler.idle:
                break
            self.step()
        assert self.scheduler.idle, "still busy"
        assert self.in_flight is None
        assert self.blocks.counts.used == 0
        assert self.blocks.states is None or self.blocks.states.counts.used == 0
        assert not +self.residency.references

    def alone(self, sequence: Sequence) -> tuple[list[int], str]:
        """The tokens and the finish reason of a sequence that runs alone."""
        sampling, tokens = sequence.sampling, list(sequence.prompt)
        most = min(sampling.max_tokens, self.model_len - len(sequence.prompt))
        for count in range(1, most + 1):
            token = next_token(sequence, tokens)
            tokens.append(token)
            stops = token in sampling.stop_token_ids or (token == EOS and not sampling.ignore_eos)
            if stops and count >= sampling.min_tokens:
                return tokens[len(sequence.prompt) :], "stop"
            if sampling.grammar is not None and followed(tokens[len(sequence.prompt) :]).complete:
                return tokens[len(sequence.prompt) :], "stop"
        return tokens[len(sequence.prompt) :], "length"

    def check_finished(self, sequence: Sequence) -> None:
        tokens, reason = self.alone(sequence)
        assert (self.outputs[sequence.id], sequence.finish_reason) == (tokens, reason)
        assert sequence.tokens == [*sequence.prompt, *tokens]
        if sequence.sampling.grammar is None or sequence.stop_token is not None:
            assert sequence.stop_token == (tokens[-1] if reason == "stop" else None)
        wanted = sequence.sampling.prompt_logprobs is not None
        assert self.scored[sequence.id] == list(range(len(sequence.prompt) - 1) if wanted else [])
