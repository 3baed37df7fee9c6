"""Usage and the audit log of several servers on one object store."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from adapters.storage.bucket import Bucket
from adapters.storage.pages import Pages
from adapters.storage.versions import RemoteUnavailable
from server.tenants import sending
from server.tenants.audit import AuditLog
from server.tenants.caller import Caller
from server.tenants.database import open_database, server_id
from server.usage import Ledger, today
from tests.support.buckets import S3Server
from tests.support.running import REPOSITORY
from tests.support.scripted import BASE, Served, serving

WRITER = """
import asyncio, sys
from pathlib import Path
from server.tenants import sending
from tests.server.tenants.test_shared_usage import ledger

async def client(ledger, number):
    while True:
        await ledger.add("acme", f"a{number}", 3, 1, 2, 0.5)
        print(number, flush=True)

async def main():
    counted = ledger(Path(sys.argv[1]), sys.argv[2])
    clients = (client(counted, number) for number in range(4))
    await asyncio.gather(sending.send_periodically(0.01, counted.send), *clients)

asyncio.run(main())
"""


def ledger(root: Path, url: str) -> Ledger:
    root.mkdir(exist_ok=True)
    database = open_database(root / "tenants.db")
    return Ledger(database, Pages(Bucket(url), "usage", partial(server_id, database)))


def audit(root: Path, url: str, max_bytes: int = 1 << 20) -> AuditLog:
    root.mkdir(exist_ok=True)
    database = open_database(root / "tenants.db")
    return AuditLog(root / "audit.jsonl", max_bytes, Pages(Bucket(url), "audit", partial(server_id, database)))


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/bucket"


def train(ledger: Ledger, adapter: str, job: str, tokens: int) -> None:
    ledger.add_training("acme", adapter, job, tokens, 0.5)


def seen(ledger: Ledger, tenant: str | None = None) -> dict[str, tuple[int, float]]:
    rows = ledger.rows(tenant, today(), today())
    return {f"{row['tenant']}/{row['adapter']}": (row["trained_tokens"], row["device_seconds"]) for row in rows}


def test_every_server_answers_for_all(tmp_path: Path, url: str) -> None:
    one, two = ledger(tmp_path / "one", url), ledger(tmp_path / "two", url)
    train(one, "law", "ftjob-1", 10)
    train(two, "law", "ftjob-2", 5)
    train(two, "poet", "ftjob-3", 7)
    two.add_training("rival", "law", "ftjob-4", 9, 0.0)
    assert seen(one) == {"acme/law": (10, 0.5)}
    for _ in range(2):  # sending again changes nothing
        one.send()
        two.send()
        everything = {"acme/law": (15, 1.0), "acme/poet": (7, 0.5), "rival/law": (9, 0.0)}
        assert seen(one) == seen(two) == everything
    assert seen(one, "rival") == {"rival/law": (9, 0.0)}
    assert one.trained_today("acme") == 22
    train(two, "poet", "ftjob-3", 8)
    two.send()
    assert seen(one)["acme/poet"] == (8, 1.0)


def test_what_was_counted_before_there_was_a_store_and_before_a_death_is_seen(tmp_path: Path, url: str) -> None:
    alone = Ledger(open_database(tmp_path / "tenants.db"))
    train(alone, "law", "ftjob-1", 10)
    with alone._database.transaction() as connection:
        connection.execute("INSERT INTO usage SELECT tenant, adapter, '2020-01-01', 1, 0, 0, 0, 3, 0.0 FROM usage")
    first = ledger(tmp_path, url)
    first.send()
    train(first, "law", "ftjob-1", 30)  # the server dies before sending this
    ledger(tmp_path, url).send()
    rows = ledger(tmp_path / "two", url).rows(None, "0", "9")
    assert [(row["day"], row["trained_tokens"]) for row in rows] == [("2020-01-01", 3), (today(), 30)]


def _killed(root: Path, kills: int) -> None:
    """Kill two servers on one store at random moments and restart them: acknowledged requests are counted once."""
    url, generator, acknowledged = f"file://{root}/bucket", random.Random(5), 0
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for n in range(kills):
        command = [sys.executable, "-c", WRITER, str(root / f"server-{n % 2}"), url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY, env=environment) as writer:
            assert writer.stdout is not None
            acknowledged += len(writer.stdout.readline()) > 0
            time.sleep(generator.uniform(0.0, 0.3))
            writer.send_signal(signal.SIGKILL)
            acknowledged += writer.stdout.read().count(b"\n")
    for n in range(2):
        ledger(root / f"server-{n}", url).send()
    found = [ledger(root / name, url).rows("acme", "0", "9") for name in ("server-0", "server-1", "another")]
    assert found[0] == found[1] == found[2]
    counted = sum(row["requests"] for row in found[0])
    assert kills <= acknowledged <= counted <= acknowledged + 4 * kills
    for row in found[0]:
        sums = row["prompt_tokens"], row["generated_tokens"], row["device_seconds"]
        assert sums == (3 * row["requests"], 2 * row["requests"], 0.5 * row["requests"])


def test_killed_servers_are_seen_whole(tmp_path: Path) -> None:
    _killed(tmp_path, 2)


@pytest.mark.slow
def test_fifty_killed_servers_are_seen_whole(tmp_path: Path) -> None:
    _killed(tmp_path, 50)


async def record(log: AuditLog, named: str, tenant: str = "acme") -> None:
    await log.record(Caller(tenant, "lk-01234567"), "pin", named, None, None)


async def objects(log: AuditLog, **page: Any) -> list[str | None]:
    options = {"tenant": None, "limit": 1000, "after": None} | page
    entries, _ = await asyncio.to_thread(partial(log.page, **options))
    return [entry.object for entry in entries]


async def test_changes_at_all_servers_newest_first(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1e9]
    monkeypatch.setattr("server.tenants.audit.time.time", lambda: clock[0])
    one, two = [await asyncio.to_thread(audit, tmp_path / name, url) for name in ("one", "two")]
    for n in range(12):  # over several hours
        clock[0] += 1000
        await record((one, two)[n % 2], str(n), ("acme", "rival")[n == 5])
        if n % 5 == 4:
            await asyncio.to_thread((one, two)[n % 2].send)
    await asyncio.to_thread(one.send)
    await asyncio.to_thread(two.send)
    newest_first = [str(n) for n in reversed(range(12))]
    assert await objects(one) == await objects(two) == newest_first
    assert await objects(one, tenant="rival") == ["5"]
    entries, more = await asyncio.to_thread(two.page, "acme", 4, None)
    assert ([entry.object for entry in entries], more) == (["11", "10", "9", "8"], True)
    assert await objects(one, tenant="acme", after=entries[-1].id) == ["7", "6", "4", "3", "2", "1", "0"]
    third = await asyncio.to_thread(audit, tmp_path / "three", url)
    assert await objects(third) == newest_first


async def test_what_a_server_wrote_before_its_death_is_sent_by_the_next_start(tmp_path: Path, url: str) -> None:
    one = await asyncio.to_thread(audit, tmp_path / "one", url)
    await record(one, "sent")
    await asyncio.to_thread(one.send)
    await record(one, "unsent")
    again = await asyncio.to_thread(audit, tmp_path / "one", url)
    await record(again, "new")
    await asyncio.to_thread(again.send)
    other = await asyncio.to_thread(audit, tmp_path / "two", url)
    assert sorted(map(str, await objects(other))) == ["new", "sent", "unsent"]


async def test_entries_rotated_out_locally_stay_in_the_store(tmp_path: Path, url: str) -> None:
    one = await asyncio.to_thread(audit, tmp_path / "one", url, 1024)
    for n in range(60):
        await record(one, str(n))
        await asyncio.to_thread(one.send)
    assert len(list(one._entries_on_disk())) < 40
    assert sorted(map(int, map(str, await objects(one)))) == list(range(60))


def test_lost_answers_and_a_busy_store(tmp_path: Path, s3: S3Server, s3_url: str) -> None:
    s3.suffer(("lost", "PUT", "usage/", 2), ("busy", "PUT", "usage/", 3), ("busy", "GET", "usage/", 4))
    one, two = ledger(tmp_path / "one", s3_url), ledger(tmp_path / "two", s3_url)
    for n in range(1, 7):
        train(one, "law", "ftjob-1", n)
        one.send()
        assert seen(two)["acme/law"] == (n, n / 2)


async def ask(served: Served, model: str = BASE) -> None:
    response = await served.client.post("/v1/completions", json={"model": model, "prompt": "Hi", "max_tokens": 3})
    assert response.status_code == 200, response.text


async def test_clients_see_usage_and_changes_of_all_servers(tmp_path: Path, url: str) -> None:
    async with (
        serving(tmp_path / "one", adapter_store=url) as one,
        serving(tmp_path / "two", adapter_store=url) as two,
    ):
        await ask(one)
        await ask(two)
        for served in (one, two):
            made = await served.client.post("/v1/admin/tenants", json={"id": f"t{served is two:d}"})
            assert made.status_code == 201
            await asyncio.to_thread(served.services.ledger.send)
            await asyncio.to_thread(served.services.audit.send)
        for served in (one, two):
            [row] = (await served.client.get("/v1/usage")).json()["data"]
            assert (row["requests"], row["generated_tokens"]) == (2, 6)
            changes = (await served.client.get("/v1/admin/audit")).json()["data"]
            assert [change["object"] for change in changes] == ["t1", "t0"]
        (tmp_path / "bucket").rename(tmp_path / "gone")
        (tmp_path / "bucket").write_text("no directory")
        for path in ("/v1/usage", "/v1/admin/audit"):
            refused = await one.client.get(path)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "adapter_store_unavailable")


async def test_sending_goes_on_after_an_outage_and_ends_with_a_last_one(tmp_path: Path, url: str) -> None:
    one, two = [await asyncio.to_thread(ledger, tmp_path / name, url) for name in ("one", "two")]
    down, sent = [True], asyncio.Event()
    loop = asyncio.get_running_loop()

    def send() -> None:
        if down[0]:
            loop.call_soon_threadsafe(sent.set)
            raise RemoteUnavailable("it is down")
        one.send()
        loop.call_soon_threadsafe(sent.set)

    await asyncio.to_thread(train, one, "law", "ftjob-1", 1)
    task = asyncio.create_task(sending.send_periodically(0.01, send))
    for down[0] in (True, False):
        sent.clear()
        await asyncio.wait_for(sent.wait(), 60)
    task.cancel()
    await asyncio.wait({task})
    sent.clear()
    task = asyncio.create_task(sending.send_periodically(1000, send))
    await asyncio.wait_for(sent.wait(), 60)
    await asyncio.to_thread(train, one, "law", "ftjob-1", 2)
    task.cancel()
    await asyncio.wait({task})
    assert (await asyncio.to_thread(seen, two))["acme/law"] == (2, 1.0)
