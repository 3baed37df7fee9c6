"""Slots of states: one for each running sequence, and snapshots for the prefix cache.

A slot is a number here; the states lie in the tensors of `StateCache`. Slots are blocks of a pool of their own: *used*
ones belong to sequences, *cached* ones are snapshots under the key of the last block before them, evicted in the order
of their last use when a sequence or a newer snapshot needs a slot.
"""

from dataclasses import replace

from server.engine.block_pool import BlockCounts, BlockPool
from server.engine.sequence import Sequence, Work

SNAPSHOT_INTERVAL = 32  # blocks between snapshots; one more is taken near the end of a prompt


class StateSlots:
    """The slots of sequences and snapshots.

    Args:
        count: slots 1..count, at least one for a sequence and one for the snapshot it starts from; slot 0 is the
            state before a first token.
        block_size: tokens per block of the KV cache.
        caching: whether snapshots are taken.
        every: blocks from one snapshot of a sequence to the next.
    """

    def __init__(self, count: int, block_size: int, caching: bool = True, interval: int = SNAPSHOT_INTERVAL) -> None:
        if count < 2:
            raise ValueError(f"need at least two slots, got {count}")
        self.num_slots = count
        self._pool = BlockPool(count, 1, caching)
        self._block_size = block_size
        self._interval = interval

    @property
    def counts(self) -> BlockCounts:
        """The numbers of free slots, snapshots, and slots of sequences."""
        return self._pool.counts

    @property
    def usage(self) -> float:
        """The share of slots used by sequences."""
        return self.counts.used / self.num_slots

    def has(self, key: bytes) -> bool:
        """Whether there is a snapshot after the block with this key."""
        return self._pool.has(key)

    def acquire(self, sequence: Sequence, key: bytes | None) -> bool:
        """Give a newcomer a slot, starting from the snapshot under `key` or from slot 0; False if there is none."""
        origin = [] if key is None else self._pool.match([key])
        slot = self._pool.allocate(1)
        if slot is None:
            self._pool.release(origin)
            return False
        sequence.slot, sequence.source_slot = slot[0], origin[0] if origin else 0
        return True

    def release(self, sequence: Sequence) -> None:
        """Release a sequence's slots, if any."""
        self._pool.release([slot for slot in {sequence.slot, sequence.source_slot} if slot])
        sequence.slot = sequence.source_slot = 0

    def assign(self, work: Work) -> Work:
        """Return a work of the step being submitted, with the states that it reads and writes.

        No snapshot is taken at drafts, since these may be rejected.
        """
        sequence, size = work.sequence, self._block_size
        end = work.start + work.count
        at_end = (len(sequence.prompt) - 1) // size * size
        runs: list[tuple[int, int, int, int]] = []
        origin, begin = sequence.source_slot, work.start
        for block in range(begin // size + 1, (end - len(work.drafts)) // size + 1) if self._pool.caching else ():
            position, named = block * size, sequence.block_keys[block - 1 : block]
            if (block % self._interval and position != at_end) or (named and self.has(named[0])):
                continue
            slot = self._pool.allocate(1)
            if slot is None:
                break
            runs.append((begin, position, origin, slot[0]))
            origin, begin = slot[0], position
        runs.append((begin, end, origin, sequence.slot))
        sequence.source_slot = sequence.slot
        return replace(work, runs=runs)

    def finish_work(self, work: Work, *, computed: bool) -> None:
        """After a work's step: release the snapshots that it read and wrote, caching the latter if `computed`.

        Args:
            computed: false for a sequence that ended in the meantime.
        """
        *saved, (_, _, _, own) = work.runs
        for _, position, _, slot in saved:
            if computed:
                self._pool.cache(slot, work.sequence.block_keys[position // self._block_size - 1])
            self._pool.release([slot])
        if work.runs[0][2] not in (0, own):
            self._pool.release([work.runs[0][2]])

    def reset_cache(self) -> None:
        """Drop all snapshots."""
        self._pool.reset_cache()
