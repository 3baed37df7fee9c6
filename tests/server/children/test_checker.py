"""A process that checks adapters: what it says comes through, and it may die."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapters.offline.checker import Check
from adapters.peft_format import packed_rows as rowfile
from adapters.peft_format.directory import inspect
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.text import NO_TEXT
from server.children.checker import Checker, CheckerDied
from tests.support.harness import base_info, write_adapter

BASE = base_info()


def check(directory: Path) -> Check:
    return Check(directory, BASE.linears, BASE.architecture, None, NO_TEXT)


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Checker]:
    checker = Checker("idle")
    try:
        yield checker
    finally:
        await checker.close()


async def test_it_finds_what_a_thread_would_find_and_lays_out_rows(tmp_path: Path) -> None:
    good, bad = write_adapter(tmp_path / "good", 1), write_adapter(tmp_path / "bad", 2, r=0)
    async with running() as checker:
        spec = await checker.check(check(good))
        assert spec == inspect(good, BASE.linears, BASE.architecture)
        assert (good / rowfile.ROWS_NAME).exists()
        with pytest.raises(AdapterError) as here:
            inspect(bad, BASE.linears, BASE.architecture)
        with pytest.raises(AdapterError) as there:
            await checker.check(check(bad))
        assert (str(there.value), there.value.param, there.value.code) == (
            str(here.value),
            here.value.param,
            here.value.code,
        )
        (good / rowfile.ROWS_NAME).unlink()
        (good / rowfile.ROWS_NAME).mkdir()  # whoever runs this, rows cannot be written there
        with pytest.raises(OSError, match="directory"):
            await checker.check(check(good))


async def test_it_is_started_again_when_it_died_and_given_up_when_it_always_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = write_adapter(tmp_path / "good", 1)
    async with running() as checker:
        first = await checker.check(check(directory))
        assert checker._process is not None
        checker._process.kill()
        assert await checker.check(check(directory)) == first
    monkeypatch.setattr("sys.executable", "/bin/false")
    async with running() as checker:
        with pytest.raises(CheckerDied):
            await checker.check(check(directory))


async def test_who_stops_waiting_leaves_it_ready_for_the_next(tmp_path: Path) -> None:
    one, other = (write_adapter(tmp_path / str(seed), seed) for seed in (1, 2))
    async with running() as checker:
        await checker.check(check(one))
        waiting = asyncio.create_task(checker.check(check(one)))
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        assert await checker.check(check(other)) == inspect(other, BASE.linears, BASE.architecture)
