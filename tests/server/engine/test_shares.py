"""Fair shares among tenants: in the scheduler's world, a flood of one beside a few requests of another."""

from collections import Counter

import pytest

from tests.support.scheduler_world import A, B, World

PROMPT = [1, 2, 1, 2]


def flooded(requests: int = 20, depth: int = 0) -> World:
    """A world in which tenant "flood" fills every place, and more of it waits."""
    full = World(num_blocks=64, depth=depth)
    for _ in range(requests):
        full.add(PROMPT, tenant="flood", max_tokens=20)
    for _ in range(4):
        full.step()
    assert len(full.scheduler.running) == full.batch_requests
    return full


def served(world: World) -> Counter[str]:
    """Generated tokens of each tenant."""
    return Counter(
        {
            name: sum(one.num_generated for one in world.sequences.values() if one.tenant == name)
            for name in {one.tenant for one in world.sequences.values()}
        }
    )


@pytest.mark.parametrize("depth", [0, 1])
def test_a_light_tenants_first_token_comes_in_the_next_step(depth: int) -> None:
    world = flooded(depth=depth)
    light = world.add(PROMPT, tenant="light", max_tokens=3)
    taken = 0
    while not light.num_generated:
        world.step()
        taken += 1
    assert taken <= 1 + 2 * depth  # in flight: the step that is, the one in which a place becomes free, and its own
    # The place is that of the youngest, which goes on later.
    assert world.scheduler.counters.preemptions == 1
    world.run()
    for sequence in world.sequences.values():
        world.check_finished(sequence)


def test_its_prompt_has_a_step_to_itself() -> None:
    world = flooded()
    world.add([1] * 7, tenant="light", max_tokens=3)
    step = world.schedule()
    assert step is not None
    assert [(work.sequence.tenant, work.count) for work in step.works] == [("light", 7)]


def test_many_light_requests_take_no_more_than_the_share() -> None:
    world = flooded(requests=60)
    before = served(world)
    for _ in range(60):  # as many as come as soon as one has ended
        if sum(one.tenant == "light" and not one.ended for one in world.sequences.values()) < 2:
            world.add([1] * 7, tenant="light", max_tokens=1)
        world.step()
    gained = served(world)
    prompts = sum(one.num_computed - one.cached_tokens for one in world.sequences.values() if one.tenant == "light")
    flood = gained["flood"] - before["flood"]
    assert gained["light"] >= 10
    # Virtual tokens: two for each that the flood generated, one for each token of a light prompt.
    assert flood * 2 >= 0.7 * prompts


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_two_floods_are_served_by_their_weights(weight: float) -> None:
    world = World(num_blocks=64, batch_tokens=16, batch_requests=8)
    for n in range(200):
        world.add(PROMPT, tenant="one" if n % 2 else "other", weight=weight if n % 2 else 1.0, max_tokens=8)
    for _ in range(100):
        world.step()
    gained = served(world)
    assert gained["one"] / gained["other"] == pytest.approx(weight, rel=0.25)


def test_idle_shares_are_used_and_nothing_is_saved_up() -> None:
    world = World(num_blocks=64)
    world.add(PROMPT, tenant="rare", max_tokens=1)
    for _ in range(12):
        world.add(PROMPT, tenant="busy", max_tokens=20)
    for _ in range(40):
        world.step()
    assert served(world)["busy"] >= 100  # it has all four places
    late = [world.add(PROMPT, tenant="rare", max_tokens=20) for _ in range(12)]
    for _ in range(20):
        world.step()
    assert sum(not one.tables for one in late) >= 8  # not more than two run, whatever it did not use before


def test_its_prompt_may_have_been_served_before_the_pause() -> None:
    """Whoever comes and goes is not served anew each time."""
    world = flooded()
    for _ in range(3):
        one = world.add([1] * 7, tenant="light", max_tokens=1)
        while not one.ended:
            world.step()
    shares = world.scheduler._shares
    flood = shares.served("flood")
    world.add(PROMPT, tenant="light", max_tokens=1)
    assert shares.served("light") >= flood


def test_within_a_tenant_the_lowest_priority_comes_first() -> None:
    world = World(batch_requests=1, batch_tokens=8)
    names = {n: world.add(PROMPT, priority=n, max_tokens=1).id for n in (2, 0, 1)}
    order = []
    for _ in range(6):
        world.step()
        order += [name for name, one in world.sequences.items() if one.ended and name not in order]
    assert order == [names[0], names[1], names[2]]


def test_rows_of_adapters_are_shared_too() -> None:
    world = World(num_blocks=64, free_rows=2)
    for _ in range(8):
        world.add(PROMPT, A, tenant="flood", max_tokens=20)
    for _ in range(4):
        world.step()
    light = world.add(PROMPT, B, tenant="light", max_tokens=1)
    for _ in range(6):
        world.step()
    assert light.finish_reason == "length"


def test_more_tenants_than_places_take_turns() -> None:
    world = World(batch_requests=2, batch_tokens=8, num_blocks=64)
    for n in range(6):
        world.add(PROMPT, tenant=str(n), max_tokens=6)
    world.run()
    assert world.scheduler.counters.preemptions == 0
    for sequence in world.sequences.values():
        world.check_finished(sequence)
