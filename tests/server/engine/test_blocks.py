"""The block pool compared with a simple, slow model."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from server.engine.block_pool import BlockCounts, BlockPool
from server.engine.blocks import adapter_spec, chain_key, root_key

NUM_BLOCKS = 7


class BlockModel(RuleBasedStateMachine):
    """Holders take chains, publish blocks under keys, and release them in any order.

    The model keeps a count per block, a key per cached block, and the time of each cached block's last release.
    """

    chains = Bundle("chains")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS, block_size=4)
        self.references: Counter[int] = Counter()
        self.names: dict[int, bytes] = {}
        self.idle_since: dict[int, int] = {}  # cached blocks without holders
        self.clock = 0

    def blocks_named(self, name: bytes) -> list[int]:
        return [block for block, other in self.names.items() if other == name]

    @rule(target=chains, count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, count: int) -> object:
        idle_and_nameless = NUM_BLOCKS - len(+self.references) - len(self.idle_since)
        blocks = self.pool.allocate(count)
        if count > idle_and_nameless + len(self.idle_since):
            assert blocks is None
            return multiple()
        assert blocks is not None
        assert len(set(blocks)) == count
        evicted = sorted(self.idle_since, key=self.idle_since.__getitem__)[: max(0, count - idle_and_nameless)]
        assert set(evicted) == {block for block in blocks if block in self.names}
        for block in evicted:
            del self.names[block], self.idle_since[block]
        assert not any(self.references[block] for block in blocks)
        self.references.update(blocks)
        return blocks

    @rule(chain=consumes(chains))
    def release(self, chain: list[int]) -> None:
        self.pool.release(chain)
        for block in reversed(chain):
            self.references[block] -= 1
            self.clock += 1
            if not self.references[block] and block in self.names:
                self.idle_since[block] = self.clock

    @rule(chain=chains, names=st.lists(st.sampled_from("abcd"), max_size=4))
    def cache(self, chain: list[int], names: list[str]) -> None:
        for block, name in zip(chain, names, strict=False):
            key = name.encode()
            self.pool.cache(block, key)
            if block not in self.names and not self.blocks_named(key):
                self.names[block] = key

    @rule(target=chains, names=st.lists(st.sampled_from("abcde"), max_size=4))
    def match(self, names: list[str]) -> list[int]:
        expected = []
        for name in names:
            found = self.blocks_named(name.encode())
            if not found:
                break
            expected += found
        chain = self.pool.match([name.encode() for name in names])
        assert chain == expected
        self.references.update(chain)
        for block in chain:
            self.idle_since.pop(block, None)
        return chain

    @rule()
    def reset(self) -> None:
        self.pool.reset_cache()
        self.names.clear()
        self.idle_since.clear()

    @invariant()
    def accounting(self) -> None:
        used, cached = len(+self.references), len(self.idle_since)
        assert self.pool.counts == BlockCounts(NUM_BLOCKS - used - cached, cached, used)
        assert self.pool.available == NUM_BLOCKS - used
        assert 0 not in self.references  # reserved for padding rows


TestBlockModel = BlockModel.TestCase
TestBlockModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_a_chain_is_evicted_from_its_deepest_block() -> None:
    pool = BlockPool(3, 4)
    chain = pool.allocate(3)
    assert chain is not None
    for block, key in zip(chain, (b"a", b"b", b"c"), strict=True):
        pool.cache(block, key)
    pool.release(chain)
    assert pool.allocate(1) == chain[2:]
    assert pool.match([b"a", b"b", b"c"]) == chain[:2]


def test_free_blocks_are_used_before_cached_ones() -> None:
    pool = BlockPool(2, 4)
    block = pool.allocate(1)
    assert block is not None
    pool.cache(block[0], b"a")
    pool.release(block)
    assert pool.allocate(1) != block
    assert pool.match([b"a"]) == block


def test_of_two_blocks_with_equal_content_the_first_is_found() -> None:
    pool = BlockPool(2, 4)
    blocks = pool.allocate(2)
    assert blocks is not None
    for block in blocks:
        pool.cache(block, b"a")
    assert pool.match([b"a"]) == blocks[:1]
    pool.release(blocks)
    assert pool.counts == BlockCounts(free=1, cached=0, used=1)


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(2, 4, caching=False)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.cache(blocks[0], b"a")
    assert pool.match([b"a"]) == []
    pool.release(blocks)
    assert pool.counts == BlockCounts(free=2, cached=0, used=0)


def test_misuse_is_caught() -> None:
    pool = BlockPool(2, 4)
    with pytest.raises(ValueError, match="not in use"):
        pool.release([1])
    with pytest.raises(ValueError, match="not in use"):
        pool.cache(1, b"a")
    with pytest.raises(ValueError, match="at least one"):
        BlockPool(0, 4)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert BlockPool(9, 4).blocks_for(tokens) == blocks


def test_keys_tell_everything_apart() -> None:
    """Each ingredient of a key changes it, and different lists of ingredients give different keys."""
    roots = [root_key(*names) for names in [("", ""), ("a", ""), ("", "a"), ("ab", "c"), ("a", "bc")]]
    specs = [
        adapter_spec(adapters)
        for adapters in [
            (),
            [("x", 1.0)],
            [("x", 0.5)],
            [("y", 1.0)],
            [("x", 1.0), ("y", 1.0)],
            [("y", 1.0), ("x", 1.0)],
        ]
    ]
    keys = [chain_key(root, spec, tokens) for root in roots for spec in specs for tokens in ([1, 2], [2, 1], [1, 3])]
    keys += [chain_key(keys[0], specs[0], [1, 2])]
    assert len(set(keys)) == len(keys)
    assert chain_key(roots[0], specs[1], [1, 2]) == chain_key(root_key("", ""), adapter_spec([("x", 1)]), (1, 2))
