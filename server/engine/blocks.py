"""Bookkeeping of the paged KV cache: the blocks of sequences in every group of layers, and the keys of their contents.

A block's content is named by a key; equal keys mean equal content. Layers that keep a state of fixed size have
`state_slots` instead: a cached prefix then ends at a snapshot.
"""

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import astuple
from hashlib import blake2b

from server.engine.block_pool import BlockCounts, BlockPool
from server.engine.sequence import AdapterKey, Sequence, Work
from server.engine.state_slots import StateSlots


class BlockGroups:
    """The blocks of all groups of KV layers: a sequence has a table in each.

    In a group of sliding-window layers, a sequence releases the blocks that no later token sees; its table has 0
    (scratch) in their place. Such a group holds the tokens of the next step and the window before them.

    Args:
        pools: one per group, of one block size.
        windows: per group, the number of last keys that a token sees; 0 for all.
        chunk: most tokens of one step.
        key_group: attention reads keys in groups of this many, aligned to the sequence's start.
        states: slots of the layers that keep a state, if any.
    """

    def __init__(
        self,
        pools: Seq[BlockPool],
        windows: Seq[int],
        chunk: int,
        key_group: int,
        states: StateSlots | None = None,
    ) -> None:
        self.pools = pools
        self.states = states
        self.block_size = pools[0].block_size
        self.caching = pools[0].caching
        self._windows = windows
        self._chunk = chunk
        self._key_group = key_group

    @property
    def capacity(self) -> int:
        """The number of blocks of the first group, of which a long sequence needs most."""
        return self.pools[0].num_blocks

    @property
    def counts(self) -> BlockCounts:
        """The numbers of free, cached and used blocks over all groups."""
        return BlockCounts(*map(sum, zip(*(astuple(pool.counts) for pool in self.pools), strict=True)))

    @property
    def num_blocks(self) -> int:
        """The number of blocks of all groups."""
        return sum(pool.num_blocks for pool in self.pools)

    @property
    def usage(self) -> float:
        """The largest share in use among the groups' blocks and the state slots."""
        shares = [pool.counts.used / pool.num_blocks for pool in self.pools]
        return max(shares) if self.states is None else max(*shares, self.states.usage)

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks of each group that hold this many tokens."""
        return self.pools[0].blocks_for(tokens)

    def first_visible_block(self, group: int, position: int) -> int:
        """Return the index, in a group's table, of the first block read by the token at a position or later ones."""
        window = self._windows[group]
        oldest = max(0, position - window + 1) if window else 0
        return oldest // self._key_group * self._key_group // self.block_size

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of this many tokens fits when it runs alone."""
        needed = self.blocks_for(tokens)
        return all(
            pool.num_blocks >= needed
            or (window and pool.num_blocks >= blocks_of_window(window, self._chunk, self._key_group, self.block_size))
            for pool, window in zip(self.pools, self._windows, strict=True)
        )

    def grow(self, sequence: Sequence, tokens: int, spare: int = 0) -> bool:
        """Allocate blocks for the first `tokens` tokens in every group; False, with no change, when blocks run out.

        Args:
            spare: blocks of each group that must remain available.
        """
        missing = [self.blocks_for(tokens) - len(table) for table in sequence.tables]
        if any(count > 0 and pool.available - spare < count for count, pool in zip(missing, self.pools, strict=True)):
            return False
        for count, pool, table in zip(missing, self.pools, sequence.tables, strict=True):
            if count > 0:
                table += pool.allocate(count) or ()
        return True

    def allocate_chunk(self, sequence: Sequence, budget: int) -> int:
        """Allocate blocks for a prompt's next chunk, and return how many of its tokens, up to `budget`, have slots.

        Groups of sliding-window layers get their blocks chunk by chunk.
        """
        wanted = sequence.num_computed + min(budget, sequence.num_uncomputed)
        if self.grow(sequence, wanted):
            return wanted - sequence.num_computed
        return min(wanted, self.token_capacity(sequence)) - sequence.num_computed

    def allocate_drafts(self, sequence: Sequence, count: int, spare: int) -> int:
        """Return how many drafts have slots. New blocks are allocated only while `spare` of each group remain."""
        num_tokens = len(sequence.tokens)
        self.grow(sequence, num_tokens + count, spare)
        return min(count, self.token_capacity(sequence) - num_tokens)

    def token_capacity(self, sequence: Sequence) -> int:
        """Return the number of tokens for which a sequence has slots."""
        return min(map(len, sequence.tables)) * self.block_size

    def admit(self, sequence: Sequence, keys: Seq[bytes], spare: int) -> bool:
        """Give a newcomer the cached blocks of these keys and new ones for its other tokens, or change nothing.

        Args:
            spare: blocks of each group that must remain available.
        """
        cached = self._cached_prefix_length(keys)
        if self.states is not None and not self.states.acquire(sequence, keys[cached - 1] if cached else None):
            return False
        sequence.tables = []
        for group, pool in enumerate(self.pools):
            first = self.first_visible_block(group, cached * self.block_size)
            sequence.tables.append([0] * first + pool.match(keys[first:cached]))
        sequence.num_computed = cached * self.block_size
        tokens = len(sequence.tokens)
        first_chunk_end = min(tokens, sequence.num_computed + self._chunk)
        wanted = [self.blocks_for(first_chunk_end if window else tokens) for window in self._windows]
        missing = [count - len(table) for count, table in zip(wanted, sequence.tables, strict=True)]
        if any(pool.available < count + spare for count, pool in zip(missing, self.pools, strict=True)):
            self.release(sequence)
            sequence.num_computed = 0
            return False
        for count, pool, table in zip(missing, self.pools, sequence.tables, strict=True):
            table += pool.allocate(count) or ()
        return True

    def _cached_prefix_length(self, keys: Seq[bytes]) -> int:
        """Return how many leading blocks of a prompt can be reused: every group of layers has all keys and values that
        later tokens attend to."""
        found = len(keys)
        runs: dict[int, list[int]] = {}  # sliding group -> per index, the number of consecutive cached blocks up to it
        for group, (pool, window) in enumerate(zip(self.pools, self._windows, strict=True)):
            if window:
                run = [0]
                for key in keys:
                    run.append(run[-1] + 1 if pool.has(key) else 0)
                runs[group] = run
            else:
                found = next((place for place, key in enumerate(keys[:found]) if not pool.has(key)), found)
        while found and not (
            all(run[found] >= found - self.first_visible_block(g, found * self.block_size) for g, run in runs.items())
            and (self.states is None or self.states.has(keys[found - 1]))
        ):
            found -= 1
        return found

    def assign_states(self, works: list[Work]) -> list[Work]:
        """Return the works of the step being submitted, with the states that they read and write."""
        return works if self.states is None else [self.states.assign(work) for work in works]

    def finish_work(self, work: Work, num_computed: int | None) -> None:
        """After a work's step: cache the blocks that became full, and release those that no later token sees.

        Args:
            num_computed: the sequence's valid computed tokens; None if the sequence has ended in the meantime.
        """
        if num_computed is not None:
            self._cache_full(work.sequence, work.start, num_computed)
        if self.states is not None:
            self.states.finish_work(work, computed=num_computed is not None)
        if num_computed is not None:
            self._release_out_of_window(work.sequence, num_computed)

    def _cache_full(self, sequence: Sequence, start: int, end: int) -> None:
        """Cache the blocks that became full by positions [start, end), all with known tokens."""
        extend_block_keys(self, sequence, end)
        for place in range(start // self.block_size, min(end // self.block_size, len(sequence.block_keys))):
            for pool, table in zip(self.pools, sequence.tables, strict=True):
                if table[place]:
                    pool.cache(table[place], sequence.block_keys[place])

    def _release_out_of_window(self, sequence: Sequence, position: int) -> None:
        """Release the blocks that the token at a position and later ones do not see."""
        for group, (pool, table) in enumerate(zip(self.pools, sequence.tables, strict=True)):
            if not self._windows[group]:
                continue
            end = begin = min(self.first_visible_block(group, position), len(table))
            while begin and table[begin - 1]:
                begin -= 1
            pool.release(table[begin:end][::-1])  # so that the blocks nearest to the end are evicted last
            table[begin:end] = [0] * (end - begin)

    def release(self, sequence: Sequence) -> None:
        """Release all blocks and the state slot of a sequence."""
        for window, pool, table in zip(self._windows, self.pools, sequence.tables, strict=False):
            held = [block for block in table if block]
            pool.release(held[::-1] if window else held)
        sequence.tables = []
        if self.states is not None:
            self.states.release(sequence)

    def allocate(self, count: int) -> list[list[int]] | None:
        """Allocate `count` blocks of each group for other uses; None while fewer than `count` would remain."""
        if any(pool.available < 2 * count for pool in self.pools):
            return None
        return [pool.allocate(count) or [] for pool in self.pools]

    def free(self, tables: Seq[Seq[int]]) -> None:
        """Release blocks that `allocate` returned."""
        for pool, blocks in zip(self.pools, tables, strict=True):
            pool.release(blocks)

    def reset_cache(self) -> None:
        """Drop all keys. Used blocks keep their references."""
        for pool in self.pools:
            pool.reset_cache()
        if self.states is not None:
            self.states.reset_cache()


def blocks_of_window(window: int, chunk: int, key_group: int, block_size: int) -> int:
    """Return the number of blocks for a window of keys, read in aligned groups, and a chunk of tokens after it."""
    return -(-(window + key_group + chunk) // block_size) + 1


def root_key(tenant: str, cache_salt: str) -> bytes:
    """Return the root of all key chains of one tenant and salt; chains of different roots share no key."""
    digest = blake2b(digest_size=32, person=b"kv-root")
    for part in (tenant.encode(), cache_salt.encode()):
        digest.update(len(part).to_bytes(8, "little"))  # so that ("ab", "c") and ("a", "bc") differ
        digest.update(part)
    return digest.digest()


def chain_key(parent: bytes, spec: bytes, tokens: Seq[int]) -> bytes:
    """Return the key of a full block's content.

    Args:
        parent: the preceding block's key, or the root's; 32 bytes.
        spec: the adapters in force, as `adapter_spec` writes them.
        tokens: the block's token ids.
    """
    digest = blake2b(parent, digest_size=32, person=b"kv-block")
    digest.update(len(spec).to_bytes(8, "little"))
    digest.update(spec)
    digest.update(array("q", tokens).tobytes())
    return digest.digest()


def adapter_spec(adapters: Iterable[tuple[str, float]]) -> bytes:
    """Encode adapters (digest, weight), in order of application; only equal lists give equal bytes."""
    return repr([(digest, float(weight)) for digest, weight in adapters]).encode()


def extend_block_keys(blocks: BlockGroups, sequence: Sequence, tokens: int) -> None:
    """Extend the chain of keys over the full blocks among the first `tokens` tokens."""
    size, keys = blocks.block_size, sequence.block_keys
    if not blocks.caching or len(keys) >= tokens // size:
        return
    parent = keys[-1] if keys else root_key(sequence.tenant, sequence.cache_salt)
    for index in range(len(keys), tokens // size):
        spec = adapter_spec(_adapters_in_force(sequence, index * size, (index + 1) * size))
        parent = chain_key(parent, spec, sequence.tokens[index * size : (index + 1) * size])
        keys.append(parent)


def _adapters_in_force(sequence: Sequence, begin: int, end: int) -> AdapterKey:
    """Return the adapters in force for tokens [begin, end), as part of a block's key.

    An adapter activated within the block is written with its offset. The blocks before an activated adapter's
    invocation have the base's keys, so that other requests can share them.
    """
    starts = sequence.adapter_starts
    if not starts:
        return sequence.adapter
    found = []
    for digest, weight in sequence.adapter:
        start = starts.get(digest, 0)
        if start < end:
            found.append((f"{digest}+{start - begin}" if start > begin else digest, weight))
    return tuple(found)
