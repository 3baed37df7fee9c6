"""The scheduler under random events: every output equals that of the request alone.

A state machine of arrivals, aborts, overflowing logits and steps, at either depth; and a bound on waiting for rows.
"""

from collections import Counter
from dataclasses import astuple

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.engine.sequence import AdapterKey, Sequence
from server.messages.protocol import LOAD_FAILED, TOO_LONG, Grammar
from tests.support.scheduler_world import BASE, BIG, BOTH, BROKEN, GRAMMAR, A, B, World

prompts = st.lists(st.integers(1, 2), min_size=1, max_size=26)  # two letters, so that prefixes coincide


class AnythingMayHappen(RuleBasedStateMachine):
    """Arrivals, aborts, overflowing logits and steps in any order, in a world too small for them."""

    depth = 0
    sliding = 0  # blocks of a second group of layers
    slots = 0  # of layers that keep a state

    def __init__(self) -> None:
        super().__init__()
        self.world = World(
            num_blocks=8, delay=2, depth=self.depth, sliding=self.sliding, slots=self.slots, background_seconds=9.0
        )
        self.aborted: set[str] = set()

    @rule(
        prompt=prompts,
        adapter=st.sampled_from([BASE, A, B, BIG, BOTH, BROKEN]),
        tenant=st.sampled_from(["", "", "other", "third"]),
        weight=st.sampled_from([1.0, 3.0]),
        priority=st.sampled_from([0, 0, 1, -1]),
        background=st.sampled_from([False, False, True]),
        max_tokens=st.integers(0, 12),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        stop=st.lists(st.integers(0, 3), max_size=1),
        prompt_logprobs=st.sampled_from([None, None, 1]),
        speculative_tokens=st.sampled_from([0, 0, 1, 3, 6]),
        penalty=st.sampled_from([0.0, 0.0, 0.5]),
        grammar=st.sampled_from([None, None, GRAMMAR]),
        logprobs=st.sampled_from([None, 0]),
    )
    def arrive(
        self,
        prompt: list[int],
        adapter: AdapterKey,
        tenant: str,
        weight: float,
        priority: int,
        background: bool,
        max_tokens: int,
        min_tokens: int,
        ignore_eos: bool,
        stop: list[int],
        prompt_logprobs: int | None,
        speculative_tokens: int,
        penalty: float,
        grammar: Grammar | None,
        logprobs: int | None,
    ) -> None:
        self.world.add(
            prompt,
            adapter,
            tenant=tenant,
            weight=weight,
            priority=priority,
            background=background,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            ignore_eos=ignore_eos,
            stop_token_ids=stop,
            prompt_logprobs=prompt_logprobs,
            speculative_tokens=speculative_tokens,
            grammar=grammar,
            logprobs=logprobs,
            presence_penalty=penalty,  # the model ignores penalties: only the waiting for tokens changes
        )

    def here(self) -> list[Sequence]:
        return [*self.world.scheduler.running, *self.world.scheduler.waiting]

    @precondition(lambda self: self.here())
    @rule(data=st.data(), under_way=st.booleans())
    def abort(self, data: st.DataObject, under_way: bool) -> None:
        victim = data.draw(st.sampled_from(self.here())).id

        def abort() -> None:
            if self.world.scheduler.abort(victim):
                self.aborted.add(victim)
            assert not self.world.scheduler.abort(victim)

        if under_way:
            self.world.step(meanwhile=abort)
        else:
            abort()

    @precondition(lambda self: self.here())
    @rule(data=st.data())
    def overflow(self, data: st.DataObject) -> None:
        self.world.poisoned.add(data.draw(st.sampled_from(self.here())).id)

    @rule(steps=st.integers(1, 6))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()

    @invariant()
    def accounting(self) -> None:
        world = self.world
        holding = [*world.scheduler.running, *world.scheduler.ended_in_flight]
        for group, pool in enumerate(world.blocks.pools):
            held = {block for sequence in holding for block in sequence.tables[group] if block}
            assert pool.counts.used == len(held)
        for sequence in holding:
            # It has no blocks before its window, except those of the step in flight.
            assert self.depth or not any(
                block
                for group, table in enumerate(sequence.tables)
                for block in table[: world.blocks.first_visible_block(group, sequence.num_computed)]
            )
        if world.blocks.states is not None:
            own = {sequence.slot for sequence in holding}
            assert len(own) == len(holding)
            saved = [] if world.in_flight is None else [run for work in world.in_flight.step.works for run in work.runs]
            assert world.blocks.states.counts.used == len(own.union(*({r, w} for *_, r, w in saved)) - {0})
            assert sum(astuple(world.blocks.states.counts)) == self.slots
        references = Counter(digest for sequence in holding for digest, _ in sequence.adapter)
        assert +world.residency.references == references
        assert all(sequence.in_flight and sequence.ended for sequence in world.scheduler.ended_in_flight)
        assert self.depth or not world.scheduler.ended_in_flight
        for queue in (world.scheduler.running, world.scheduler.waiting):
            order = [(sequence.background, sequence.priority, int(sequence.id)) for sequence in queue]
            assert order == sorted(order)
        assert not any(sequence.tables for sequence in world.scheduler.waiting)

    def teardown(self) -> None:
        self.world.run()
        failed = {sequence.id: sequence for sequence in self.world.scheduler.take_failed()}
        for name, sequence in self.world.sequences.items():
            if name in self.aborted:
                assert sequence.finish_reason == "abort"
            elif name in failed:
                expected = LOAD_FAILED if sequence.adapter == BROKEN else "non_finite"
                # 8 blocks of 4 tokens: a long prompt with a long output may not fit even alone.
                assert sequence.code == expected or (sequence.code == TOO_LONG and len(sequence.tokens) > 32)
                assert sequence.code != "non_finite" or name in self.world.poisoned
                assert sequence.error
                assert sequence.finish_reason is None
            else:
                self.world.check_finished(sequence)


