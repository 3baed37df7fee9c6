"""Tenants and keys shared by several servers through an object store."""

import asyncio
from functools import partial
from pathlib import Path

import pytest

from adapters.storage.bucket import Bucket
from adapters.storage.records import Records
from adapters.storage.versions import RemoteUnavailable
from server.errors import Conflict, InvalidRequest, NotFound
from server.tenants.database import open_database
from server.tenants.keys import Tenants
from server.tenants.limits import Limits
from tests.support.threads import together


class Servers:
    """Opens servers, each with its own database."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = f"file://{root}/bucket"

    def open(self, name: str, *, shared: bool = True, seconds: float = 0.2, static: tuple[str, ...] = ()) -> Tenants:
        records = Records(Bucket(self.url), "tenants") if shared else None
        tenants = Tenants(open_database(self.root / f"{name}.db"), static, records, seconds)
        asyncio.run(tenants.start())
        return tenants


@pytest.fixture
def servers(tmp_path: Path) -> Servers:
    return Servers(tmp_path)


def opens(tenants: Tenants, secret: str) -> bool:
    return tenants.find(secret.encode()) is not None


def test_a_key_made_at_one_opens_the_other_and_is_revoked_there_too(servers: Servers) -> None:
    one, two = servers.open("one"), servers.open("two")
    _, operator = one.create_key("", ["admin"])
    assert not opens(two, operator)
    two.poll()
    assert opens(two, operator)
    two.create_tenant("acme", Limits(running=3))
    key, secret = two.create_key("acme", ["serve"], adapters=["x"])
    one.poll()
    caller = one.find(secret.encode())
    assert caller is not None
    assert (caller.tenant, caller.adapters, caller.allowance.limits) == ("acme", frozenset("x"), Limits(running=3))
    one.revoke(key)
    assert opens(two, secret)
    two.poll()
    assert not opens(two, secret)
    one.set_limits("acme", Limits(running=5))
    two.poll()
    assert two.tenant("acme").limits == Limits(running=5)
    two.delete_tenant("acme")
    one.poll()
    assert "acme" not in one.tenants
    assert key.id not in one.keys


async def test_a_revoked_key_stops_working_at_others_with_the_next_poll(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = Servers(tmp_path)
    one, two = await asyncio.to_thread(servers.open, "one"), await asyncio.to_thread(servers.open, "two")
    await asyncio.to_thread(one.create_key, "", ["admin"])
    key, secret = await asyncio.to_thread(one.create_key, "", ["serve"])
    poll = two.poll
    polls: list[None] = []

    def counted() -> None:
        polls.append(None)
        poll()

    monkeypatch.setattr(two, "poll", counted)
    following = asyncio.create_task(two.follow())
    try:
        async with asyncio.timeout(60):
            while not opens(two, secret):  # noqa: ASYNC110 - a thread's doing
                await asyncio.sleep(0.01)
        await asyncio.to_thread(one.revoke, key)
        before = len(polls)
        async with asyncio.timeout(60):
            while opens(two, secret):  # noqa: ASYNC110 - a thread's doing
                await asyncio.sleep(0.01)
        assert len(polls) - before <= 2  # a poll may have been under way
    finally:
        following.cancel()


def test_keys_that_several_make_at_once_are_all_there(servers: Servers) -> None:
    tenants = [servers.open(f"s{i}") for i in range(4)]
    tenants[0].create_key("", ["admin"])
    for one in tenants:
        one.poll()

    def work(i: int) -> list[str]:
        made = [tenants[i].create_key("", ["serve"]) for _ in range(8)]
        tenants[i].revoke(made[0][0])
        tenants[i]._flush()
        return [secret for _, secret in made]

    results = together(*(partial(work, i) for i in range(4)))
    for one in (*tenants, servers.open("new")):
        one.poll()
        assert len(one.keys) == 33
        for secrets in results:
            assert [opens(one, secret) for secret in secrets] == [False] + [True] * 7


def test_two_servers_cannot_revoke_the_last_two_operators_keys_at_once(servers: Servers) -> None:
    one, two = servers.open("one"), servers.open("two")
    first, _ = one.create_key("", ["admin"])
    second, _ = one.create_key("", ["admin"])
    two.poll()
    results = together(lambda: one.revoke(first), lambda: two.revoke(second))
    assert sum(isinstance(result, Conflict) for result in results) == 1


def test_rules_hold_for_what_others_have_made(servers: Servers) -> None:
    one, two = servers.open("one"), servers.open("two")
    one.create_key("", ["admin"])
    one.create_tenant("acme")
    with pytest.raises(Conflict, match="already"):
        two.create_tenant("acme")
    with pytest.raises(InvalidRequest, match="first key"):
        two.create_key("acme", ["serve"])
    two.poll()
    key, _ = two.create_key("acme", ["serve"])
    one.delete_tenant("acme")
    for change in (
        lambda: two.create_key("acme", ["serve"]),
        lambda: two.set_limits("acme", Limits()),
        lambda: two.revoke(key),
        lambda: two.delete_tenant("acme"),
    ):
        with pytest.raises(NotFound):
            change()


def test_last_uses_reach_all_servers_and_undo_no_revocation(servers: Servers) -> None:
    one, two = servers.open("one"), servers.open("two")
    one.create_key("", ["admin"])
    key, secret = one.create_key("", ["serve"])
    two.poll()
    assert opens(two, secret)
    one.revoke(key)
    two._flush()
    one.poll()
    assert one.keys[key.id].last_used_at is not None
    assert one.keys[key.id].revoked_at is not None
    assert not opens(two, secret)


def test_keys_from_before_there_was_a_store_are_in_it(servers: Servers) -> None:
    alone = servers.open("one", shared=False)
    _, operator = alone.create_key("", ["admin"])
    alone.create_tenant("acme")
    _, secret = alone.create_key("acme", ["serve"])
    servers.open("one")
    assert [opens(servers.open("new"), one) for one in (operator, secret)] == [True, True]


def test_a_server_without_its_store_has_a_copy(servers: Servers) -> None:
    """Without its store the server still requires keys, for example when a flag was left out by mistake."""
    one, two = servers.open("one"), servers.open("two")
    _, operator = one.create_key("", ["admin"])
    one.create_tenant("acme")
    key, secret = one.create_key("acme", ["serve"])
    two.poll()
    alone = servers.open("two", shared=False)
    assert [opens(alone, found) for found in (operator, secret)] == [True, True]
    one.revoke(key)
    one.delete_tenant("acme")
    servers.open("two")  # copies the changes made in the meantime
    alone = servers.open("two", shared=False)
    assert [opens(alone, found) for found in (operator, secret)] == [True, False]
    assert "acme" not in alone.tenants


def test_while_the_store_is_down_known_keys_open(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    one = servers.open("one")
    _, operator = one.create_key("", ["admin"])

    def fail(*_: object) -> None:
        raise RemoteUnavailable("down")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "list", fail)
        patch.setattr(Bucket, "read", fail)
        with pytest.raises(RemoteUnavailable):
            one.poll()
        with pytest.raises(RemoteUnavailable):
            one.create_key("", ["serve"])
        assert opens(one, operator)
        one._flush()
        with pytest.raises(RemoteUnavailable):  # a server without keys would be open to everybody
            servers.open("new")
    one.poll()
    assert len(one.keys) == 1


@pytest.mark.parametrize("content", [b"{", b'{"tenant": 1}', None])
def test_a_damaged_or_missing_record_in_the_store_opens_no_server(servers: Servers, content: bytes | None) -> None:
    one, two = servers.open("one"), servers.open("two")
    _, operator = one.create_key("", ["admin"])
    two.poll()
    bucket = Bucket(servers.url)
    found = bucket.read("tenants/default.json")
    assert found is not None
    if content is None:
        bucket.delete(["tenants/default.json"])
    else:
        bucket.put_if("tenants/default.json", content, found.version)
    two.poll()
    assert two.requires_key
    assert opens(two, operator)
    _, other = two.create_key("", ["serve"])  # this change repairs the record
    assert [opens(servers.open("new"), secret) for secret in (operator, other)] == [True, True]


def test_no_secret_is_in_the_store(servers: Servers) -> None:
    one = servers.open("one")
    key, secret = one.create_key("", ["admin"])
    tail = secret.removeprefix(key.id).encode()
    assert not [path for path in servers.root.rglob("*") if path.is_file() and tail in path.read_bytes()]
