"""Leases on records: one holder at a time; a silent holder is replaced and cannot write afterwards."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from adapters.storage import leases as module
from adapters.storage.bucket import Bucket
from adapters.storage.leases import LEASE, LeaseLost, Leases
from adapters.storage.records import Content, Records
from adapters.storage.versions import RemoteUnavailable
from tests.support.buckets import S3Server
from tests.support.threads import together


class Server:
    """A server's view of the records."""

    def __init__(self, store_url: str, seconds: float = 60.0) -> None:
        self.records = Records(Bucket(store_url), "jobs")
        self.leases = Leases(self.records, seconds)

    def follow(self) -> None:
        for record in self.records.fetch_changes():
            if self.records.remember(record) and record.content is not None:
                self.leases.observe(record.key, record.content)

    def write(self, value: int, *, release: bool = False) -> Content:
        return self.leases.change("a", setting(value), release=release)


def setting(value: int) -> Callable[[Content | None], Content]:
    return lambda content: (content or {}) | {"value": value}


def test_one_holder_at_a_time_and_another_once_it_gives_back(store_url: str) -> None:
    one, two = Server(store_url), Server(store_url)
    one.records.change("a", setting(0))
    one.follow()
    two.follow()
    assert one.leases.is_free("a")
    assert one.leases.claim("a")["value"] == 0
    with pytest.raises(LeaseLost):
        two.leases.claim("a")
    two.follow()
    assert not two.leases.is_free("a")
    assert one.write(1)["value"] == 1
    with pytest.raises(LeaseLost):
        two.write(2)
    one.write(3, release=True)
    assert one.leases.held_keys() == []
    two.follow()
    assert two.leases.is_free("a")
    assert two.leases.claim("a")["value"] == 3
    with pytest.raises(LeaseLost):
        one.write(4)


def test_one_of_several_concurrent_claims_succeeds(store_url: str) -> None:
    servers = [Server(store_url) for _ in range(6)]
    servers[0].records.change("a", setting(0))
    for server in servers:
        server.follow()
    results = together(*(partial(server.leases.claim, "a") for server in servers))
    assert sum(isinstance(result, dict) for result in results) == 1
    assert sum(isinstance(result, LeaseLost) for result in results) == 5
    assert sum(server.leases.holds("a") for server in servers) == 1


class Clock:
    """The time seen by the leases."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_silent_holder_loses_its_lease_and_cannot_write(store_url: str, clock: Clock) -> None:
    """Wall clocks do not matter, nor do changes of the record by others."""
    one, two = Server(store_url, seconds=10), Server(store_url)
    one.records.change("a", setting(0))
    one.follow()
    one.leases.claim("a")
    two.follow()
    for value in range(4):
        clock.now += 9
        one.write(value)
        two.follow()
        assert not two.leases.is_free("a")
    clock.now += 6
    two.records.change("a", setting(9))  # by a server without the lease
    two.follow()
    assert not two.leases.is_free("a")
    clock.now += 6
    two.follow()
    assert two.leases.is_free("a")
    assert one.leases.seconds_left("a") < 0
    assert two.leases.claim("a")["value"] == 9
    assert one.leases.holds("a")  # in its own view
    with pytest.raises(LeaseLost):
        one.write(10)
    assert not one.leases.holds("a")
    assert two.write(11)["value"] == 11


def test_a_renewal_counts_from_when_it_began(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Server(f"file://{tmp_path}", seconds=10)
    one.records.change("a", setting(0))
    one.follow()
    one.leases.claim("a")
    change = Records.change

    def slowly(*args: Any) -> Any:
        clock.now += 6
        return change(*args)

    monkeypatch.setattr(Records, "change", slowly)
    one.write(1)
    assert one.leases.seconds_left("a") == 4


def test_a_change_that_is_refused_is_no_renewal(tmp_path: Path) -> None:
    one = Server(f"file://{tmp_path}")
    one.records.change("a", setting(0))
    one.follow()
    before = one.leases.claim("a")[LEASE]

    def refuse(content: Content) -> Content:
        raise KeyError("no")

    with pytest.raises(KeyError):
        one.leases.change("a", refuse)
    found = one.records.fetch("a").content
    assert found is not None
    assert found[LEASE] == before


def test_leases_while_the_store_fails(store_url: str, s3: S3Server) -> None:
    if store_url.startswith("file"):
        pytest.skip("the faults are a network's")
    one, two = Server(store_url), Server(store_url)
    one.records.change("a", setting(0))
    for each in (one, two):
        each.follow()
    s3.suffer(("lost", "PUT", "jobs/", 2), ("busy", "PUT", "jobs/", 3), ("busy", "GET", "jobs/", 4))
    results = together(partial(one.leases.claim, "a"), partial(two.leases.claim, "a"))
    assert sum(isinstance(result, LeaseLost) for result in results) == 1
    holder, other = (one, two) if one.leases.holds("a") else (two, one)
    for value in range(8):
        assert holder.write(value)["value"] == value
    with pytest.raises((LeaseLost, RemoteUnavailable)):
        other.leases.claim("a")
    s3.suffer()
    found = holder.records.fetch("a").content
    assert found is not None
    assert (found["value"], found[LEASE]["count"]) == (7, 8)
