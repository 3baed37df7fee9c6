"""Names of a sequence's full blocks, by which others with the same beginning find them in the prefix cache."""

from server.engine.blocks import BlockPool, adapter_spec, chain_key, root_key
from server.engine.sequence import AdapterKey, Sequence


def name_blocks(blocks: BlockPool, sequence: Sequence, tokens: int) -> None:
    """Extend the chain of keys over the full blocks among the first `tokens` tokens."""
    size, keys = blocks.block_size, sequence._keys
    if not blocks.caching or len(keys) >= tokens // size:
        return
    parent = keys[-1] if keys else root_key(sequence.tenant, sequence.cache_salt)
    for index in range(len(keys), tokens // size):
        spec = adapter_spec(_in_force(sequence, index * size, (index + 1) * size))
        parent = chain_key(parent, spec, sequence.tokens[index * size : (index + 1) * size])
        keys.append(parent)


def publish(blocks: BlockPool, sequence: Sequence, start: int, end: int) -> None:
    """Offer the blocks that became full by positions [start, end), whose tokens are known."""
    name_blocks(blocks, sequence, end)
    size = blocks.block_size
    for index in range(start // size, min(end // size, len(sequence._keys))):
        blocks.publish(sequence.blocks[index], sequence._keys[index])


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
