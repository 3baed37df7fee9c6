"""Speculation in the scheduler: drafts change no token, and use no capacity needed by others."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.sequence import Step, Work
from tests.support.scheduler_world import BASE, A, World

prompts = st.lists(st.integers(1, 2), min_size=1, max_size=26)  # two letters, so that prefixes coincide


class TestSpeculation:
    """Prompts of one letter, continued with it: every draft is right, unless the test draws otherwise."""

    def world(self, **settings: Any) -> World:
        return World(**{"batch_tokens": 16} | settings)

    def drafts(self, world: World) -> list[int]:
        step = world.schedule()
        assert step is not None
        return [len(work.drafts) for work in step.works]

    def advance(self, world: World, work: Work, drawn: list[int]) -> None:
        world.compute(Step((work,)))
        world.unread[work.sequence.id].clear()  # the test chooses the tokens
        assert world.scheduler.advance(work, drawn) == drawn

    def one(self, world: World) -> Work:
        step = world.schedule()
        assert step is not None
        [work] = step.works
        return work

    def test_a_right_draft_is_a_token_of_this_step(self) -> None:
        world = self.world()
        sequence = world.add([1] * 6, max_tokens=30, speculative_tokens=2)
        self.advance(world, self.one(world), [1])
        work = self.one(world)
        assert (work.start, work.count, work.drafts) == (6, 3, [1, 1])
        self.advance(world, work, [1, 1, 5])
        assert (sequence.num_computed, sequence.tokens) == (9, [1] * 9 + [5])
        counters = world.scheduler.counters
        assert (counters.drafted, counters.accepted) == (2, 2)

    def test_a_wrong_one_is_overwritten_and_never_offered(self) -> None:
        world = self.world()
        first = world.add([1] * 6, max_tokens=30, speculative_tokens=2)
        self.advance(world, self.one(world), [1])
        self.advance(world, self.one(world), [5])  # positions 7 and 8 hold keys of rejected drafts
        assert (first.num_computed, first.num_uncomputed) == (7, 1)
        self.advance(world, self.one(world), [6])
        world.scheduler.abort(first.id)
        second = world.add([*first.tokens, 1], max_tokens=1)
        self.advance(world, self.one(world), [1])  # checks every slot it reads
        assert second.cached_tokens == 8

    def test_none_beyond_the_length(self) -> None:
        world = self.world()
        world.add([1] * 6, max_tokens=3, speculative_tokens=4)
        self.advance(world, self.one(world), [1])
        assert self.drafts(world) == [1]  # and the token from its logits

    def test_none_while_a_prompt_takes_the_budget(self) -> None:
        world = self.world()
        world.add([1] * 6, max_tokens=30, speculative_tokens=4)
        self.advance(world, self.one(world), [1])
        world.add([2] * 40, max_tokens=1)
        assert self.drafts(world) == [0, 0]

    def test_no_block_that_others_will_need(self) -> None:
        world = self.world(num_blocks=4, batch_requests=2)
        sequence = world.add([1] * 7, max_tokens=30, speculative_tokens=4)
        self.advance(world, self.one(world), [1])
        other = world.add([2] * 4, max_tokens=30)
        step = world.schedule()
        assert step is not None
        assert [len(work.drafts) for work in step.works] == [0, 0], "8 tokens fill its two blocks"
        assert len(sequence.tables[0]) == 2
        for work in step.works:
            world.scheduler.advance(work, [1] if work.sequence is sequence else [2])
        world.scheduler.abort(other.id)
        assert self.drafts(world) != [0]

    def test_a_full_batch_asks_for_more_certainty(self) -> None:
        drafts = []
        for count in (1, 9):
            world = self.world(batch_tokens=64, batch_requests=12, num_blocks=64)
            for _ in range(count):
                world.add([1] * 3, max_tokens=30, speculative_tokens=1)
            step = world.schedule()
            assert step is not None
            for work in step.works:
                self.advance(world, work, [1])
            drafts.append(sum(self.drafts(world)))
        assert drafts == [1, 0]

    @settings(max_examples=60)
    @given(prompt=prompts, max_tokens=st.integers(1, 12), speculative_tokens=st.integers(1, 6), caching=st.booleans())
    def test_it_changes_no_token(
        self, prompt: list[int], max_tokens: int, speculative_tokens: int, caching: bool
    ) -> None:
        world = self.world(caching=caching)
        for adapter in (BASE, A, BASE):
            world.add(prompt, adapter, max_tokens=max_tokens, speculative_tokens=speculative_tokens, ignore_eos=False)
        world.run()
        for sequence in world.sequences.values():
            world.check_finished(sequence)
