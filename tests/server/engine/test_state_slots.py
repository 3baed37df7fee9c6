"""Slots of states: those of sequences, snapshots within the budget, and eviction order."""

from dataclasses import astuple

import pytest

from server.engine.block_pool import BlockCounts, BlockPool
from server.engine.blocks import BlockGroups
from server.engine.sequence import Sequence, Work
from server.engine.state_slots import StateSlots
from server.messages.protocol import Sampling


class Pool:
    """Slots, and operations of sequences on them, in blocks of 4 tokens."""

    def __init__(self, count: int, *, caching: bool = True, every: int = 100) -> None:
        self.slots = StateSlots(count, 4, caching, every)
        self.count = count

    def enter(self, tokens: int, key: bytes | None = None) -> Sequence:
        sequence = Sequence(id="", prompt=[1] * tokens, sampling=Sampling())
        sequence.block_keys = [bytes([tokens, block]) for block in range(tokens // 4)]
        assert self.slots.acquire(sequence, key)
        return sequence

    def step(self, sequence: Sequence, start: int, end: int, *, drafts: int = 0, computed: bool = True) -> Work:
        work = Work(sequence, start, end - start, samples=False, prompt_rows=range(0), drafts=[1] * drafts)
        work = self.slots.assign(work)
        self.slots.finish_work(work, computed=computed)
        return work

    @property
    def counts(self) -> BlockCounts:
        assert sum(astuple(self.slots.counts)) == self.count
        return self.slots.counts


def test_a_sequence_has_one_slot_and_leaves_a_snapshot_at_the_end_of_its_prompt() -> None:
    pool = Pool(4)
    sequence = pool.enter(10)
    first = pool.step(sequence, 0, 5)
    assert first.runs == [(0, 5, 0, sequence.slot)], "it starts from the empty state, and no snapshot is due"
    assert pool.counts == BlockCounts(free=3, cached=0, used=1)
    last = pool.step(sequence, 5, 10)
    (begin, at_end, read, snapshot), rest = last.runs
    assert (begin, at_end, read) == (5, 8, sequence.slot), "the end of the last whole block before the last token"
    assert rest == (8, 10, snapshot, sequence.slot)
    assert pool.counts == BlockCounts(free=2, cached=1, used=1)
    pool.slots.release(sequence)
    pool.slots.release(sequence)
    assert pool.counts == BlockCounts(free=3, cached=1, used=0)
    assert pool.slots.has(sequence.block_keys[1])
    pool.slots.reset_cache()
    assert pool.counts == BlockCounts(free=4, cached=0, used=0)


def test_a_snapshot_is_read_by_the_first_work_and_held_until_that_is_over() -> None:
    pool = Pool(3)
    first = pool.enter(8)
    pool.step(first, 0, 8)
    pool.slots.release(first)
    second = pool.enter(12, first.block_keys[0])
    assert pool.counts == BlockCounts(free=1, cached=0, used=2)
    work = pool.slots.assign(Work(second, 4, 2, samples=False, prompt_rows=range(0)))
    ((begin, end, read, write),) = work.runs
    assert (begin, end, write) == (4, 6, second.slot)
    assert read not in (0, second.slot)
    assert pool.counts.used == 2
    pool.slots.finish_work(work, computed=False)
    assert pool.counts == BlockCounts(free=1, cached=1, used=1)
    assert pool.step(second, 6, 7).runs == [(6, 7, second.slot, second.slot)]
    other = pool.enter(12, first.block_keys[0])
    pool.slots.release(other)  # before its first step
    assert pool.counts == BlockCounts(free=1, cached=1, used=1)


def test_snapshots_come_at_intervals_and_never_among_drafts() -> None:
    pool = Pool(8, every=2)
    sequence = pool.enter(30)
    assert [end for _, end, _, _ in pool.step(sequence, 0, 30).runs] == [8, 16, 24, 28, 30]
    assert pool.counts.cached == 4
    again = pool.enter(30)
    assert len(pool.step(again, 0, 30).runs) == 1, "these snapshots exist already"
    sequence.block_keys += [b"more", b"tokens"]
    assert [end for _, end, _, _ in pool.step(sequence, 30, 34, drafts=3).runs] == [34]
    assert [end for _, end, _, _ in pool.step(sequence, 30, 34, drafts=2).runs] == [32, 34]


def test_what_was_not_computed_is_not_found() -> None:
    pool = Pool(3)
    sequence = pool.enter(10)
    pool.step(sequence, 0, 10, computed=False)
    assert not pool.slots.has(sequence.block_keys[1])
    assert pool.counts == BlockCounts(free=2, cached=0, used=1)


def test_the_snapshot_longest_unused_leaves_for_a_newer_one_and_for_sequences() -> None:
    pool = Pool(3)
    keys = []
    for tokens in (5, 6):
        sequence = pool.enter(tokens)
        keys.append(sequence.block_keys[0])
        pool.step(sequence, 0, tokens)
        pool.slots.release(sequence)
    pool.slots.release(pool.enter(7, keys[0]))  # a use: the other one is now the older
    third = pool.enter(7)
    pool.step(third, 0, 7)
    assert [pool.slots.has(key) for key in (*keys, third.block_keys[0])] == [True, False, True]
    fourth, fifth = pool.enter(3), pool.enter(3)
    assert pool.counts == BlockCounts(free=0, cached=0, used=3)
    late = Sequence(id="", prompt=[1], sampling=Sampling())
    assert not pool.slots.acquire(late, None)
    assert (late.slot, late.source_slot) == (0, 0)
    assert pool.step(fourth, 0, 3).runs == [(0, 3, 0, fourth.slot)]
    fourth.prompt, fourth.block_keys = [1] * 6, [b"x"]
    assert len(pool.step(fourth, 3, 6).runs) == 1, "no slot is left for a snapshot"
    for sequence in (third, fourth, fifth):
        pool.slots.release(sequence)
    assert pool.counts == BlockCounts(free=3, cached=0, used=0)


def test_without_a_prefix_cache_there_are_no_snapshots() -> None:
    pool = Pool(3, caching=False)
    sequence = pool.enter(10)
    assert pool.step(sequence, 0, 10).runs == [(0, 10, 0, sequence.slot)]
    assert pool.counts == BlockCounts(free=2, cached=0, used=1)
    with pytest.raises(ValueError, match="at least two slots"):
        StateSlots(1, 4)


def test_a_prefix_is_cached_as_far_as_a_snapshot_of_it() -> None:
    slots = StateSlots(4, 4, interval=2)
    blocks = BlockGroups([BlockPool(16, 4)], [0], 16, 8, slots)

    def computed(length: int) -> Sequence:
        sequence = Sequence(id="", prompt=list(range(length)), sampling=Sampling())
        blocks_before = [bytes([block]) for block in range((length - 1) // 4)]
        assert blocks.admit(sequence, blocks_before, 0)
        start = sequence.num_computed
        (work,) = blocks.assign_states([Work(sequence, start, length - start, samples=False, prompt_rows=range(0))])
        sequence.block_keys = [bytes([block]) for block in range(length // 4)]
        blocks.finish_work(work, length)
        blocks.release(sequence)
        return sequence

    assert computed(14).num_computed == 0  # snapshots after 8 and 12
    assert computed(14).num_computed == 12
    assert computed(12).num_computed == 8, "keys and values of its block 2 are not used"
    slots.reset_cache()
    assert computed(14).num_computed == 0, "keys and values alone are not enough"
    assert slots.counts.used == blocks.counts.used == 0
