"""The effect of loads on other requests, at the scale of a test: the parts that measure nothing."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from loadtest.loading import MODES, Uploads, _repeat_in_thread, table
from server.services import TENANT
from tests.support.harness import write_adapter
from tests.support.scripted import serving


async def test_every_upload_is_another_adapter(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "made", 1)
    async with serving(tmp_path) as served:
        server = uvicorn.Server(uvicorn.Config(served.app, port=0, log_config=None, lifespan="off"))
        task = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event
            await asyncio.sleep(0.01)
        uploads = Uploads(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", folder)
        await asyncio.to_thread(uploads.upload_new)
        for _ in range(2):
            await asyncio.to_thread(uploads.upload_and_warm)
        assert len(served.services.store.versions(TENANT, "fresh")) == 3
        assert await asyncio.to_thread(uploads.warm, "fresh") == 0.0
        server.should_exit = True
        await task


def test_work_is_repeated_as_long_as_the_block_lasts_and_its_fault_is_told() -> None:
    done: list[float] = []
    began = time.perf_counter()
    with _repeat_in_thread(lambda: done.append(time.perf_counter()), every=0.01) as took:
        while len(done) < 5:
            time.sleep(0.01)
    over = time.perf_counter()
    assert len(took) == len(done)
    assert sum(took) < over - began
    assert all(at - began > 0.009 * i for i, at in enumerate(done)), "at the required interval"
    with _repeat_in_thread(None, every=0.01) as took:
        pass
    assert took == []

    def fail() -> None:
        raise OSError("no server")

    with pytest.raises(OSError, match="no server"), _repeat_in_thread(fail, every=0.01):
        pass


def test_the_table_shows_every_mode() -> None:
    spread = {"p50": 1.0, "p90": 2.0, "p99": 3.0}
    result: dict[str, Any] = {
        "streams": 4,
        "adapter_bytes": 20_000_000,
        "every_seconds": 1.0,
        "itl_ms": dict.fromkeys(MODES, spread),
        "adapters": {"alone": 0, "loads": 5, "uploads": 6, "both": 4},
        "took_ms": {"loads": 30.0, "uploads": 60.0, "both": 90.0},
        "first_token_ms": {"warm": 1.0, "cold": 2.0, "load": 1.0},
    }
    assert table(result).row_count == len(MODES)
