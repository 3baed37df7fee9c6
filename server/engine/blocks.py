"""The paged KV cache's bookkeeping: blocks in use, and finished blocks that the prefix cache finds again.

A block is a number; its keys and values live in tensors that this file never sees. A block's content is named by a
key; equal keys mean equal content.

A block is in exactly one of three states. *Free*: it has no reference and no content. *Cached*: it has no reference,
but was published under a key, and `match` finds it until it is evicted. *Used*: it has references (`match` may
find it at the same time, so that running sequences share it).
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import astuple, dataclass
from hashlib import blake2b

from server.engine.sequence import AdapterKey, Sequence


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """How many blocks are in each state; the three add up to the pool's size."""

    free: int
    cached: int
    used: int


class BlockPool:
    """Reference-counted blocks 1..`num_blocks` with a prefix cache over the finished ones.

    Args:
        num_blocks: usable blocks; the tensors need `num_blocks + 1`, since block 0 is scratch.
        block_size: tokens per block.
        caching: when false nothing is ever findable and every released block is free at once.
    """

    def __init__(self, num_blocks: int, block_size: int, caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"need at least one block of at least one token, got {num_blocks} x {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = caching
        self._references = [0] * (num_blocks + 1)
        self._key: list[bytes | None] = [None] * (num_blocks + 1)
        self._by_key: dict[bytes, int] = {}
        self._free = list(range(num_blocks, 0, -1))  # a stack: low numbers leave first
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached blocks, next victim first

    @property
    def available(self) -> int:
        """How many blocks `allocate` could hand out now."""
        return len(self._free) + len(self._evictable)

    @property
    def counts(self) -> BlockCounts:
        """Free, cached and used blocks as of now."""
        free, cached = len(self._free), len(self._evictable)
        return BlockCounts(free, cached, self.num_blocks - free - cached)

    def blocks_for(self, tokens: int) -> int:
        """The number of blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """Hand out `count` blocks with one reference each, evicting cached ones as needed.

        Returns None, and changes nothing, when fewer are available.
        """
        if count > self.available:
            return None
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Seq[int]) -> None:
        """Give back one reference to each block of a chain (given from its start)."""
        # From the end: a chain's deepest block is then evicted first, and what remains of it stays findable.
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise ValueError(f"block {block} is not in use")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._key[block] is None:
                    self._free.append(block)
                else:
                    self._evictable[block] = None

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """Find the blocks of the longest cached prefix of a chain and take a reference to each."""
        blocks = []
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                break
            self._references[block] += 1
            self._evictable.pop(block, None)
            blocks.append(block)
        return blocks

    def has(self, key: bytes) -> bool:
        """Whether `match` would find this key."""
        return key in self._by_key

    def publish(self, block: int, key: bytes) -> None:
        """Make a used block findable: all its slots now hold the content that `key` names.

        When another block already serves that key, that one stays the one to be found.
        """
        if self._references[block] < 1:
            raise ValueError(f"block {block} is not in use")
        if self.caching and key not in self._by_key and self._key[block] is None:
            self._by_key[key] = block
            self._key[block] = key

    def reset_cache(self) -> None:
        """Forget every key; blocks in use stay with their holders."""
        for block in self._by_key.values():
            self._key[block] = None
        self._by_key.clear()
        self._free.extend(self._evictable)
        self._evictable.clear()

    def _evict(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        key = self._key[block]
        assert key is not None
        del self._by_key[key]
        self._key[block] = None
        return block


class BlockGroups:
    """The blocks of all groups of KV layers: a sequence has a table in each.

    In a group whose layers see a window, a sequence gives back the blocks that no later token sees; its table says 0
    (scratch) there. Such a group holds those of its tokens that are about to be computed and the window before them.

    Args:
        pools: one per group, of one block size.
        windows: per group how many of the last keys a token sees; 0 for all.
        chunk: most tokens of one step.
        key_group: attention reads keys in groups of this many, aligned to the sequence's start.
    """

    def __init__(self, pools: Seq[BlockPool], windows: Seq[int], chunk: int, key_group: int) -> None:
        self.pools = pools
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
        """Share of blocks in use, of the group that has the fewest left."""
        return max(pool.counts.used / pool.num_blocks for pool in self.pools)

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

    def room(self, sequence: Sequence) -> int:
        """How many tokens of a sequence have their slots."""
        return min(map(len, sequence.tables)) * self.block_size

    def admit(self, sequence: Sequence, keys: Seq[bytes], spare: int) -> bool:
        """Give a newcomer the cached blocks of these keys, and others for its tokens, or change nothing.

        Args:
            spare: blocks of each group that must be left.
        """
        cached = self._cached(keys)
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
        """How many leading blocks of a chain need not be computed: each group has what later tokens see of them."""
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
        while found and any(
            run[found] < found - self.first_seen(g, found * self.block_size) for g, run in runs.items()
        ):
            found -= 1
        return found

    def publish(self, sequence: Sequence, place: int, key: bytes) -> None:
        """Make a sequence's blocks at a place of its tables findable: all of their slots hold what `key` names."""
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            if table[place]:
                pool.publish(table[place], key)

    def give_back_unseen(self, sequence: Sequence, position: int) -> None:
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

    def take(self, count: int) -> list[list[int]] | None:
        """So many blocks of each group for other uses; None while they would leave fewer than that."""
        if any(pool.available < 2 * count for pool in self.pools):
            return None
        return [pool.allocate(count) or [] for pool in self.pools]

    def give(self, taken: Seq[Seq[int]]) -> None:
        """Give back what `take` gave."""
        for pool, blocks in zip(self.pools, taken, strict=True):
            pool.release(blocks)

    def reset_cache(self) -> None:
        """Forget every key; blocks in use stay with their holders."""
        for pool in self.pools:
            pool.reset_cache()


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
    size, keys = blocks.block_size, sequence._keys
    if not blocks.caching or len(keys) >= tokens // size:
        return
    parent = keys[-1] if keys else root_key(sequence.tenant, sequence.cache_salt)
    for index in range(len(keys), tokens // size):
        spec = adapter_spec(_in_force(sequence, index * size, (index + 1) * size))
        parent = chain_key(parent, spec, sequence.tokens[index * size : (index + 1) * size])
        keys.append(parent)


def publish_blocks(blocks: BlockGroups, sequence: Sequence, start: int, end: int) -> None:
    """Offer the blocks that became full by positions [start, end), whose tokens are known."""
    name_blocks(blocks, sequence, end)
    size = blocks.block_size
    for index in range(start // size, min(end // size, len(sequence._keys))):
        blocks.publish(sequence, index, sequence._keys[index])


def _in_force(sequence: Sequence, begin: int, end: int) -> AdapterKey:
    """The adapters of tokens [begin, end); one that comes into force within them is another than one in force before.

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
