"""Slots of states: one for each running sequence, and snapshots by which the prefix cache finds a state again.

A slot is a number; the states live in tensors that this file never sees. Slots are blocks of a pool of their own:
*used* ones are sequences', *cached* ones are snapshots, under the key of the last block before them, and leave in the
order of their last use when a sequence or a newer snapshot needs a slot.
"""

from dataclasses import replace

from server.engine.block_pool import BlockCounts, BlockPool
from server.engine.sequence import Sequence, Work

EVERY = 32  # blocks between snapshots; one more is taken near the end of a prompt


class StateSlots:
    """Who has which slot.

    Args:
        count: slots 1..count, at least one for a sequence and one for the snapshot that it begins with; slot 0 is the
            state before a first token.
        block_size: tokens per block of the KV cache.
        caching: when false there are no snapshots.
        every: blocks from one snapshot of a sequence to the next.
    """

    def __init__(self, count: int, block_size: int, caching: bool = True, every: int = EVERY) -> None:
        if count < 2:
            raise ValueError(f"need at least two slots, got {count}")
        self.num_slots = count
        self._pool = BlockPool(count, 1, caching)
        self._block_size = block_size
        self._every = every

    @property
    def counts(self) -> BlockCounts:
        """Free slots, snapshots, and slots of sequences."""
        return self._pool.counts

    @property
    def usage(self) -> float:
        """Share of slots that sequences have."""
        return self.counts.used / self.num_slots

    def has(self, key: bytes) -> bool:
        """Whether there is a snapshot after the block of this key."""
        return self._pool.has(key)

    def enter(self, sequence: Sequence, key: bytes | None) -> bool:
        """Give a newcomer a slot, to go on from the snapshot of a key or from nothing; or change nothing."""
        origin = [] if key is None else self._pool.match([key])
        slot = self._pool.allocate(1)
        if slot is None:
            self._pool.release(origin)
            return False
        sequence.slot, sequence.origin = slot[0], origin[0] if origin else 0
        return True

    def leave(self, sequence: Sequence) -> None:
        """Take back what a sequence has, if anything."""
        self._pool.release([slot for slot in {sequence.slot, sequence.origin} if slot])
        sequence.slot = sequence.origin = 0

    def assign(self, work: Work) -> Work:
        """A work that is submitted now, with the states that it reads and writes.

        Its snapshots are of positions that the sequence cannot take back: none lies among drafts.
        """
        sequence, size = work.sequence, self._block_size
        end = work.start + work.count
        at_end = (len(sequence.prompt) - 1) // size * size
        runs: list[tuple[int, int, int, int]] = []
        origin, begin = sequence.origin, work.start
        for block in range(begin // size + 1, (end - len(work.drafts)) // size + 1) if self._pool.caching else ():
            position, named = block * size, sequence.block_keys[block - 1 : block]
            if (block % self._every and position != at_end) or (named and self.has(named[0])):
                continue
            slot = self._pool.allocate(1)
            if slot is None:
                break
            runs.append((begin, position, origin, slot[0]))
            origin, begin = slot[0], position
        runs.append((begin, end, origin, sequence.slot))
        sequence.origin = sequence.slot
        return replace(work, runs=runs)

    def collected(self, work: Work, *, computed: bool) -> None:
        """A work's step is over: give back the snapshots that it read and wrote; the latter can be found if it counts.

        Args:
            computed: false for a sequence that ended meanwhile.
        """
        *saved, (_, _, _, own) = work.runs
        for _, position, _, slot in saved:
            if computed:
                self._pool.cache(slot, work.sequence.block_keys[position // self._block_size - 1])
            self._pool.release([slot])
        if work.runs[0][2] not in (0, own):
            self._pool.release([work.runs[0][2]])

    def reset_cache(self) -> None:
        """Forget all snapshots."""
        self._pool.reset_cache()
