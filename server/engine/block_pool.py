"""A reference-counted pool of blocks with a prefix cache.

A block is a number here; its keys and values lie in the tensors of `KVCache`. A block's content is named by a key;
equal keys mean equal content.

A block is in exactly one of three states. *Free*: no references and no content. *Cached*: no references, but cached
under a key, so that `match` finds it until it is evicted. *Used*: it has references (`match` may find it at the same
time, so that running sequences share it).
"""

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """The number of blocks in each state; the three add up to the pool's size."""

    free: int
    cached: int
    used: int


class BlockPool:
    """Reference-counted blocks 1..`num_blocks` with a prefix cache over full blocks.

    Args:
        num_blocks: usable blocks; the tensors need `num_blocks + 1`, since block 0 is scratch.
        block_size: tokens per block.
        caching: when false, no block is cached and every released block is free at once.
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
        self._free = list(range(num_blocks, 0, -1))  # a stack: low numbers are allocated first
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached blocks, least recently used first

    @property
    def available(self) -> int:
        """The number of blocks that `allocate` can return now."""
        return len(self._free) + len(self._evictable)

    @property
    def counts(self) -> BlockCounts:
        """The current numbers of free, cached and used blocks."""
        free, cached = len(self._free), len(self._evictable)
        return BlockCounts(free, cached, self.num_blocks - free - cached)

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """Allocate `count` blocks with one reference each, evicting cached ones as needed.

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
        """Release one reference to each block of a chain (listed from its start)."""
        # From the end: a chain's last block is then evicted first, and the remaining prefix can still be matched.
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
        """Return the blocks of the longest cached prefix of a chain, taking a reference to each."""
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

    def cache(self, block: int, key: bytes) -> None:
        """Cache a used block under `key`, which names the content of all its tokens.

        If another block is already cached under that key, `match` keeps finding that one.
        """
        if self._references[block] < 1:
            raise ValueError(f"block {block} is not in use")
        if self.caching and key not in self._by_key and self._key[block] is None:
            self._by_key[key] = block
            self._key[block] = key

    def reset_cache(self) -> None:
        """Drop all keys. Used blocks keep their references."""
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
