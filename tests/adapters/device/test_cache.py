"""The adapter cache: residency, eviction order, pins, and loads that fail or take long."""

import threading
from collections.abc import Iterable, Iterator
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from adapters.device import host
from adapters.device.cache import AdapterCache, Key, choose_victims
from adapters.device.host import HostAdapter, host_adapter
from adapters.device.pool import RowPool
from adapters.device.rows import round_up
from tests.adapters.device.test_pool import LINEARS

UNITS = 16


def load(digest: str, path: str) -> HostAdapter:
    """`path` is the rank; loading "bad" fails."""
    if path == "bad":
        raise OSError("the file is gone")
    rank = int(path)
    return host_adapter(digest, {"layers.0.q_proj": (torch.zeros(rank, 8), torch.zeros(12, rank), 1.0)}, torch.float32)


def windows_of(pool: RowPool, digest: str) -> dict[str, int]:
    resident = pool.adapter(digest)
    assert resident is not None
    return dict(resident.windows)


def key(*names: str) -> Key:
    return tuple((name, 1.0) for name in names)


class Fixture:
    def __init__(self, host_bytes: int = 1 << 20) -> None:
        self.pool = RowPool(LINEARS, {"q_proj": UNITS, "down_proj": UNITS}, torch.device("cpu"))
        self.cache = AdapterCache(self.pool, load, host_bytes)

    def settle(self, wanted: Key) -> str:
        """Acquire until the answer is no longer "loading"."""
        answer = self.cache.acquire(wanted)
        for _ in range(10):
            if answer != "loading":
                break
            while self.cache.loading:
                threading.Event().wait(0.001)
                self.cache.poll()
            answer = self.cache.acquire(wanted)
        return answer


@pytest.fixture(params=["filled at once", "filled beside steps"])
def tiers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fixture]:
    if request.param == "filled beside steps":
        monkeypatch.setattr(host, "AT_ONCE_BYTES", 0)
    fixture = Fixture()
    for name, rank in (("a", 4), ("b", 4), ("c", 4), ("big", 8)):
        fixture.cache.register(name, str(rank))
    yield fixture
    fixture.cache.close()


def test_a_load_is_off_the_path_then_ready(tiers: Fixture) -> None:
    assert tiers.cache.acquire(key("a")) == "loading"
    assert tiers.settle(key("a")) == "ready"
    assert "a" in tiers.pool
    assert [digest for digest, _ in tiers.cache.loads] == ["a"]


def test_a_prefetched_adapter_is_ready_when_asked_for(tiers: Fixture) -> None:
    tiers.cache.prefetch("a")
    while tiers.cache.loading:
        tiers.cache.poll()
    assert tiers.settle(key("a")) == "ready"
    tiers.cache.prefetch("a")
    assert not tiers.cache.loading


def test_the_least_recently_used_leaves_first(tiers: Fixture) -> None:
    for name in ("a", "b", "a"):
        assert tiers.settle(key(name)) == "ready"
        tiers.cache.release(key(name))
    assert tiers.settle(key("c")) == "ready"
    assert tiers.cache.evictions == ["b"]


def test_adapters_in_use_are_not_evicted(tiers: Fixture) -> None:
    assert tiers.settle(key("a")) == "ready"
    assert tiers.settle(key("big")) == "full"
    assert tiers.cache.evictions == [], "nothing is evicted for an adapter that would not fit anyway"
    tiers.cache.release(key("a"))
    assert tiers.settle(key("big")) == "ready"


def test_several_adapters_come_together_or_not_at_all(tiers: Fixture) -> None:
    assert tiers.settle(key("a", "b")) == "ready"
    assert tiers.settle(key("a", "c")) == "full"
    tiers.cache.release(key("a", "b"))
    assert tiers.settle(key("a", "c")) == "ready"
    assert tiers.cache.evictions == ["b"]


def test_a_failed_load_is_told_once_and_tried_again(tiers: Fixture) -> None:
    tiers.cache.register("x", "bad")
    assert tiers.settle(key("x")) == "failed"
    assert "gone" in tiers.cache.error(key("x"))
    tiers.cache.register("x", "2")
    assert tiers.settle(key("x")) == "ready"


def test_a_forgotten_adapter_leaves_when_its_last_user_does(tiers: Fixture) -> None:
    assert tiers.settle(key("a")) == "ready"
    tiers.cache.forget("a")
    assert "a" in tiers.pool
    tiers.cache.release(key("a"))
    assert "a" not in tiers.pool
    assert tiers.cache.find("a") is None


def test_the_host_tier_is_bounded_in_bytes() -> None:
    fixture = Fixture(host_bytes=2 * load("x", "4").bytes)
    for name in "abc":
        fixture.cache.register(name, "4")
        assert fixture.settle(key(name)) == "ready"
        fixture.cache.release(key(name))
    assert on_device(fixture) == {"b", "c"}
    assert list(fixture.cache._host) == ["b", "c"]
    fixture.cache.close()


