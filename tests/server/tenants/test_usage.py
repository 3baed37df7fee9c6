"""`/v1/usage` and its ledger: each request is counted once, also across crashes."""

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from server.messages.protocol import Generate
from server.messages.training import Metrics, TrainingStep
from server.tenants.database import open_database
from server.usage import Ledger, today
from tests.support.running import REPOSITORY
from tests.support.scripted import BASE, Served, serving
from tests.support.tenancy import furnish, key

WRITER = """
import asyncio, sys
from pathlib import Path
from server.tenants.database import open_database
from server.usage import Ledger

async def client(ledger, number):
    while True:
        await ledger.add("acme", f"a{number}", 3, 1, 2)
        print(number, flush=True)

async def main():
    ledger = Ledger(open_database(Path(sys.argv[1])))
    await asyncio.gather(*(client(ledger, number) for number in range(8)))

asyncio.run(main())
"""


async def ask(served: Served, headers: dict[str, str], model: str, **more: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": "Hi", "max_tokens": 3} | more
    response = await served.client.post("/v1/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    usage: dict[str, Any] = {} if more.get("stream") else response.json()["usage"]
    return usage


async def test_rows_equal_the_usage_of_the_responses(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        served.engine.cached_tokens = 1
        served.engine.device_seconds = 0.25
        operator, acme, rival = await key(served), await key(served, "acme"), await key(served, "rival")
        await furnish(served, tmp_path, "acme", "one", acme)
        said = [await ask(served, acme, "one", n=n) for n in (1, 2)]
        await ask(served, acme, "one", stream=True)
        await ask(served, rival, BASE)
        rows = (await served.client.get("/v1/usage?adapter=one", headers=acme)).json()["data"]
        assert rows == [
            {
                "object": "usage",
                "id": f"{today()}/acme/one",
                "tenant": "acme",
                "adapter": "one",
                "day": today(),
                "requests": 3,
                "prompt_tokens": sum(usage["prompt_tokens"] for usage in said) + said[0]["prompt_tokens"],
                "cached_tokens": 3,
                "generated_tokens": sum(usage["completion_tokens"] for usage in said) + said[0]["completion_tokens"],
                "trained_tokens": 0,
                "device_seconds": 4 * 3 * 0.25,  # four sequences of three steps
            }
        ]
        seen = (await served.client.get("/v1/usage", headers=rival)).json()["data"]
        assert [(row["tenant"], row["adapter"]) for row in seen] == [("rival", None)]
        assert (await served.client.get("/v1/usage?tenant=acme", headers=rival)).json()["data"] == []
        everything = (await served.client.get("/v1/usage", headers=operator)).json()["data"]
        assert {row["tenant"] for row in everything} == {"acme", "rival"}
        assert (await served.client.get("/v1/usage?last_day=2020-01-01", headers=operator)).json()["data"] == []
        assert (await served.client.get("/v1/usage?first_day=x", headers=operator)).status_code == 400


async def test_usage_is_on_disk_before_the_response_ends(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        for stream in (False, True):
            await ask(served, {}, BASE, stream=stream)
            with sqlite3.connect(f"file:{tmp_path / 'tenants.db'}?mode=ro", uri=True) as connection:
                [(requests,)] = connection.execute("SELECT requests FROM usage").fetchall()
            connection.close()
            assert requests == 1 + stream


async def test_a_failed_response_is_charged_for_its_generated_tokens(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        served.engine.fail = {0: RuntimeError("the engine")}
        body = {"model": BASE, "prompt": "Hi", "max_tokens": 8}
        assert (await served.client.post("/v1/completions", json=body)).status_code == 500
        assert (await served.client.get("/v1/usage")).json()["data"] == []
        served.engine.fail = {2: RuntimeError("the engine")}
        assert (await served.client.post("/v1/completions", json=body)).status_code == 500
        for _ in range(1000):  # a failed response does not wait for its row
            if rows := (await served.client.get("/v1/usage")).json()["data"]:
                break
            await asyncio.sleep(0.01)
        assert [(row["requests"], row["generated_tokens"]) for row in rows] == [(1, 2)]


async def test_a_locked_database_delays_nobody_and_loses_nothing(tmp_path: Path) -> None:
    database = await asyncio.to_thread(open_database, tmp_path / "tenants.db", 0.1)
    ledger = Ledger(database)
    other = sqlite3.connect(tmp_path / "tenants.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    await asyncio.wait_for(ledger.add("acme", "", 1, 0, 1), 60)  # one caller waits until writing has failed
    assert all(ledger.add("acme", "", 1, 0, 1).done() for _ in range(9))
    assert await asyncio.to_thread(ledger.rows, "acme", today(), today()) == []
    other.execute("ROLLBACK")
    other.close()
    await ledger.stop()
    [row] = await asyncio.to_thread(ledger.rows, "acme", today(), today())
    assert row["requests"] == 10


async def test_many_that_end_at_once_share_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(await asyncio.to_thread(open_database, tmp_path / "tenants.db"))
    commits = 0
    real = Ledger._commit

    def counted(self: Ledger, rows: Any) -> None:
        nonlocal commits
        commits += 1
        real(self, rows)

    monkeypatch.setattr(Ledger, "_commit", counted)
    await asyncio.gather(*(ledger.add("acme", str(i % 3), 1, 0, 1) for i in range(200)))
    assert commits <= 2
    rows = await asyncio.to_thread(ledger.rows, None, today(), today())
    assert sum(row["requests"] for row in rows) == 200


def test_a_step_that_is_repeated_is_trained_once(tmp_path: Path) -> None:
    ledger = Ledger(open_database(tmp_path / "tenants.db"))
    for tokens in (10, 25, 10, 25, 40):
        ledger.add_training("acme", "ft:a", "ftjob-1", tokens, 0.5)
    ledger.add_training("acme", "ft:a", "ftjob-2", 5, 0.25)
    [row] = ledger.rows("acme", today(), today())
    assert (row["trained_tokens"], row["requests"], row["device_seconds"]) == (45, 0, 1.75)


async def test_jobs_are_counted(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        acme = await key(served, "acme")
        owned = await furnish(served, tmp_path, "acme", "one", acme)
        jobs = served.services.tuning.jobs

        def trained() -> str:
            job = jobs.get("acme", owned.job)
            for step in (1, 2, 2):
                metrics = Metrics(step=step, train_loss=1.0)
                jobs.record_step(
                    job,
                    TrainingStep(
                        id=job.id,
                        metrics=metrics,
                        total_steps=2,
                        trained_tokens=100 * step,
                        learning_rate=0.1,
                        grad_norm=1.0,
                        seconds=0.1,
                        busy_seconds=0.1,
                    ),
                )
            return job.model_name

        name = await asyncio.to_thread(trained)
        rows = (await served.client.get(f"/v1/usage?adapter={name}", headers=acme)).json()["data"]
        assert [row["trained_tokens"] for row in rows] == [200]


def _killed(directory: Path, kills: int) -> None:
    """Kill writers at random moments: acknowledged requests are counted exactly once."""
    path, acknowledged = directory / "tenants.db", 0
    generator = random.Random(7)
    for _ in range(kills):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=REPOSITORY, env={**os.environ}
        )
        assert writer.stdout is not None
        acknowledged += len(writer.stdout.readline()) > 0
        time.sleep(generator.uniform(0.0, 0.3))
        writer.send_signal(signal.SIGKILL)
        acknowledged += writer.stdout.read().count(b"\n")
        writer.wait()
        writer.stdout.close()
    rows = Ledger(open_database(path)).rows("acme", "0", "9")
    counted = sum(row["requests"] for row in rows)
    assert acknowledged <= counted <= acknowledged + 8 * kills, "rows not yet acknowledged may be there"
    assert acknowledged >= kills
    for row in rows:
        assert (row["prompt_tokens"], row["generated_tokens"]) == (3 * row["requests"], 2 * row["requests"])


def test_killed_writers_lose_nothing_acknowledged(tmp_path: Path) -> None:
    _killed(tmp_path, 3)


@pytest.mark.slow
def test_fifty_killed_writers_lose_nothing_acknowledged(tmp_path: Path) -> None:
    _killed(tmp_path, 50)


async def test_a_batch_is_on_its_tenants_account(tmp_path: Path) -> None:
    from server.http.inside import respond
    from server.tenants.caller import Caller

    async with serving(tmp_path) as served:
        body = b'{"model": "tiny", "prompt": "Hi", "max_tokens": 2}'
        reply = await respond(served.app, Caller("acme", roles=frozenset({"serve"})), "/v1/completions", body)
        assert reply.status == 200
        asked: Generate = served.engine.requests[-1]
        assert asked.tenant == "acme"
        [row] = (await served.client.get("/v1/usage?tenant=acme")).json()["data"]
        assert row["requests"] == 1
