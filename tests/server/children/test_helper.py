"""Helper processes: their replies, and their end by time limit, by a cancelled caller and with this server."""

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from adapters.peft_format.fields import AdapterError
from server.children.fair_queue import FairQueue
from server.children.frames import capped
from server.children.helper import WORK_PROGRAM, Helper, HelperFailed, HelperLimit, Helpers, ask_once

PROGRAM = """
import os, sys, time
from adapters.peft_format.fields import AdapterError

def run(order: str):
    return eval(order)

def block(order: str):
    exec(order)
"""


@pytest.fixture(autouse=True)
def obedient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create a module whose functions run the code in their orders."""
    (tmp_path / "obedient.py").write_text(PROGRAM)
    paths = filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))  # an empty entry is the working directory
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def order(code: str, function: str = "run") -> dict[str, str]:
    return {"function": f"obedient.{function}", "order": code}


@contextlib.asynccontextmanager
async def helper(**limits: Any) -> AsyncIterator[Helper]:
    made = Helper(WORK_PROGRAM, **limits)
    try:
        yield made
    finally:
        await made.close()


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


async def eventually_gone(pid: int) -> None:
    async with asyncio.timeout(60):
        while not gone(pid):  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.02)


async def test_helpers_import_no_modules_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere := tmp_path / "elsewhere").mkdir()
    for name in ("server", "adapters", "json"):
        (elsewhere / f"{name}.py").write_text("raise SystemExit('somebody else wrote this')")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    async with helper() as asked:
        assert await asked.ask(order("order * 3"), 30) == "order * 3" * 3


def test_no_helper_asks_for_more_than_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses a higher limit to all but root: every upload, or every grammar, would fail."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 100))
    assert (capped(resource.RLIMIT_DATA, 200), capped(resource.RLIMIT_DATA, 50)) == (100, 50)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, resource.RLIM_INFINITY))
    assert capped(resource.RLIMIT_DATA, 200) == 200


async def test_one_process_answers_one_order_after_another() -> None:
    async with helper() as asked:
        assert await asked.ask(order("order * 3"), 30) == "order * 3" * 3
        pids = {await asked.ask(order("os.getpid()"), 30) for _ in range(3)}
        assert len(pids) == 1
        assert await asked.ask(order("print('noise') or os.write(1, b'noise')"), 30) == 5, (
            "printed text is not taken for a reply"
        )
        assert await asked.ask(order("'x' * 5_000_000"), 30) == "x" * 5_000_000
    await eventually_gone(pids.pop())


async def test_refusals_and_faults_come_through(caplog: pytest.LogCaptureFixture) -> None:
    async with helper() as asked:
        with pytest.raises(AdapterError, match="no") as refusal:
            await asked.ask(order("raise AdapterError('no', 'r', 'why')", "block"), 30)
        assert (refusal.value.param, refusal.value.code) == ("r", "why")
        with pytest.raises(OSError, match="No space left"):
            await asked.ask(order("raise OSError(28, 'No space left on device')", "block"), 30)
        with pytest.raises(HelperFailed, match="ValueError: secret"):
            await asked.ask(order("raise ValueError('secret')", "block"), 30)
        assert "Traceback" in caplog.text
        assert await asked.ask(order("1"), 30) == 1, "the process continues"


async def test_a_dead_helper_is_restarted_and_a_request_that_kills_it_fails() -> None:
    async with helper() as asked:
        first = await asked.ask(order("os.getpid()"), 30)
        os.kill(first, signal.SIGKILL)
        second = await asked.ask(order("os.getpid()"), 30)
        assert second != first
        with pytest.raises(HelperFailed):
            await asked.ask(order("os._exit(1)"), 30)
        assert await asked.ask(order("1"), 30) == 1
        # also before the order has been read
        os.kill(await asked.ask(order("os.getpid()"), 30), signal.SIGSTOP)
        with pytest.raises(HelperLimit, match="takes more than"):
            await asked.ask(order("1" * 10_000_000), 0.2)
        assert await asked.ask(order("1"), 30) == 1


@pytest.mark.parametrize("end", ["time", "cancelled"])
async def test_timeout_or_cancellation_kills_a_helper_and_its_forks(end: str, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    linger = f"import os\nos.fork()\nopen({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')\ntime.sleep(60)"
    async with helper() as asked:
        await asked.ask(order("1"), 30)
        seconds = 3 if end == "time" else 60
        task = asyncio.create_task(asked.ask(order(linger, "block"), seconds))
        async with asyncio.timeout(60):
            while not (pids.exists() and len(pids.read_text().split()) == 2):  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.02)
        if end == "cancelled":
            task.cancel()
        with pytest.raises((HelperLimit, asyncio.CancelledError)):
            await task
        for pid in pids.read_text().split():
            await eventually_gone(int(pid))
        assert await asked.ask(order("1"), 30) == 1


async def test_closing_it_ends_its_work() -> None:
    async with helper() as asked:
        pid = await asked.ask(order("os.getpid()"), 30)
        task = asyncio.create_task(asked.ask(order("time.sleep(60)"), 60))
        await asyncio.sleep(0.05)
        await asked.close()
        with pytest.raises(HelperFailed):
            await task
        await eventually_gone(pid)
        with pytest.raises(HelperFailed, match="shutting down"):
            await asked.ask(order("1"), 30)


async def test_memory_is_limited() -> None:
    async with helper(memory=300 << 20) as asked:
        with pytest.raises(HelperLimit, match="memory"):
            await asked.ask(order("len(bytearray(1 << 30))"), 30)
        assert await asked.ask(order("len(bytearray(1 << 20))"), 30) == 1 << 20
    async with helper(priority="low") as asked:
        assert await asked.ask(order("os.nice(0)"), 30) >= 10


def test_it_ends_when_this_process_is_killed_in_the_middle_of_its_work(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    linger = f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import asyncio\nfrom server.children.helper import ask_once\n"
        f"asyncio.run(ask_once('obedient.block', {linger!r}, 60))"
    )
    server = subprocess.Popen([sys.executable, "-c", code])
    try:
        deadline = time.monotonic() + 60
        while not (pid.exists() and pid.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        server.kill()
        server.wait()
    deadline = time.monotonic() + 60
    while not gone(int(pid.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def test_once_in_a_thread_too() -> None:
    assert await asyncio.to_thread(lambda: asyncio.run(ask_once("obedient.run", "6 * 7", None))) == 42


# --- the queue -----------------------------------------------------------------------------------------


async def test_slow_work_of_one_caller_does_not_block_others() -> None:
    helpers = Helpers(2, WORK_PROGRAM)
    try:
        await asyncio.gather(*(helpers.ask(key, order("1"), 30) for key in "ab"))
        slow = [asyncio.create_task(helpers.ask("slow", order("time.sleep(50)"), 60)) for _ in range(12)]
        await asyncio.sleep(0.1)
        assert await helpers.ask("quick", order("1"), 30) == 1
        assert not any(task.done() for task in slow), "one helper stays free for other callers"
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
    finally:
        await helpers.close()


async def _take(queue: FairQueue, key: str, seconds: float, done: list[str]) -> None:
    async with queue.acquire(key, key):
        await asyncio.sleep(seconds)
    done.append(key)


async def test_known_slow_ones_leave_a_place_and_stand_back() -> None:
    queue, done = FairQueue(2), list[str]()
    slow = [f"slow {i}" for i in range(6)]
    for key in slow:
        await _take(queue, key, 0.26, done)
    done.clear()
    tasks = [asyncio.create_task(_take(queue, key, 0.26, done)) for key in slow]
    await asyncio.sleep(0)
    await _take(queue, "quick", 0.01, done)
    assert done == ["quick"], "although all six were queued before"
    await asyncio.gather(*tasks)
    assert len(done) == 7


async def test_many_calls_of_one_do_not_go_before_others() -> None:
    queue, done = FairQueue(1), list[str]()
    await _take(queue, "busy", 0.02, done)
    tasks = [asyncio.create_task(_take(queue, "busy", 0.02, done)) for _ in range(50)]
    await asyncio.sleep(0)
    await _take(queue, "other", 0.0, done)
    assert len(done) < 4
    for task in tasks:
        task.cancel()
    results: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results if result is not None)
    await asyncio.wait_for(_take(queue, "busy", 0, done), 60)


async def test_a_cancelled_caller_passes_its_turn_on() -> None:
    queue, done = FairQueue(1), list[str]()
    async with queue.acquire("a", "a"):
        waiting = [asyncio.create_task(_take(queue, key, 0, done)) for key in "bcd"]
        await asyncio.sleep(0)
        waiting[0].cancel()
    waiting[1].cancel()  # it has just got its turn, or is about to
    await asyncio.gather(*waiting, return_exceptions=True)
    assert done == ["d"]
    await asyncio.wait_for(_take(queue, "e", 0, done), 60)