def test_rows_are_not_moved_while_others_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "AT_ONCE_BYTES", 0)
    fixture = Fixture()
    tiers, pool = fixture.cache, fixture.pool
    ranks = {"a": 2, "b": 2, "c": 2, "d": 1, "e": 3}  # of 8 that fit
    for name, rank in ranks.items():
        tiers.register(name, str(rank))
    for name in "abc":
        assert fixture.settle(key(name)) == "ready"
    for name in "ac":
        tiers.release(key(name))
    # `e` needs 6 units. Without `a` and `c` 6 are free, but not contiguous: `b` lies between.
    gate, fill = threading.Event(), RowPool.fill

    def slowly(self: RowPool, adapter: HostAdapter) -> None:
        assert gate.wait(60)
        fill(self, adapter)

    monkeypatch.setattr(RowPool, "fill", slowly)
    assert tiers.acquire(key("d")) == "loading"
    while "d" not in pool:
        tiers.poll()
        assert tiers.acquire(key("d")) == "loading"
    tiers.forget("a")
    tiers.insert(load("e", "3"))
    before = windows_of(pool, "b")
    assert tiers.acquire(key("e")) == "full"
    assert windows_of(pool, "b") == before
    gate.set()
    come_to_rest(fixture)
    assert fixture.settle(key("e")) == "ready"
    assert pool.free["q_proj"] + pool.resident["q_proj"] == UNITS
    tiers.close()


def test_a_loaded_adapter_is_not_evicted_before_its_waiting_request_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "AT_ONCE_BYTES", 0)
    fixture = Fixture()
    for name in "ab":
        fixture.cache.register(name, "8")
    fixture.cache.acquire(key("a"))
    come_to_rest(fixture)
    assert fixture.cache.acquire(key("a")) == "loading"
    come_to_rest(fixture)
    fixture.cache.insert(load("b", "8"))
    assert fixture.cache.acquire(key("b")) == "full"
    assert fixture.cache.acquire(key("a")) == "ready"
    fixture.cache.release(key("a"))
    assert fixture.settle(key("b")) == "ready"
    fixture.cache.close()


def put_on_device(tiers: Fixture, *names: str) -> None:
    for name in names:
        assert tiers.settle(key(name)) == "ready"
        tiers.cache.release(key(name))


def on_device(tiers: Fixture) -> set[str]:
    """The test adapters that are resident."""
    found = {name: tiers.cache.find(name) for name in (*"abcde", "big")}
    return {name for name, entry in found.items() if entry is not None and entry.tier == "device"}


def come_to_rest(tiers: Fixture) -> None:
    tiers.cache.poll()
    while tiers.cache.loading:
        tiers.cache.poll()


def test_a_pinned_adapter_comes_by_itself_and_stays(tiers: Fixture) -> None:
    tiers.cache.pin({"a": "4"})
    come_to_rest(tiers)
    assert on_device(tiers) == {"a"}
    put_on_device(tiers, "b", "c", "b", "c")
    assert on_device(tiers) == {"a", "c"}
    assert "a" not in tiers.cache.evictions
    tiers.cache.pin({})
    put_on_device(tiers, "b", "big")
    assert on_device(tiers) == {"big"}


def test_a_pinned_adapter_is_evicted_only_for_one_that_cannot_fit_beside_it(tiers: Fixture) -> None:
    tiers.cache.pin({"a": "4"})
    come_to_rest(tiers)
    assert tiers.settle(key("b")) == "ready"
    assert tiers.settle(key("c")) == "full", "it fits beside the pin, so it waits for those in use"
    tiers.cache.release(key("b"))
    assert tiers.settle(key("big")) == "ready", "it can never fit beside the pin"
    come_to_rest(tiers)
    assert on_device(tiers) == {"big"}
    tiers.cache.release(key("big"))
    come_to_rest(tiers)
    assert on_device(tiers) == {"a"}


def test_pins_that_do_not_fit_together_do_not_push_each_other_out(tiers: Fixture) -> None:
    tiers.cache.pin({"a": "4", "b": "4", "c": "4"})
    for _ in range(3):
        come_to_rest(tiers)
    assert len(on_device(tiers)) == 2
    assert tiers.cache.evictions == []


def test_a_tenant_at_its_row_limit_evicts_its_own_adapters(tiers: Fixture) -> None:
    """Even if another tenant's adapter is the least recently used."""
    acme = ("acme", 8)  # rows of one of these adapters
    for name in ("a", "c"):
        tiers.cache.register(name, "4", acme)
    put_on_device(tiers, "b", "a", "c")
    assert on_device(tiers) == {"b", "c"}
    tiers.cache.register("a", "4", acme)
    assert tiers.settle(key("c")) == "ready"
    put_on_device(tiers, "a")
    assert on_device(tiers) == {"a", "c"}, "adapters in use stay, whoever owns them"
    tiers.cache.release(key("c"))
    tiers.cache.register("a", "4")
    tiers.cache.register("c", "4")
    put_on_device(tiers, "a", "c")
    assert on_device(tiers) == {"a", "c"}, "without a limit both may be resident"


