"""Background sequences: they use only idle capacity, and finish eventually."""

from typing import Any

import pytest

from server.engine.sequence import AdapterKey
from tests.support.scheduler_world import BASE, BIG, A, World


def test_background_sequences_run_only_in_idle_steps() -> None:
    world = World()
    world.add([1] * 3, background=True, max_tokens=6)
    first = world.step()
    client = world.add([2] * 3, max_tokens=2)
    steps = [first, *(world.step() for _ in range(3))]
    assert [[work.sequence.id for work in step.works] for step in steps if step] == [["0"], ["1"], ["1"], ["0"]]
    world.run()
    assert client.finish_reason == "length"
    assert len(world.outputs["0"]) == 6


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("places", [3, 1])
def test_the_background_ends_though_clients_always_run(depth: int, places: int) -> None:
    world = World(depth=depth, batch_requests=places, background_seconds=10.0)
    rows = [world.add([1] * 3, background=True, max_tokens=4) for _ in range(2)]
    ends: dict[str, int] = {}
    for step in range(60):
        clients = [one for one in world.sequences.values() if one not in rows and not one.ended]
        if len(clients) < 2:
            world.add([2] * 3, max_tokens=9)
        world.step()
        assert sum(not one.background and not one.ended for one in rows) <= 1
        for row in rows:
            if row.ended:
                ends.setdefault(row.id, step)
    assert 10 <= ends["0"] < ends["1"]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    ("world", "mine", "theirs"),
    [
        ({"batch_requests": 1}, BASE, BASE),  # a place
        ({"num_blocks": 3}, BASE, BASE),  # blocks
        ({}, BIG, A),  # rows for an adapter
    ],
    ids=["place", "blocks", "rows"],
)
def test_the_background_gives_all_that_a_newcomer_lacks(
    depth: int, world: dict[str, Any], mine: AdapterKey, theirs: AdapterKey
) -> None:
    small = World(depth=depth, **world)
    slow = small.add([1] * 3, mine, background=True, max_tokens=5)
    small.step()
    client = small.add([2] * 5, theirs, max_tokens=3)
    for _ in range(3 + 2 * depth):
        small.step()
    assert client.num_generated
    assert slow.num_generated <= 1 + depth
    small.run()
    assert (slow.finish_reason, client.finish_reason) == ("length", "length")
    assert small.scheduler.counters.preemptions
