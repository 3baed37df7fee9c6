"""Single features of the scheduler, in a simulated world."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import strategies as st

from server.engine.block_pool import BlockCounts
from server.engine.sequence import AdapterKey, Sequence
from server.messages.protocol import LOAD_FAILED, TOO_LONG, Sampling
from tests.support.scheduler_world import BASE, BIG, BROKEN, EOS, A, B, World

prompts = st.lists(st.integers(1, 2), min_size=1, max_size=26)  # two letters, so that prefixes coincide


def test_the_budget_must_exceed_the_requests() -> None:
    with pytest.raises(ValueError, match="must exceed"):
        World(batch_tokens=4, batch_requests=4)


def test_a_name_is_unique() -> None:
    world = World()
    sequence = world.add([1])
    with pytest.raises(ValueError, match="already queued"):
        world.scheduler.add(sequence)


def test_prompts_are_cut_into_chunks_and_decodes_go_first() -> None:
    world = World()
    world.add([1] * 3, max_tokens=20)
    world.step()
    world.add([2] * 20, max_tokens=1)
    chunks = []
    for _ in range(3):
        step = world.step()
        assert step is not None
        chunks.append([(work.sequence.id, work.start, work.count, work.samples) for work in step.works])
    assert chunks == [
        [("0", 3, 1, True), ("1", 0, 7, False)],
        [("0", 4, 1, True), ("1", 7, 7, False)],
        [("0", 5, 1, True), ("1", 14, 6, True)],
    ]


def test_works_of_one_adapter_are_neighbours() -> None:
    world = World()
    for adapter in (B, BASE, A, B):
        world.add([1], adapter)
    step = world.step()
    assert step is not None
    assert [work.sequence.adapter for work in step.works] == [BASE, A, B, B]
    assert step.num_adapters == 2


def test_queue_numbers() -> None:
    world = World(batch_requests=1)
    world.add([1] * 3)
    world.add([1] * 5)
    world.step()
    scheduler = world.scheduler
    assert (len(scheduler.running), len(scheduler.waiting), scheduler.waiting_tokens) == (1, 1, 5)


class TestInFlight:
    """Depth 1: every step is decided before the last one is collected."""

    def test_decodes_go_on_until_all_have_ended(self) -> None:
        world = World(depth=1)
        short, long = world.add([1, 2], max_tokens=3), world.add([2, 1], max_tokens=6)
        sizes = []
        while not world.scheduler.idle:
            step = world.step()
            sizes.append(0 if step is None else len(step.works))
        assert sizes == [2, 2, 2, 1, 1, 1, 0]  # the last is collected when nothing is left to submit
        assert world.ahead == {"0": 2, "1": 5}
        world.check_finished(short)
        world.check_finished(long)

    def test_one_that_stops_was_computed_once_too_often(self) -> None:
        world = World(depth=1)
        sequence = world.add([1, 2], max_tokens=20)
        stop = world.alone(sequence)[0][1]
        world = World(depth=1)
        sequence = world.add([1, 2], max_tokens=20, stop_token_ids=[stop])
        for _ in range(3):
            world.step()
        assert sequence.finish_reason == "stop"
        assert world.scheduler.ended_in_flight == [sequence]
        assert sequence.tables
        busy = not world.scheduler.idle
        assert busy
        assert world.step() is None
        assert world.scheduler.idle
        assert not world.blocks.counts.used
        world.check_finished(sequence)

    @pytest.mark.parametrize("needs", [{"frequency_penalty": 0.5}, {"repetition_penalty": 1.2}])
    def test_a_sequence_that_needs_its_tokens_does_not_delay_others(self, needs: dict[str, Any]) -> None:
        world = World(depth=1)
        other, needing = world.add([1, 2], max_tokens=6), world.add([2, 1], max_tokens=3, **needs)
        sizes = [len(step.works) for _ in range(6) if (step := world.step())]
        assert sizes == [2, 1, 2, 1, 2, 1]
        world.run()
        assert world.ahead == {"0": 5, "1": 0}
        for sequence in (other, needing):
            world.check_finished(sequence)

    def test_drafts_prompts_and_waiting_requests_do_not_delay_others(self) -> None:
        world = World(depth=1, batch_requests=3)
        steady = world.add([1, 2], max_tokens=12)
        world.add([1] * 6, max_tokens=12, speculative_tokens=3)
        world.add([2] * 25, max_tokens=2)  # in chunks
        world.add([1, 2], max_tokens=2)  # waits for a place
        while not steady.finish_reason:
            world.step()
        assert world.ahead["0"] == 11
        world.run()
        for sequence in world.sequences.values():
            world.check_finished(sequence)

    def test_a_newcomer_is_in_the_next_step(self) -> None:
        world = World(depth=1)
        world.add([1, 2], max_tokens=9)
        world.step()
        world.add([2, 1], max_tokens=1)
        step = world.step()
        assert step is not None
        assert [work.sequence.id for work in step.works] == ["0", "1"]

    def test_a_place_is_free_when_its_sequence_was_aborted(self) -> None:
        world = World(depth=1, batch_requests=2)
        for _ in range(3):
            world.add([1, 2], max_tokens=5)
        world.step()
        world.scheduler.abort("0")
        step = world.step()
        assert step is not None
        assert [work.sequence.id for work in step.works] == ["1", "2"]

    def test_the_youngest_is_collected_before_it_gives_way(self) -> None:
        world = World(num_blocks=4, caching=False, depth=1)
        for _ in range(2):
            world.add([1] * 3, max_tokens=8)
        world.run()
        assert world.scheduler.counters.preemptions
        assert world.ahead["0"]
        for sequence in world.sequences.values():
            world.check_finished(sequence)


class TestPrefixCache:
    def test_a_prompt_is_found_again_but_its_last_token_is_computed(self) -> None:
        world = World()
        world.add([1] * 8, max_tokens=1)
        world.run()
        second = world.add([1] * 8, max_tokens=1)
        world.run()
        assert second.cached_tokens == 4
        assert (world.scheduler.counters.prefix_queries, world.scheduler.counters.prefix_hits) == (16, 4)

    def test_generated_tokens_are_found_in_the_cache(self) -> None:
        world = World()
        first = world.add([1] * 6, max_tokens=7)
        world.run()
        second = world.add([*first.tokens, 1], max_tokens=1)
        world.run()
        assert second.cached_tokens == 12  # of 13 tokens the last was never computed

    @pytest.mark.parametrize(("adapter", "tenant"), [(A, ""), (BASE, "other")])
    def test_adapters_and_tenants_share_nothing(self, adapter: AdapterKey, tenant: str) -> None:
        world = World()
        world.add([1] * 9, max_tokens=1)
        world.run()
        second = world.add([1] * 9, adapter, tenant=tenant, max_tokens=1)
        world.run()
        assert second.cached_tokens == 0

    def test_a_salt_separates(self) -> None:
        world = World()
        for name, salt in [("x", ""), ("y", "salt"), ("z", "salt")]:
            world.scheduler.add(Sequence(id=name, prompt=[1] * 9, sampling=Sampling(max_tokens=0), cache_salt=salt))
            while (step := world.scheduler.schedule(0.0)) is not None:
                for work in step.works:
                    world.scheduler.advance(work)
        assert world.scheduler.counters.prefix_hits == 8

    def test_it_can_be_off(self) -> None:
        world = World(caching=False)
        for _ in range(2):
            sequence = world.add([1] * 9, max_tokens=1)
            world.run()
        assert sequence.cached_tokens == 0
        assert world.blocks.counts == BlockCounts(free=16, cached=0, used=0)

    def test_scoring_the_prompt_bypasses_it(self) -> None:
        world = World()
        world.add([1] * 20, max_tokens=1)
        world.run()
        second = world.add([1] * 20, max_tokens=1, prompt_logprobs=0)
        world.run()
        assert second.cached_tokens == 0
        world.check_finished(second)

    def test_blocks_of_a_failing_step_are_not_cached(self) -> None:
        world = World()
        first = world.add([1] * 8, max_tokens=1)
        world.poisoned.add(first.id)
        world.run()
        assert world.blocks.counts == BlockCounts(free=16, cached=0, used=0)
        assert [sequence.code for sequence in world.scheduler.take_failed()] == ["non_finite"]


class TestPreemption:
    def test_the_youngest_gives_way_and_comes_back_in_its_place(self) -> None:
        world = World(num_blocks=6, caching=False)
        older, younger = world.add([1] * 4, max_tokens=14), world.add([2] * 4, max_tokens=14)
        while not world.scheduler.counters.preemptions:
            world.step()
        world.add([1], max_tokens=1)
        assert older in world.scheduler.running
        assert world.scheduler.waiting[0] is younger
        world.run()
        assert world.scheduler.counters.preemptions == 1
        for sequence in world.sequences.values():
            world.check_finished(sequence)

    def test_its_adapter_is_released(self) -> None:
        world = World(num_blocks=6)
        world.add([1] * 4, A, max_tokens=14)
        world.add([2] * 4, B, max_tokens=14)
        while not world.scheduler.counters.preemptions:
            world.step()
        assert +world.residency.references == Counter("a")

    def test_prompt_positions_are_scored_once(self) -> None:
        """A preempted prompt that was half scored continues from there."""
        world = World(num_blocks=8, batch_tokens=5)
        elder = world.add([1] * 4, max_tokens=20)
        world.step()
        scored = world.add([2] * 20, max_tokens=3, prompt_logprobs=0)
        world.run()
        assert world.scheduler.counters.preemptions
        for sequence in (elder, scored):
            world.check_finished(sequence)


class TestLimits:
    def test_a_prompt_beyond_the_context_fails_alone(self) -> None:
        world = World()
        world.add([1] * 41)
        fine = world.add([1] * 3, max_tokens=2)
        world.run()
        failed = world.scheduler.take_failed()
        assert [(sequence.id, sequence.code) for sequence in failed] == [("0", TOO_LONG)]
        assert world.scheduler.take_failed() == []
        world.check_finished(fine)

    def test_a_sequence_larger_than_the_cache_fails_alone(self) -> None:
        world = World(num_blocks=2)
        prompt, growing, fine = world.add([1] * 9), world.add([1] * 8, max_tokens=4), world.add([1] * 3, max_tokens=2)
        world.run()
        assert [(s.id, s.code) for s in world.scheduler.take_failed()] == [
            (prompt.id, TOO_LONG),
            (growing.id, TOO_LONG),
        ]
        assert world.outputs[growing.id] == world.alone(growing)[0][:1]
        world.check_finished(fine)

    @pytest.mark.parametrize(("prompt", "max_tokens", "generated"), [(38, 9, 2), (40, 9, 0), (9, 0, 0)])
    def test_length(self, prompt: int, max_tokens: int, generated: int) -> None:
        world = World()
        sequence = world.add([1] * prompt, max_tokens=max_tokens, prompt_logprobs=0)
        world.run()
        assert (sequence.num_generated, sequence.finish_reason) == (generated, "length")
        world.check_finished(sequence)

    @pytest.mark.parametrize(
        ("drawn", "sampling", "kept", "reason", "stop_token"),
        [
            ([5, EOS, 7], {"ignore_eos": False}, [5, EOS], "stop", EOS),
            ([5, EOS, 7], {"ignore_eos": True}, [5, EOS, 7], None, None),
            ([5, 6, 7], {"stop_token_ids": [6]}, [5, 6], "stop", 6),
            ([6, 5, 6], {"stop_token_ids": [6], "min_tokens": 2}, [6, 5, 6], "stop", 6),
            ([5, 6, 7], {"max_tokens": 2}, [5, 6], "length", None),
            ([5, 6, 7], {"max_tokens": 2, "stop_token_ids": [6]}, [5, 6], "stop", 6),
        ],
    )
    def test_several_tokens_may_come_at_once(
        self, drawn: list[int], sampling: dict[str, object], kept: list[int], reason: str | None, stop_token: int | None
    ) -> None:
        world = World()
        sequence = world.add([1, 1], **sampling)  # type: ignore[arg-type]
        step = world.schedule()
        assert step is not None
        work = replace(step.works[0], count=2 + len(drawn) - 1, drafts=drawn[:-1])
        assert world.blocks.grow(sequence, 8)
        assert world.scheduler.advance(work, drawn) == kept
        assert (sequence.finish_reason, sequence.stop_token) == (reason, stop_token)
        assert world.scheduler.idle == (reason is not None)


class TestAdapters:
    def test_a_loading_adapter_does_not_delay_others(self) -> None:
        world = World(delay=3)
        slow, quick = world.add([1], A), world.add([1], BASE)
        world.step()
        assert world.scheduler.running == [quick]
        while slow.first_scheduled is None:
            world.step()
        assert slow.first_scheduled == 4.0

    def test_one_without_room_waits_and_others_pass_until_its_patience_ends(self) -> None:
        world = World(patience=2)
        world.add([1], A, max_tokens=12)
        big = world.add([1], BIG, max_tokens=1)
        world.step()
        passing = [world.add([1], B, max_tokens=1) for _ in range(6)]
        for _ in range(4):
            world.step()
            late_base = world.add([1], BASE, max_tokens=1)
            world.add([1], B, max_tokens=1)
        world.step()
        assert all(sequence.finish_reason for sequence in passing[:3])
        assert late_base.finish_reason == "length"  # the base takes no rows
        last = world.sequences[str(len(world.sequences) - 1)]
        world.run()
        assert big.first_scheduled is not None
        assert last.first_scheduled is not None
        assert big.first_scheduled <= last.first_scheduled
        assert big.first_scheduled == 13.0  # as soon as the only request admitted before it had finished

    def test_an_adapter_that_fails_to_load_fails_its_requests_and_is_reported_once(self) -> None:
        world = World()
        for adapter in (BROKEN, A, BROKEN):
            world.add([1], adapter, max_tokens=1)
        world.run()
        assert [(sequence.id, sequence.code, sequence.error) for sequence in world.scheduler.take_failed()] == [
            (name, LOAD_FAILED, "broken is broken") for name in "02"
        ]
        assert world.residency.errors_read == 1

    def test_nothing_runs_while_all_load(self) -> None:
        world = World(delay=2)
        world.add([1], A)
        assert world.step() is None
        assert not world.scheduler.idle


def test_failing_an_unknown_sequence_has_no_effect() -> None:
    world = World()
    world.scheduler.fail("nobody", "?", "?")
    assert world.scheduler.take_failed() == []