def test_a_pinned_adapter_that_cannot_be_read_is_not_read_for_ever(tiers: Fixture) -> None:
    tiers.cache.pin({"x": "bad"})
    come_to_rest(tiers)
    tiers.cache.poll()
    assert not tiers.cache.loading
    assert tiers.settle(key("x")) == "failed"
    assert "gone" in tiers.cache.error(key("x"))


class TiersMachine(RuleBasedStateMachine):
    """Acquire, release and forget in any order: references stay valid, and the rows add up."""

    ranks: ClassVar = {"a": 1, "b": 3, "c": 4, "d": 8}

    def __init__(self) -> None:
        super().__init__()
        self.fixture = Fixture(host_bytes=500)
        for name, rank in self.ranks.items():
            self.fixture.cache.register(name, str(rank))
        self.held: list[Key] = []

    @rule(names=st.lists(st.sampled_from("abcd"), min_size=1, max_size=2, unique=True))
    def acquire(self, names: list[str]) -> None:
        wanted = key(*names)
        answer = self.fixture.settle(wanted)
        in_use = {name for held in self.held for name, _ in held} | set(names)
        fits = sum(round_up(2 * self.ranks[name]) for name in in_use) <= UNITS
        assert answer == ("ready" if fits else "full")
        if answer == "ready":
            self.held.append(wanted)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            self.fixture.cache.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(name=st.sampled_from("abcd"))
    def forget(self, name: str) -> None:
        self.fixture.cache.forget(name)

    @rule(names=st.sets(st.sampled_from("abcd")))
    def pin(self, names: set[str]) -> None:
        self.fixture.cache.pin({name: str(self.ranks[name]) for name in sorted(names)})

    @invariant()
    def adds_up(self) -> None:
        pool = self.fixture.pool
        come_to_rest(self.fixture)
        for held in self.held:
            assert all(name in pool for name, _ in held)
        assert pool.resident["q_proj"] == sum(round_up(2 * self.ranks[name]) for name in on_device(self.fixture))
        assert pool.free["q_proj"] + pool.resident["q_proj"] == UNITS

    def teardown(self) -> None:
        self.fixture.cache.close()


KINDS = ("q_proj", "down_proj")
UNITS_PER_KIND = st.dictionaries(st.sampled_from(KINDS), st.integers(1, 8))


@given(need=UNITS_PER_KIND, free=UNITS_PER_KIND, held=st.lists(UNITS_PER_KIND, max_size=6))
def test_victims_are_the_first_that_make_room(
    need: dict[str, int], free: dict[str, int], held: list[dict[str, int]]
) -> None:
    """The victims suffice, each is needed when its turn comes, and no candidate passed over would have sufficed."""

    def room(gone: Iterable[str]) -> dict[str, int]:
        return {kind: free.get(kind, 0) + sum(units[one].get(kind, 0) for one in gone) for kind in KINDS}

    def enough(gone: Iterable[str]) -> bool:
        return all(room(gone)[kind] >= wanted for kind, wanted in need.items())

    units = {str(place): each for place, each in enumerate(held)}
    asked: list[str] = []

    def units_of(digest: str) -> dict[str, int]:
        asked.append(digest)
        return units[digest]

    victims = choose_victims(need, free, units, units_of)
    if victims is None:
        assert not enough(units)
        return
    assert enough(victims)
    assert [one for one in units if one in victims] == victims, "in order"
    for place, victim in enumerate(victims):
        lacking = {kind for kind, wanted in need.items() if room(victims[:place])[kind] < wanted}
        assert lacking & units[victim].keys(), "its rows are needed when its turn comes"
        passed = [one for one in units if int(one) < int(victim) and one not in victims]
        assert not any(enough([*victims[:place], one]) for one in passed), "no earlier candidate would have sufficed"
    assert len(asked) <= (int(victims[-1]) + 1 if victims else 0), "candidates after the last victim are not examined"


TiersMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestTiers = TiersMachine.TestCase


def test_rows_are_freed_and_the_error_is_reported_when_filling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "AT_ONCE_BYTES", 0)
    fixture = Fixture()
    fixture.cache.register("a", "4")

    def fail(adapter: HostAdapter) -> None:
        raise OSError("the file is gone")

    with monkeypatch.context() as patch:
        patch.setattr(fixture.pool, "fill", fail)
        assert fixture.settle(key("a")) == "failed"
    assert fixture.cache.error(key("a")) == "the file is gone"
    assert fixture.pool.free == fixture.pool.capacity
    assert fixture.cache.find("a") is None
    assert fixture.settle(key("a")) == "ready"
    fixture.cache.close()