class AnythingMayHappenInFlight(AnythingMayHappen):
    """The same at depth 1: every step is decided before the last one is collected."""

    depth = 1


class SlidingLayers(AnythingMayHappen):
    """Some layers have a window, and their blocks sometimes run out before the others'."""

    sliding = 7


class SlidingLayersInFlight(SlidingLayers):
    depth = 1


class StateLayers(AnythingMayHappen):
    """Some layers keep a state, and their slots sometimes run out first."""

    sliding = 7
    slots = 4


class StateLayersInFlight(StateLayers):
    depth = 1


TestAnythingMayHappen = AnythingMayHappen.TestCase
TestAnythingMayHappenInFlight = AnythingMayHappenInFlight.TestCase
TestSlidingLayers = SlidingLayers.TestCase
TestSlidingLayersInFlight = SlidingLayersInFlight.TestCase
TestStateLayers = StateLayers.TestCase
TestStateLayersInFlight = StateLayersInFlight.TestCase
for case in (TestAnythingMayHappen, TestAnythingMayHappenInFlight):
    case.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
for case in (TestSlidingLayers, TestSlidingLayersInFlight, TestStateLayers, TestStateLayersInFlight):
    case.settings = settings(max_examples=45, stateful_step_count=30, deadline=None)


@settings(max_examples=80, deadline=None)
@given(
    arrivals=st.lists(st.sampled_from([BASE, A, B, BOTH, None]), min_size=2, max_size=6).filter(any),
    newcomers=st.integers(1, 3),
    max_tokens=st.integers(1, 8),
    patience=st.integers(0, 12),
    delay=st.integers(0, 3),
)
def test_no_request_starves_for_rows(
    arrivals: list[AdapterKey | None], newcomers: int, max_tokens: int, patience: int, delay: int
) -> None:
    """One request needs all rows while others keep requesting some: it is admitted within a bounded time."""
    world = World(num_blocks=64, delay=delay, patience=patience)
    elder: Sequence | None = None
    # A place in the batch to be considered, another after loading, and all others finished once its patience has ended.
    bound = delay + patience + 3 * (max_tokens + 2)
    for moment in range(10 + bound):
        for number in range(newcomers):
            adapter = arrivals[(moment + number) % len(arrivals)]
            if adapter is not None and len(world.scheduler.waiting) < 40:
                world.add([1, 2, 1], adapter, max_tokens=max_tokens)
        if moment == 10:
            # It is placed first in the queue, so that only the wait for rows is measured.
            for sequence in list(world.scheduler.waiting):
                world.scheduler.abort(sequence.id)
            elder = world.add([1, 2, 1], BIG, max_tokens=1)
        world.step()
    assert elder is not None
    assert elder.first_scheduled is not None
    assert elder.first_scheduled - elder.arrival <= bound
