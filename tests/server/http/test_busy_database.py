"""A database that another process holds: who changes something hears 503 in time, and nobody else waits."""

import asyncio
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from adapters.storage.database import Database
from server.finetune.database import open_database
from tests.support.harness import Site, write_adapter
from tests.support.loop_guard import AskedOnTheLoop, check
from tests.support.publishing import held


async def test_busy_is_a_503_in_time_and_nobody_else_waits(tmp_path: Path) -> None:
    site = Site(tmp_path, database_seconds=1.5)
    await site.publisher.import_directory("", "a", write_adapter(tmp_path / "a"))
    async with site.client() as client:
        with held(tmp_path / "finetuning.db"), held(tmp_path / "store.db"):
            started = time.monotonic()
            upload = {"file": ("train.jsonl", b'{"text": "some text to train on"}\n')}
            changes = [
                asyncio.create_task(client.post("/v1/files", data={"purpose": "fine-tune"}, files=upload)),
                *(asyncio.create_task(client.delete("/v1/adapters/a")) for _ in range(3)),
            ]
            await asyncio.sleep(0.05)
            waits = []
            for path in ("/health", "/v1/adapters/a", "/v1/files", "/v1/fine_tuning/jobs", "/metrics"):
                before = time.monotonic()
                assert (await client.get(path)).status_code == 200
                waits.append(time.monotonic() - before)
            assert not any(change.done() for change in changes), "these were asked meanwhile"
            for response in await asyncio.gather(*changes):
                assert response.status_code == 503
                assert response.json()["error"]["code"] == "database_busy"
                assert int(response.headers["Retry-After"]) > 0
            assert time.monotonic() - started < 30
        assert (await client.delete("/v1/adapters/a")).status_code == 200
        assert (await client.post("/v1/files", data={"purpose": "fine-tune"}, files=upload)).status_code == 200
    site.close()


async def test_the_guard_finds_a_database_call_on_the_loop(tmp_path: Path) -> None:
    database = await asyncio.to_thread(open_database, tmp_path / "db")
    found: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    def called_by_the_loop() -> None:
        try:
            check()
        except AskedOnTheLoop as fault:
            found.set_result(fault)

    asyncio.get_running_loop().call_soon(called_by_the_loop)
    assert "asyncio.to_thread" in str(await asyncio.wait_for(found, 5))
    await asyncio.to_thread(check)
    assert Database.reading.__name__ == "call", "and it is on guard in every test"
    database.close()


def test_outside_an_event_loop_anybody_may_ask(tmp_path: Path) -> None:
    with closing(open_database(tmp_path / "db")) as database, database.reading() as connection:
        assert connection.execute("SELECT COUNT(*) FROM files").fetchone()[0] == 0
    with pytest.raises(sqlite3.ProgrammingError), database.reading():
        pass
