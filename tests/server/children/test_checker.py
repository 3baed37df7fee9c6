"""Uploads checked in helper processes: the same results as a check in a thread, and within limits."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from adapters.peft_format import packed_rows
from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.inspection import Check, inspect, inspect_adapter
from adapters.peft_format.outline import Outline
from adapters.peft_format.text import AdapterText, NewToken, read_added_tokens
from server.children.helper import WORK_PROGRAM, Helpers
from server.registry.publish import Publisher
from tests.support.harness import Site, base_info, write_adapter

BASE = base_info()
TEXT = AdapterText((NewToken(9, "<new>", special=True),), "{{ messages }}")


def check(directory: Path) -> Check:
    return Check(directory, BASE.linears, BASE.architecture, Outline(), TEXT)


@contextlib.asynccontextmanager
async def running(root: Path, memory: int = 1 << 30, **settings: Any) -> AsyncIterator[Publisher]:
    checker = Helpers(2, WORK_PROGRAM, priority="idle", memory=memory)
    with contextlib.closing(Site(root, **settings)) as site:
        site.publisher._checker = checker
        yield site.publisher
        await site.publisher.close()


async def inspected(publisher: Publisher, directory: Path) -> AdapterSpec:
    return await publisher._run("name", inspect_adapter, check(directory), "weights")


async def test_results_equal_a_check_in_a_thread_and_rows_are_packed(tmp_path: Path) -> None:
    good, bad = write_adapter(tmp_path / "good", 1), write_adapter(tmp_path / "bad", 2, r=0)
    async with running(tmp_path) as publisher:
        spec = await inspected(publisher, good)
        assert spec == inspect(good, BASE.linears, BASE.architecture, None, TEXT)
        assert (good / packed_rows.ROWS_NAME).exists()
        with pytest.raises(AdapterError) as here:
            inspect(bad, BASE.linears, BASE.architecture)
        with pytest.raises(AdapterError) as there:
            await inspected(publisher, bad)
        assert (str(there.value), there.value.param, there.value.code) == (
            str(here.value),
            here.value.param,
            here.value.code,
        )
        (good / packed_rows.ROWS_NAME).unlink()
        (good / packed_rows.ROWS_NAME).mkdir()  # writing rows fails here, even as root
        with pytest.raises(OSError, match="directory"):
            await inspected(publisher, good)


async def test_a_cancelled_check_leaves_the_checker_ready(tmp_path: Path) -> None:
    one, other = (write_adapter(tmp_path / str(seed), seed) for seed in (1, 2))
    async with running(tmp_path) as publisher:
        await inspected(publisher, one)
        waiting = asyncio.create_task(inspected(publisher, one))
        await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        assert await inspected(publisher, other) == inspect(other, BASE.linears, BASE.architecture, None, TEXT)


async def test_a_tokenizer_of_empty_lists_costs_little_and_one_of_tokens_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b'{"added_tokens": [{"id": 1, "content": "x"}], "model": [' + b"[]," * (4 << 20) + b"[]]}")
    async with running(tmp_path, memory=256 << 20) as publisher:
        assert await publisher._run("name", read_added_tokens, path, "tokenizer") == (NewToken(1, "x"),)
        path.write_bytes(b'{"added_tokens": [' + b'{"id":1,"content":"x"},' * 70_000 + b'{"id":1,"content":"x"}]}')
        with pytest.raises(AdapterError, match="70001 added tokens") as refusal:
            await publisher._run("name", read_added_tokens, path, "tokenizer")
        assert refusal.value.param == "tokenizer"


async def test_a_check_beyond_its_time_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "tokenizer.json"
    os.mkfifo(pipe)  # no process writes into it
    async with running(tmp_path, adapter_check_seconds=3) as publisher:
        with pytest.raises(AdapterError, match="takes more than 3 s") as refusal:
            await publisher._run("name", read_added_tokens, pipe, "tokenizer")
        assert (refusal.value.param, refusal.value.code) == ("tokenizer", "adapter_too_large")
