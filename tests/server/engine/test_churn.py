"""Many more adapters than the device holds, requested with a Zipf distribution."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from loadtest.synthetic import make_adapters
from server.engine.engine import Engine
from server.messages.protocol import AdapterRef, Generate
from tests.support import interpreter
from tests.support.offline import Answer, load_engine, publish, request, run

pytestmark = pytest.mark.usefixtures("two_threads")

ADAPTERS, RESIDENT, REQUESTS = (80, 8, 120) if interpreter.whole_suite() else (200, 10, 300)
TOKENS = 4
RANK = 8


def pool_bytes(engine: Engine, adapters: int) -> int:
    """Bytes of so many fp32 adapters of rank 8 on every linear."""
    unit = sum(2 * (linear.in_features + linear.out_features) for linear in engine.base.linears)
    return 2 * RANK * adapters * unit


def comparable(answer: Answer) -> tuple[list[int], list[float]]:
    assert answer.error is None
    return answer.tokens, [entry.logprob for entry in answer.logprobs]


def test_zipf_requests_over_many_adapters_through_room_for_few(
    shallow_dir: Path, cache_dir: Path, tmp_path: Path
) -> None:
    roomy = load_engine(shallow_dir, cache_dir, prefix_caching=False)
    made = make_adapters(tmp_path, shallow_dir, ADAPTERS, rank=RANK, dtype="float32")
    refs: list[AdapterRef] = [publish(roomy, directory) for directory in made]
    size = pool_bytes(roomy, 1)
    engine = load_engine(shallow_dir, cache_dir, adapter_bytes=size * RESIDENT + 64, adapter_host_bytes=20 * size)
    assert engine.pool.capacity["q_proj"] == 2 * RANK * RESIDENT
    free = engine.pool.free
    blocks = engine.blocks.counts.free

    draw = np.random.default_rng(3)
    popularity = 1 / np.arange(1, ADAPTERS + 1)
    chosen = draw.choice(ADAPTERS, REQUESTS, p=popularity / popularity.sum())
    chosen[: ADAPTERS // 2] = draw.permutation(ADAPTERS)[: ADAPTERS // 2]  # and most of the rarely requested ones
    prompts = torch.randint(3, 500, (REQUESTS, 12), generator=torch.Generator().manual_seed(4)).tolist()

    def asked(i: int) -> Generate:
        return request(str(i), prompts[i], refs[chosen[i]], max_tokens=TOKENS)

    # Two requests arrive with every step, so that a queue builds up while the rows of other adapters are in use.
    waits: Counter[str] = Counter()
    answers = {str(i): Answer() for i in range(REQUESTS)}
    coming = iter(range(REQUESTS))
    arrived = served = 0
    while served < REQUESTS:
        for i in (next(coming, None), next(coming, None)):
            if i is not None:
                engine.add(asked(i))
                arrived += 1
        outputs = engine.step()[0]
        if outputs:  # excludes steps that only wait for the disk
            waits.update(str(i) for i in range(arrived) if not answers[str(i)].tokens)
        for output in outputs:
            answers[output.id].take(output)
            served += output.finish_reason is not None or output.error is not None
    # 30 to 50 steps are usual; a starving request would wait for most of the others.
    assert max(waits.values()) < REQUESTS / 2

    for i in range(0, REQUESTS, 3):
        alone = run(roomy, [asked(i)])[str(i)]
        assert comparable(answers[str(i)]) == comparable(alone), f"request {i}"

    assert engine.idle
    found = [engine.adapter_cache.find(ref.digest) for ref in refs]
    assert len([entry for entry in found if entry is not None and entry.tier == "device"]) <= RESIDENT
    for ref in refs:
        engine.adapter_cache.forget(ref.digest)
    assert engine.pool.free == free
    counts = engine.blocks.counts
    assert counts.free + counts.cached == blocks
    assert [ref for ref in refs if engine.adapter_cache.find(ref.digest) is not None] == []
