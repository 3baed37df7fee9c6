"""The server's periodic work continues after any fault."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from server import history
from server.repeat import run_periodically
from server.tenants import keys, sending
from tests.support.harness import Site


async def test_it_goes_on_after_a_fault_which_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    faults: list[Exception | None] = [ValueError("odd"), ValueError("odd"), OSError("full"), None, ValueError("odd")]
    done = asyncio.Event()

    async def work() -> None:
        if not faults:
            done.set()
        elif fault := faults.pop(0):
            raise fault

    caplog.set_level("INFO")
    task = asyncio.create_task(run_periodically(work, 0.001, "work", OSError))
    await asyncio.wait_for(done.wait(), 60)
    task.cancel()
    logged = [(record.message, bool(record.exc_info)) for record in caplog.records]
    again = ("work: recovered", False)
    assert logged == [("work: odd", True), ("work: full", False), again, ("work: odd", True), again]


async def test_no_loop_of_the_server_ends_with_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def failing(name: str) -> Callable[..., NoReturn]:
        def fail(*_: object) -> NoReturn:
            calls[name] += 1
            raise RuntimeError("nobody thought of this")

        return fail

    monkeypatch.setattr(history, "SAMPLE_SECONDS", 0.01)
    monkeypatch.setattr(keys, "FLUSH_SECONDS", 0.01)
    with contextlib.closing(Site(tmp_path, store_poll_seconds=0.1, adapter_orphan_hours=1e-5)) as site:
        registry, tenants, samples = site.registry, site.services.tenants, site.services.history
        monkeypatch.setattr(registry, "_orphan_seconds", 0.01)
        monkeypatch.setattr(registry.following, "_shared", True)
        monkeypatch.setattr(tenants, "_shared", True)
        names = {"import_changes": site.store, "remove_orphans": site.store, "_flush": tenants, "poll": tenants}
        for name, owner in (names | {"sample": samples}).items():
            monkeypatch.setattr(owner, name, failing(name))
        loops = registry.collect_orphans(), registry.following.run(), tenants.run(), tenants.follow(), samples.run()
        tasks = [asyncio.create_task(loop) for loop in (*loops, sending.send_periodically(0.01, failing("send")))]
        async with asyncio.timeout(60):
            while len(calls) < len(tasks) or min(calls.values()) < 3:
                assert not any(task.done() for task in tasks)
                await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
