"""Comparison of two ways to run one adapter, such as unmerged and merged: drift of the answers, and speed of each.

It runs in pieces between the engine's steps, on sequences outside the scheduler, with KV blocks that are released
afterwards.
"""

import time
from collections.abc import Generator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from itertools import chain
from statistics import median

from server.engine.blocks import BlockGroups
from server.engine.runner import Runner
from server.engine.sequence import AdapterKey, Sequence, Work
from server.messages.protocol import MergeSpeed, Sampling

CHUNK = 4  # tokens of a piece: its time about fills the gap allowed between steps
CONTEXT_BLOCKS = 2  # blocks of context before the timed tokens
STEPS, WARM_UP = 14, 2  # decoded tokens, and the first ones among them that are not timed
BATCHES = (1, 8)  # requests at once

Pieces = Generator[str, None, None]  # yields the kind of the next piece: pieces of one kind cost about the same


class CacheTooSmall(ValueError):
    """The KV cache is too small for a comparison."""


@dataclass
class Comparison:
    """The differences of the second side from the first."""

    positions: int = 0
    divergence: float = 0.0  # KL, summed over positions, in nats
    agreeing: int = 0  # positions with the same most likely token
    speeds: list[MergeSpeed] = field(default_factory=list)


def compare(
    runner: Runner,
    blocks: BlockGroups,
    keys: tuple[AdapterKey, AdapterKey],
    prompts: Seq[Seq[int]],
    max_requests: int,
) -> Generator[str, None, Comparison]:
    """Run both sides over `prompts`, and decode a few tokens with each.

    Raises:
        CacheTooSmall: the KV cache has too few blocks.
    """
    comparison = Comparison()
    longest = longest_text(blocks)
    if longest < blocks.block_size * (CONTEXT_BLOCKS + 1):
        raise CacheTooSmall(f"a KV cache of {blocks.capacity} blocks leaves no room to compare (--kv-cache-bytes)")
    for prompt in prompts:
        yield from drift((runner, runner), (blocks, blocks), keys, prompt[:longest], comparison, CHUNK)
    context = [token for prompt in prompts for token in prompt]
    needed = CONTEXT_BLOCKS * blocks.block_size
    context = (context * needed)[:needed]
    for requests in BATCHES:
        most = longest // blocks.block_size if blocks.states is None else blocks.states.num_slots // 2
        if requests <= max_requests and 2 * requests <= min(most, longest // blocks.block_size):
            yield from _speed(runner, blocks, keys, context, requests, comparison)
    return comparison


def drift(
    runners: tuple[Runner, Runner],
    pools: tuple[BlockGroups, BlockGroups],
    keys: tuple[AdapterKey, AdapterKey],
    prompt: Seq[int],
    comparison: Comparison,
    chunk: int,
) -> Pieces:
    """Run both sides over a prompt, `chunk` tokens at a time, and add their differences to `comparison`."""
    count = pools[0].blocks_for(len(prompt))
    taken: list[list[list[int]]] = []
    sequences: list[Sequence] = []
    try:
        for key, pool in zip(keys, pools, strict=True):
            taken += [(yield from _allocate(pool, count))]
            sequences += [(yield from _sequence(pool, prompt, key, taken[-1]))]
        first, second = sequences
        for start in range(0, len(prompt), chunk):
            length = min(chunk, len(prompt) - start)
            yield "drift"
            first_logprobs = runners[0].logits([_work(first, start, length)]).log_softmax(-1)
            yield "drift"
            second_logprobs = runners[1].logits([_work(second, start, length)]).log_softmax(-1)
            comparison.positions += length
            comparison.divergence += float((first_logprobs.exp() * (first_logprobs - second_logprobs)).sum())
            comparison.agreeing += int((first_logprobs.argmax(-1) == second_logprobs.argmax(-1)).sum())
    finally:
        for pool, tables in zip(pools, taken, strict=False):
            pool.free(tables)
        for pool, sequence in zip(pools, sequences, strict=False):
            _release_state(pool, sequence)


def _speed(
    runner: Runner,
    pool: BlockGroups,
    keys: tuple[AdapterKey, AdapterKey],
    context: Seq[int],
    requests: int,
    comparison: Comparison,
) -> Pieces:
    """Time decoding on both sides, for `requests` sequences at once.

    The sequences of a side share the context's blocks and have one block each for their generated tokens.
    """
    assert pool.block_size > STEPS
    taken = yield from _allocate(pool, 2 * (CONTEXT_BLOCKS + requests))
    both: list[list[Sequence]] = []
    try:
        unused = list(zip(*taken, strict=True))  # each entry has one block of every group
        for key in keys:
            shared = [unused.pop() for _ in range(CONTEXT_BLOCKS)]
            both.append([])
            for _ in range(requests):
                tables = list(map(list, zip(*shared, unused.pop(), strict=True)))
                both[-1].append((yield from _sequence(pool, [*context, context[0]], key, tables)))
            alone, *others = both[-1]
            for start in range(0, len(context), CHUNK):
                yield "drift"
                work, end = _work(alone, start, CHUNK), start + CHUNK
                runner.logits([replace(work, runs=[*work.runs, *((end, end, alone.slot, o.slot) for o in others)])])
            for other in others:
                other.source_slot = other.slot
        seconds: tuple[list[float], list[float]] = [], []
        for _ in range(STEPS):
            for sequences, times in zip(both, seconds, strict=True):
                yield f"decode {requests}"
                began = time.perf_counter()
                logits = runner.logits([_work(sequence, len(sequence.tokens) - 1, 1) for sequence in sequences])
                for sequence, token in zip(sequences, logits.argmax(-1).tolist(), strict=True):
                    sequence.tokens.append(token)
                times.append(time.perf_counter() - began)
        first, second = (requests / median(times[WARM_UP:]) for times in seconds)
        comparison.speeds.append(MergeSpeed(requests, first, second))
    finally:
        pool.free(taken)
        for sequence in chain(*both):
            _release_state(pool, sequence)


def longest_text(blocks: BlockGroups) -> int:
    """Return the number of tokens that can be compared: both sides together take at most half of the blocks."""
    return min(pool.num_blocks for pool in blocks.pools) // 4 * blocks.block_size


def _allocate(pool: BlockGroups, count: int) -> Generator[str, None, list[list[int]]]:
    """Allocate `count` blocks of every group, once as many would remain for running sequences."""
    while (taken := pool.allocate(count)) is None:
        yield "waiting"
    return taken


def _sequence(
    pool: BlockGroups, tokens: Seq[int], key: AdapterKey, tables: list[list[int]]
) -> Generator[str, None, Sequence]:
    """Return a sequence with these blocks, once there is a state slot for it."""
    sequence = Sequence(id="", prompt=tokens, sampling=Sampling(), adapter=key)
    while pool.states is not None and not pool.states.acquire(sequence, None):
        yield "waiting"
    sequence.tables = tables
    return sequence


def _release_state(pool: BlockGroups, sequence: Sequence) -> None:
    if pool.states is not None:
        pool.states.release(sequence)


def _work(sequence: Sequence, start: int, count: int) -> Work:
    """Return a work that keeps all of its logits."""
    runs = [(start, start + count, sequence.source_slot, sequence.slot)]
    sequence.source_slot = sequence.slot
    return Work(sequence, start, count, samples=False, prompt_rows=range(start, start + count), runs=runs)
