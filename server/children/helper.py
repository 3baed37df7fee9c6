"""Helper processes: heavy or dangerous work outside this one, bounded in time and memory, ended when nobody waits.

A helper runs a program that answers orders (`server.children.frames`), one at a time. `Helpers` shares several of them
out among keys, so that nobody's slow work holds up others.
"""

import asyncio
import logging
import os
import resource
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec

from adapters.background import Priority, give_way
from adapters.peft_format.fields import AdapterError
from server.children.frames import PREFIX_BYTES, frame
from server.children.turns import Turns

WORK = "server.children.programs.work"
_MAX_ANSWER = 256 * 1024 * 1024  # bytes
_DIED = (asyncio.IncompleteReadError, ConnectionError)

log = logging.getLogger(__name__)


class HelperFailed(RuntimeError):
    """The program broke down; the log says how."""


class HelperLimit(Exception):
    """The order took more time or memory than it may, and was ended. The message is a predicate."""


class _Refusal(msgspec.Struct):
    message: str
    param: str
    code: str | None = None


class _Answer(msgspec.Struct):
    """What a program sends: one of these."""

    answer: msgspec.Raw = msgspec.Raw(b"null")
    refused: _Refusal | None = None
    limit: str | None = None
    system: tuple[int, str] | None = None  # an OSError
    failed: str | None = None  # a traceback


@dataclass(frozen=True)
class Limits:
    """What a helper process may take.

    Attributes:
        memory: bytes of data, those of the interpreter included.
    """

    priority: Priority = "normal"
    memory: int | None = None


class Helper:
    """One process, started when it is first asked and again when it has ended. Asked one thing at a time.

    Args:
        module: the program, as `python -m` runs it, and its arguments.
    """

    def __init__(self, module: str, *arguments: str, limits: Limits = Limits()) -> None:
        self._command = (sys.executable, "-m", module, *arguments)
        self._limits = limits
        self._process: Process | None = None
        self._closed = False

    async def ask(self, order: Any, seconds: float | None, kind: Any = Any) -> Any:
        """The answer to an order. Whoever stops waiting for it ends the process.

        Args:
            order: anything that JSON can say.
            kind: type of the answer.

        Raises:
            AdapterError: the program refuses the order.
            OSError: the disk's fault.
            HelperLimit, HelperFailed.
        """
        content, raw = frame(msgspec.json.encode(order, enc_hook=str)), None
        served_before = self._process is not None
        try:
            async with asyncio.timeout(seconds):
                try:
                    raw = await self._exchange(content)
                except _DIED:
                    if not served_before:
                        raise
                    await self._end()  # it may have died since its last answer
                    raw = await self._exchange(content)
        except TimeoutError:
            raise HelperLimit(f"takes more than {seconds:g} s") from None
        except _DIED:
            status = await self._end()
            log.error("%s ended with status %s", " ".join(self._command[1:]), status)
            if status is not None and status < 0 and not self._closed:  # for want of memory, as a rule
                raise HelperLimit("ended the process that did it") from None
            raise HelperFailed("the helper process ended") from None
        finally:
            if raw is None:
                await self._end()
        return _opened(raw, kind)

    async def close(self) -> None:
        """End the process, whatever it does."""
        self._closed = True
        await self._end()

    async def _exchange(self, content: bytes) -> bytes:
        if self._process is None and not self._closed:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, stdin=PIPE, stdout=PIPE, env=self._environment, start_new_session=True
            )
            _confine(self._process.pid, self._limits)
        if self._process is None or self._closed:
            raise HelperFailed("the server is shutting down")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(content)
        await self._process.stdin.drain()
        size = int.from_bytes(await self._process.stdout.readexactly(PREFIX_BYTES), "little")
        if size > _MAX_ANSWER:
            raise HelperLimit(f"makes an answer of more than {_MAX_ANSWER} bytes")
        return await self._process.stdout.readexactly(size)

    @property
    def _environment(self) -> Mapping[str, str]:
        # Idle threads must sleep, not spin; and those of numpy's BLAS take memory that is never used.
        threads = {} if self._limits.memory is None else {"OPENBLAS_NUM_THREADS": "1"}
        return {"OMP_WAIT_POLICY": "PASSIVE", **threads, **os.environ}

    async def _end(self) -> int | None:
        """Its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it forked, too
        return await process.wait()


class Helpers:
    """Processes that run one program, shared out among keys: see `Turns`."""

    def __init__(self, count: int, module: str, *arguments: str, limits: Limits = Limits()) -> None:
        self._all = [Helper(module, *arguments, limits=limits) for _ in range(count)]
        self._idle = list(self._all)
        self._turns = Turns(count)

    async def ask(self, key: str, order: Any, seconds: float, kind: Any = Any) -> Any:
        """As `Helper.ask`, in turn. `seconds` begin with the turn."""
        async with self._turns.take(key):
            helper = self._idle.pop()
            try:
                return await helper.ask(order, seconds, kind)
            finally:
                self._idle.append(helper)

    async def close(self) -> None:
        """End the processes, whatever they do."""
        await asyncio.gather(*(helper.close() for helper in self._all))


async def ask_once(function: str, order: Any, seconds: float | None) -> Any:
    """Let a process of its own run a function (`package.module.function`). Raises what `Helper.ask` does."""
    helper = Helper(WORK, limits=Limits("low"))
    try:
        return await helper.ask({"function": function, "order": order}, seconds)
    finally:
        await helper.close()


def _confine(pid: int, limits: Limits) -> None:
    """While the interpreter starts, which takes longer; the first order comes after it."""
    with suppress(ProcessLookupError):
        give_way(limits.priority, pid)
        if limits.memory is not None and sys.platform == "linux":
            resource.prlimit(pid, resource.RLIMIT_DATA, (limits.memory, limits.memory))


def _opened(raw: bytes, kind: Any) -> Any:
    answer = msgspec.json.decode(raw, type=_Answer)
    if answer.refused is not None:
        raise AdapterError(answer.refused.message, answer.refused.param, answer.refused.code)
    if answer.limit is not None:
        raise HelperLimit(answer.limit)
    if answer.system is not None:
        raise OSError(*answer.system)
    if answer.failed is not None:
        log.error("a helper process failed: %s", answer.failed)
        raise HelperFailed(answer.failed.strip().rpartition("\n")[2])
    return msgspec.json.decode(answer.answer, type=kind)
