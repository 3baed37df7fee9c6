"""A database locked by another process: changes get a 503 in time, and other requests do not wait."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable
from contextlib import ExitStack, asynccontextmanager, closing
from pathlib import Path

import httpx
import pytest

from adapters.storage.database import Database
from server.finetune.database import open_database
from tests.support.harness import Site, write_adapter
from tests.support.loop_guard import AskedOnTheLoop, check
from tests.support.publishing import held


@asynccontextmanager
async def busy(root: Path, seconds: float) -> AsyncIterator[tuple[httpx.AsyncClient, ExitStack]]:
    """A site whose databases are locked by another process until the stack is closed."""
    with closing(Site(root, database_seconds=seconds)) as site:
        await site.publisher.import_directory("", "a", write_adapter(root / "a"))
        async with site.client() as client:
            with ExitStack() as holding:
                for name in ("finetuning.db", "store.db"):
                    holding.enter_context(held(root / name))
                yield client, holding


def upload(client: httpx.AsyncClient) -> Awaitable[httpx.Response]:
    files = {"file": ("train.jsonl", b'{"text": "some text to train on"}\n')}
    return client.post("/v1/files", data={"purpose": "fine-tune"}, files=files)


def changes(client: httpx.AsyncClient) -> list[asyncio.Future[httpx.Response]]:
    return [*map(asyncio.ensure_future, (upload(client), *(client.delete("/v1/adapters/a") for _ in range(3))))]


async def test_reads_do_not_wait_for_a_busy_database(tmp_path: Path) -> None:
    async with busy(tmp_path, 60) as (client, holding):
        waiting = changes(client)
        await asyncio.sleep(0.05)
        for path in ("/health", "/v1/adapters/a", "/v1/files", "/v1/fine_tuning/jobs", "/metrics"):
            assert (await client.get(path)).status_code == 200
        assert not any(change.done() for change in waiting), "the changes were waiting throughout"
        holding.close()
        assert sorted(response.status_code for response in await asyncio.gather(*waiting)) == [200, 200, 404, 404]


async def test_busy_is_a_503_in_time(tmp_path: Path) -> None:
    async with busy(tmp_path, 0.2) as (client, holding):
        for response in await asyncio.wait_for(asyncio.gather(*changes(client)), 60):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "database_busy"
            assert int(response.headers["Retry-After"]) > 0
        holding.close()
        assert (await client.delete("/v1/adapters/a")).status_code == 200
        assert (await upload(client)).status_code == 200


async def test_the_guard_finds_a_database_call_on_the_loop(tmp_path: Path) -> None:
    database = await asyncio.to_thread(open_database, tmp_path / "db")
    found: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    def called_by_the_loop() -> None:
        try:
            check()
        except AskedOnTheLoop as fault:
            found.set_result(fault)

    asyncio.get_running_loop().call_soon(called_by_the_loop)
    assert "asyncio.to_thread" in str(await asyncio.wait_for(found, 60))
    await asyncio.to_thread(check)
    assert Database.reading.__name__ == "call", "the guard is active in every test"
    database.close()


def test_outside_an_event_loop_database_calls_are_allowed(tmp_path: Path) -> None:
    with closing(open_database(tmp_path / "db")) as database, database.reading() as connection:
        assert connection.execute("SELECT COUNT(*) FROM files").fetchone()[0] == 0
    with pytest.raises(sqlite3.ProgrammingError), database.reading():
        pass
