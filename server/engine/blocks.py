"""The paged KV cache's bookkeeping: the blocks of sequences in every group of layers, and the names of their contents.

A block's content is named by a key; equal keys mean equal content. Layers that keep a state of fixed size instead have
`state_slots`: a prefix is found as far as there is a snapshot of it.
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

    In a group whose layers see a window, a sequence gives back the blocks that no later token sees; its table says 0
    (scratch) there. Such a group holds those of its tokens that are about to be computed and the window before them.

    Args:
        pools: one per group, of one block size.
        windows: per group how many of the last keys a token sees; 0 for all.
        chunk: most tokens of one step.
        key_group: attention reads keys in groups of this many, aligned to the sequence's start.
        states: slots of the layers that keep a state, if there are any.
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
        """Blocks of the group that a long sequence needs most of."""
        return self.pools[0].num_blocks

    @property
    def counts(self) -> BlockCounts:
        """Blocks of all groups."""
        return BlockCounts(*map(sum, zip(*(astuple(pool.counts) for pool in self.pools), strict=True)))

    @property
    def num_blocks(self) -> int:
        """Blocks of all groups."""
        return sum(pool.num_blocks for pool in self.pools)

    @property
    def usage(self) -> float:
        """Share of blocks in use, of the group that has the fewest left; or of slots of states."""
        shares = [pool.counts.used / pool.num_blocks for pool in self.pools]
        return max(shares) if self.states is None else max(*shares, self.states.usage)

    def blocks_for(self, tokens: int) -> int:
        """The number of blocks, of each group, that hold this many tokens."""
        return self.pools[0].blocks_for(tokens)

    def first_seen(self, group: int, position: int) -> int:
        """The place in a group's table of the first block that the token at a position, or a later one, reads."""
        window = self._windows[group]
        oldest = max(0, position - window + 1) if window else 0
        return oldest // self._key_group * self._key_group // self.block_size

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens finds room when it is alone."""
        needed = self.blocks_for(tokens)
        return all(
            pool.num_blocks >= needed
            or (window and pool.num_blocks >= blocks_of_window(window, self._chunk, self._key_group, self.block_size))
            for pool, window in zip(self.pools, self._windows, strict=True)
        )

    def grow(self, sequence: Sequence, tokens: int, spare: int = 0) -> bool:
        """See that so many tokens have their slots in every group; False, and nothing changes, when blocks run out.

        Args:
            spare: blocks of each group that must be left.
        """
        missing = [self.blocks_for(tokens) - len(table) for table in sequence.tables]
        if any(count > 0 and pool.available - spare < count for count, pool in zip(missing, self.pools, strict=True)):
            return False
        for count, pool, table in zip(missing, self.pools, sequence.tables, strict=True):
            if count > 0:
                table += pool.allocate(count) or ()
        return True

    def chunk(self, sequence: Sequence, budget: int) -> int:
        """How many more tokens of a prompt find their slots, within the budget: layers that slide get theirs late."""
        wanted = sequence.num_computed + min(budget, sequence.remaining)
        if self.grow(sequence, wanted):
            return wanted - sequence.num_computed
        return min(wanted, self.room(sequence)) - sequence.num_computed

    def room_for_drafts(self, sequence: Sequence, wanted: int, spare: int) -> int:
        """How many drafts find a slot. Fresh blocks are taken only while so many of each group are left."""
        known = len(sequence.tokens)
        self.grow(sequence, known + wanted, spare)
        return min(wanted, self.room(sequence) - known)

    def room(self, sequence: Sequence) -> int:
        """How many tokens of a sequence have their slots."""
        return min(map(len, sequence.tables)) * self.block_size

    def admit(self, sequence: Sequence, keys: Seq[bytes], spare: int) -> bool:
        """Give a newcomer the cached blocks of these keys, and others for its tokens, or change nothing.

        Args:
            spare: blocks of each group that must be left.
        """
        cached = self._cached(keys)
        if self.states is not None and not self.states.enter(sequence, keys[cached - 1] if cached else None):
            return False
        sequence.tables = []
        for group, pool in enumerate(self.pools):
            first = self.first_seen(group, cached * self.block_size)
            sequence.tables.append([0] * first + pool.match(keys[first:cached]))
        sequence.num_computed = cached * self.block_size
        tokens = len(sequence.tokens)
        soon = min(tokens, sequence.num_computed + self._chunk)
        wanted = [self.blocks_for(soon if window else tokens) for window in self._windows]
        missing = [count - len(table) for count, table in zip(wanted, sequence.tables, strict=True)]
        if any(pool.available < count + spare for count, pool in zip(missing, self.pools, strict=True)):
            self.release(sequence)
            sequence.num_computed = 0
            return False
        for count, pool, table in zip(missing, self.pools, sequence.tables, strict=True):
            table += pool.allocate(count) or ()
        return True

    def _cached(self, keys: Seq[bytes]) -> int:
        """How many leading blocks of a prompt can be reused: those of which every group of layers holds all keys and
        values that later tokens attend to."""
        found = len(keys)
        runs: dict[int, list[int]] = {}  # sliding group -> per place how many blocks up to it are there without a gap
        for group, (pool, window) in enumerate(zip(self.pools, self._windows, strict=True)):
            if window:
                run = [0]
                for key in keys:
                    run.append(run[-1] + 1 if pool.has(key) else 0)
                runs[group] = run
            else:
                found = next((place for place, key in enumerate(keys[:found]) if not pool.has(key)), found)
        while found and not (
            all(run[found] >= found - self.first_seen(g, found * self.block_size) for g, run in runs.items())
            and (self.states is None or self.states.has(keys[found - 1]))
        ):
            found -= 1
        return found

    def assign_states(self, works: list[Work]) -> list[Work]:
        """Works that are submitted now, with the states that they read and write."""
        return works if self.states is None else [self.states.assign(work) for work in works]

    def collected(self, work: Work, known: int | None) -> None:
        """A work's step is over: cache what it computed, and give back what nobody will see.

        Args:
            known: the sequence's tokens up to the last one computed that counts; None for one that ended meanwhile.
        """
        if known is not None:
            self._cache_full(work.sequence, work.start, known)
        if self.states is not None:
            self.states.collected(work, computed=known is not None)
        if known is not None:
            self._give_back_unseen(work.sequence, known)

    def _cache_full(self, sequence: Sequence, start: int, end: int) -> None:
        """Make findable the blocks that became full by positions [start, end), whose tokens are known."""
        name_blocks(self, sequence, end)
        for place in range(start // self.block_size, min(end // self.block_size, len(sequence.block_keys))):
            for pool, table in zip(self.pools, sequence.tables, strict=True):
                if table[place]:
                    pool.cache(table[place], sequence.block_keys[place])

    def _give_back_unseen(self, sequence: Sequence, position: int) -> None:
        """Give back the blocks that the token at a position and those after it do not see."""
        for group, (pool, table) in enumerate(zip(self.pools, sequence.tables, strict=True)):
            if not self._windows[group]:
                continue
            end = begin = min(self.first_seen(group, position), len(table))
            while begin and table[begin - 1]:
                begin -= 1
            pool.release(table[begin:end][::-1])  # what lies nearest to the end stays findable longest
            table[begin:end] = [0] * (end - begin)

    def release(self, sequence: Sequence) -> None:
        """Take back all that a sequence has."""
        for window, pool, table in zip(self._windows, self.pools, sequence.tables, strict=False):
            held = [block for block in table if block]
            pool.release(held[::-1] if window else held)
        sequence.tables = []
        if self.states is not None:
            self.states.leave(sequence)

    def allocate(self, count: int) -> list[list[int]] | None:
        """So many blocks of each group for other uses; None while they would leave fewer than that."""
        if any(pool.available < 2 * count for pool in self.pools):
            return None
        return [pool.allocate(count) or [] for pool in self.pools]

    def free(self, tables: Seq[Seq[int]]) -> None:
        """Give back what `allocate` gave."""
        for pool, blocks in zip(self.pools, tables, strict=True):
            pool.release(blocks)

    def reset_cache(self) -> None:
        """Forget every key; blocks in use stay with their holders."""
        for pool in self.pools:
            pool.reset_cache()
        if self.states is not None:
            self.states.reset_cache()


def blocks_of_window(window: int, chunk: int, key_group: int, block_size: int) -> int:
    """The blocks that hold a window of keys, read in aligned groups, and a chunk of tokens behind it."""
    return -(-(window + key_group + chunk) // block_size) + 1


def root_key(tenant: str, cache_salt: str) -> bytes:
    """The start of every chain of one tenant and salt; chains of different roots never meet."""
    digest = blake2b(digest_size=32, person=b"kv-root")
    for part in (tenant.encode(), cache_salt.encode()):
        digest.update(len(part).to_bytes(8, "little"))  # so that ("ab", "c") and ("a", "bc") differ
        digest.update(part)
    return digest.digest()


def chain_key(parent: bytes, spec: bytes, tokens: Seq[int]) -> bytes:
    """Name a full block's content.

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
    """Adapters (digest, weight), in the order in which they are applied, as bytes that only equal lists share."""
    return repr([(digest, float(weight)) for digest, weight in adapters]).encode()


def name_blocks(blocks: BlockGroups, sequence: Sequence, tokens: int) -> None:
    """Extend the chain of keys over the full blocks among the first `tokens` tokens."""
    size, keys = blocks.block_size, sequence.block_keys
    if not blocks.caching or len(keys) >= tokens // size:
        return
    parent = keys[-1] if keys else root_key(sequence.tenant, sequence.cache_salt)
    for index in range(len(keys), tokens // size):
        spec = adapter_spec(_in_force(sequence, index * size, (index + 1) * size))
        parent = chain_key(parent, spec, sequence.tokens[index * size : (index + 1) * size])
        keys.append(parent)


def _in_force(sequence: Sequence, begin: int, end: int) -> AdapterKey:
    """The adapters of tokens [begin, end), as part of a block's key. One that comes into force within the block is
    written differently from one that was in force before it.

    So the blocks before an activated adapter's invocation are the base's, and found by everybody who shares them.
    """
    starts = sequence.starts
    if not starts:
        return sequence.adapter
    found = []
    for digest, weight in sequence.adapter:
        start = starts.get(digest, 0)
        if start < end:
            found.append((f"{digest}+{start - begin}" if start > begin else digest, weight))
    return tuple(found)
