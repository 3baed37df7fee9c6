"""Tiers: who is resident, who is evicted, and what a load that fails or lags does."""

import threading
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from adapters.device import host
from adapters.device.cache import Key, Residency
from adapters.device.host import HostAdapter, host_adapter
from adapters.device.pool import RowPool
from adapters.device.rows import rounded
from tests.adapters.device.test_pool import LINEARS

UNITS = 16


def load(digest: str, path: str) -> HostAdapter:
    """`path` is the rank; "bad" does not load."""
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
        self.residency = Residency(self.pool, load, host_bytes)

    def settle(self, wanted: Key) -> str:
        """Ask until the answer is no longer "loading"."""
        answer = self.residency.acquire(wanted)
        for _ in range(10):
            if answer != "loading":
                break
            while self.residency.loading:
                threading.Event().wait(0.001)
                self.residency.poll()
            answer = self.residency.acquire(wanted)
        return answer


@pytest.fixture(params=["filled at once", "filled beside steps"])
def tiers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fixture]:
    if request.param == "filled beside steps":
        monkeypatch.setattr(host, "AT_ONCE_BYTES", 0)
    fixture = Fixture()
    for name, rank in (("a", 4), ("b", 4), ("c", 4), ("big", 8)):
        fixture.residency.register(name, str(rank))
    yield fixture
    fixture.residency.close()


def test_a_load_is_off_the_path_then_ready(tiers: Fixture) -> None:
    assert tiers.residency.acquire(key("a")) == "loading"
    assert tiers.settle(key("a")) == "ready"
    assert "a" in tiers.pool
    assert [digest for digest, _ in tiers.residency.loads] == ["a"]


def test_a_prefetched_adapter_is_ready_when_asked_for(tiers: Fixture) -> None:
    tiers.residency.prefetch("a")
    while tiers.residency.loading:
        tiers.residency.poll()
    assert tiers.settle(key("a")) == "ready"
    tiers.residency.prefetch("a")
    assert not tiers.residency.loading


def test_the_least_recently_used_leaves_first(tiers: Fixture) -> None:
    for name in ("a", "b", "a"):
        assert tiers.settle(key(name)) == "ready"
        tiers.residency.release(key(name))
    assert tiers.settle(key("c")) == "ready"
    assert tiers.residency.evictions == ["b"]


def test_what_is_in_use_stays(tiers: Fixture) -> None:
    assert tiers.settle(key("a")) == "ready"
    assert tiers.settle(key("big")) == "full"
    assert tiers.residency.evictions == [], "nothing is evicted for someone who would not fit anyway"
    tiers.residency.release(key("a"))
    assert tiers.settle(key("big")) == "ready"


def test_several_adapters_come_together_or_not_at_all(tiers: Fixture) -> None:
    assert tiers.settle(key("a", "b")) == "ready"
    assert tiers.settle(key("a", "c")) == "full"
    tiers.residency.release(key("a", "b"))
    assert tiers.settle(key("a", "c")) == "ready"
    assert tiers.residency.evictions == ["b"]


def test_a_failed_load_is_told_once_and_tried_again(tiers: Fixture) -> None:
    tiers.residency.register("x", "bad")
    assert tiers.settle(key("x")) == "failed"
    assert "gone" in tiers.residency.error(key("x"))
    tiers.residency.register("x", "2")
    assert tiers.settle(key("x")) == "ready"


def test_a_forgotten_adapter_leaves_when_its_last_user_does(tiers: Fixture) -> None:
    assert tiers.settle(key("a")) == "ready"
    tiers.residency.forget("a")
    assert "a" in tiers.pool
    tiers.residency.release(key("a"))
    assert "a" not in tiers.pool
    assert tiers.residency.resident() == []


def test_the_host_tier_is_bounded_in_bytes() -> None:
    fixture = Fixture(host_bytes=2 * load("x", "4").bytes)
    for name in "abc":
        fixture.residency.register(name, "4")
        assert fixture.settle(key(name)) == "ready"
        fixture.residency.release(key(name))
    assert [entry.digest for entry in fixture.residency.resident() if entry.tier == "device"] == ["b", "c"]
    assert list(fixture.residency._host) == ["b", "c"]
    fixture.residency.close()


def test_rows_are_not_moved_while_others_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "AT_ONCE_BYTES", 0)
    fixture = Fixture()
    tiers, pool = fixture.residency, fixture.pool
    ranks = {"a": 2, "b": 2, "c": 2, "d": 1, "e": 3}  # of 8 that fit
    for name, rank in ranks.items():
        tiers.register(name, str(rank))
    for name in "abc":
        assert fixture.settle(key(name)) == "ready"
    for name in "ac":
        tiers.release(key(name))
    # `e` needs 6 units; with `a` and `c` gone they are there, but not in one piece: `b` stands between.
    gate, fill = threading.Event(), RowPool.fill

    def slowly(self: RowPool, adapter: HostAdapter) -> None:
        assert gate.wait(10)
        fill(self, adapter)

    monkeypatch.setattr(RowPool, "fill", slowly)
    assert tiers.acquire(key("d")) == "loading"
    while "d" not in pool:
        tiers.poll()
        assert tiers.acquire(key("d")) == "loading"
    tiers.forget("a")
    tiers._host["e"] = load("e", "3")
    before = windows_of(pool, "b")
    assert tiers.acquire(key("e")) == "full"
    assert windows_of(pool, "b") == before
    gate.set()
    come_to_rest(fixture)
    assert fixture.settle(key("e")) == "ready"
    assert pool.free["q_proj"] + pool.resident["q_proj"] == UNITS
    tiers.close()


def test_what_was_just_filled_stays_until_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "AT_ONCE_BYTES", 0)
    fixture = Fixture()
    for name in "ab":
        fixture.residency.register(name, "8")
    fixture.residency.acquire(key("a"))
    come_to_rest(fixture)
    assert fixture.residency.acquire(key("a")) == "loading"
    come_to_rest(fixture)
    fixture.residency._host["b"] = load("b", "8")
    assert fixture.residency.acquire(key("b")) == "full"
    assert fixture.residency.acquire(key("a")) == "ready"
    fixture.residency.release(key("a"))
    assert fixture.settle(key("b")) == "ready"
    fixture.residency.close()


def put_on_device(tiers: Fixture, *names: str) -> None:
    for name in names:
        assert tiers.settle(key(name)) == "ready"
        tiers.residency.release(key(name))


def on_device(tiers: Fixture) -> set[str]:
    return {entry.digest for entry in tiers.residency.resident() if entry.tier == "device"}


def come_to_rest(tiers: Fixture) -> None:
    tiers.residency.poll()
    while tiers.residency.loading:
        tiers.residency.poll()


def test_a_pinned_adapter_comes_by_itself_and_stays(tiers: Fixture) -> None:
    tiers.residency.pin({"a": "4"})
    come_to_rest(tiers)
    assert on_device(tiers) == {"a"}
    put_on_device(tiers, "b", "c", "b", "c")
    assert on_device(tiers) == {"a", "c"}
    assert "a" not in tiers.residency.evictions
    tiers.residency.pin({})
    put_on_device(tiers, "b", "big")
    assert on_device(tiers) == {"big"}


def test_a_pin_gives_way_only_to_what_could_not_run_beside_it_and_comes_back(tiers: Fixture) -> None:
    tiers.residency.pin({"a": "4"})
    come_to_rest(tiers)
    assert tiers.settle(key("b")) == "ready"
    assert tiers.settle(key("c")) == "full", "it fits beside the pin, so it waits for those in use"
    tiers.residency.release(key("b"))
    assert tiers.settle(key("big")) == "ready", "it never fits beside the pin"
    come_to_rest(tiers)
    assert on_device(tiers) == {"big"}
    tiers.residency.release(key("big"))
    come_to_rest(tiers)
    assert on_device(tiers) == {"a"}


def test_pins_that_do_not_fit_together_do_not_push_each_other_out(tiers: Fixture) -> None:
    tiers.residency.pin({"a": "4", "b": "4", "c": "4"})
    for _ in range(3):
        come_to_rest(tiers)
    assert len(on_device(tiers)) == 2
    assert tiers.residency.evictions == []


def test_a_pinned_adapter_that_cannot_be_read_is_not_read_for_ever(tiers: Fixture) -> None:
    tiers.residency.pin({"x": "bad"})
    come_to_rest(tiers)
    tiers.residency.poll()
    assert not tiers.residency.loading
    assert tiers.settle(key("x")) == "failed"
    assert "gone" in tiers.residency.error(key("x"))


class TiersMachine(RuleBasedStateMachine):
    """Any order of acquire, release and forget: references hold, and the rows add up."""

    ranks: ClassVar = {"a": 1, "b": 3, "c": 4, "d": 8}

    def __init__(self) -> None:
        super().__init__()
        self.fixture = Fixture(host_bytes=500)
        for name, rank in self.ranks.items():
            self.fixture.residency.register(name, str(rank))
        self.held: list[Key] = []

    @rule(names=st.lists(st.sampled_from("abcd"), min_size=1, max_size=2, unique=True))
    def acquire(self, names: list[str]) -> None:
        wanted = key(*names)
        answer = self.fixture.settle(wanted)
        in_use = {name for held in self.held for name, _ in held} | set(names)
        fits = sum(rounded(2 * self.ranks[name]) for name in in_use) <= UNITS
        assert answer == ("ready" if fits else "full")
        if answer == "ready":
            self.held.append(wanted)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.held:
            self.fixture.residency.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(name=st.sampled_from("abcd"))
    def forget(self, name: str) -> None:
        self.fixture.residency.forget(name)

    @rule(names=st.sets(st.sampled_from("abcd")))
    def pin(self, names: set[str]) -> None:
        self.fixture.residency.pin({name: str(self.ranks[name]) for name in sorted(names)})

    @invariant()
    def adds_up(self) -> None:
        pool = self.fixture.pool
        come_to_rest(self.fixture)
        for held in self.held:
            assert all(name in pool for name, _ in held)
        on_device = [entry.digest for entry in self.fixture.residency.resident() if entry.tier == "device"]
        assert pool.resident["q_proj"] == sum(rounded(2 * self.ranks[name]) for name in on_device)
        assert pool.free["q_proj"] + pool.resident["q_proj"] == UNITS

    def teardown(self) -> None:
        self.fixture.residency.close()


TiersMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestTiers = TiersMachine.TestCase


def test_rows_that_cannot_be_filled_are_given_back_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "AT_ONCE_BYTES", 0)
    fixture = Fixture()
    fixture.residency.register("a", "4")

    def fail(adapter: HostAdapter) -> None:
        raise OSError("the file is gone")

    with monkeypatch.context() as patch:
        patch.setattr(fixture.pool, "fill", fail)
        assert fixture.settle(key("a")) == "failed"
    assert fixture.residency.error(key("a")) == "the file is gone"
    assert fixture.pool.free == fixture.pool.capacity
    assert fixture.residency.resident() == []
    assert fixture.settle(key("a")) == "ready"
    fixture.residency.close()
