"""Helper processes: heavy or dangerous work outside this process, bounded in time and memory, ended when cancelled.

A helper runs a program that answers orders (`server.children.frames`), one at a time. `Helpers` shares several of them
among keys, so that slow work of one key does not hold up others.
"""

import asyncio
import logging
import os
import resource
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from typing import Any

import msgspec

from adapters.background import Priority, lower_priority
from adapters.peft_format.fields import AdapterError
from server.children.fair_queue import FairQueue
from server.children.frames import PREFIX_BYTES, capped, frame

FORK_GRACE_SECONDS = 2.0  # beyond an order's limit, for its child to end and the program to report it
WORK_PROGRAM = "server.children.programs.work"
# Variables of every process that we start: its modules are ours, not those in the working directory, and have
# docstrings, which transformers reads.
CHILD_ENVIRONMENT = {"PYTHONSAFEPATH": "1", "PYTHONOPTIMIZE": ""}
_MAX_ANSWER = 256 * 1024 * 1024  # bytes
_PROCESS_ENDED = (asyncio.IncompleteReadError, ConnectionError)

log = logging.getLogger(__name__)


class HelperFailed(RuntimeError):
    """The program failed; the log has the cause."""


class HelperLimit(Exception):
    """The order exceeded its time or memory and was ended. The message is a predicate, such as "takes too long"."""


class HelperTimeout(HelperLimit):
    """The order exceeded its wall time: it may be too large, or the machine busy."""


class Helper:
    """One process, started with the first order and again after it has ended. Takes one order at a time.

    Args:
        command: the program's module, and its arguments.
        memory: limit of the process's data, in bytes.
    """

    def __init__(self, *command: str, priority: Priority = "normal", memory: int | None = None) -> None:
        self._command = command
        self._priority: Priority = priority
        self._memory = memory
        self._process: Process | None = None
        self.started_at = 0.0  # time of the last start, on the monotonic clock
        self._closed = False

    async def ask(self, order: Any, seconds: float | None, kind: Any = Any) -> Any:
        """Return the answer, of type `kind`, to an order that JSON can express. Cancelling ends the process.

        Raises:
            AdapterError: the program refuses the order.
            OSError: a fault of the disk.
            HelperLimit, HelperTimeout, HelperFailed.
        """
        content, answer = frame(msgspec.json.encode(order, enc_hook=str)), None
        served_before = self._process is not None
        try:
            async with asyncio.timeout(seconds):
                try:
                    answer = await self._exchange(content)
                except _PROCESS_ENDED:
                    if not served_before:
                        raise
                    await self._end()  # the process may have died since its last answer
                    answer = await self._exchange(content)
        except TimeoutError:
            raise HelperTimeout(f"takes more than {seconds:g} s") from None
        except _PROCESS_ENDED:
            status = await self._end() or 0
            log.error("%s ended with status %d", " ".join(self._command), status)
            if status < 0 and not self._closed:  # mostly for lack of memory
                raise HelperLimit("ran out of memory, or was killed") from None
            raise HelperFailed("the helper process ended") from None
        finally:
            if answer is None:
                await self._end()
        return _decode_answer(answer, kind)

    async def close(self) -> None:
        """Kill the process, even at work."""
        self._closed = True
        await self._end()

    async def _exchange(self, content: bytes) -> bytes:
        if self._closed:
            raise HelperFailed("the server is shutting down")
        process = self._process or await self._start()
        assert process.stdin is not None
        process.stdin.write(content)
        await process.stdin.drain()
        return await _read(process)

    async def _start(self) -> Process:
        # Idle threads must sleep, not spin; numpy's BLAS threads take memory that is never used.
        environment = {"OMP_WAIT_POLICY": "PASSIVE"} | ({"OPENBLAS_NUM_THREADS": "1"} if self._memory else {})
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", *self._command),
            stdin=PIPE,
            stdout=PIPE,
            env=environment | dict(os.environ) | CHILD_ENVIRONMENT,
            start_new_session=True,
        )
        with suppress(ProcessLookupError):  # set while the interpreter still starts
            lower_priority(self._priority, self._process.pid)
            if self._memory and sys.platform == "linux":
                limit = capped(resource.RLIMIT_DATA, self._memory)
                resource.prlimit(self._process.pid, resource.RLIMIT_DATA, (limit, limit))
        process = self._process
        await _read(process)
        self.started_at = time.monotonic()
        return process

    async def _end(self) -> int | None:
        """Kill the process; return its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with its forked children
        return await process.wait()


class Helpers:
    """Several processes that run one program, shared among keys: see `FairQueue`."""

    def __init__(self, count: int, *command: str, priority: Priority = "normal", memory: int | None = None) -> None:
        self._helpers = [Helper(*command, priority=priority, memory=memory) for _ in range(count)]
        self._idle = list(self._helpers)
        self._queue = FairQueue(count)

    async def ask(self, key: str, order: Any, seconds: float, kind: Any = Any, work: str | None = None) -> Any:
        """As `Helper.ask`, in the key's turn, from which `seconds` count. `work`: a name for orders of like duration,
        by default `key`."""
        async with self._queue.acquire(key, work or key) as call:
            helper = self._idle.pop()
            try:
                return await helper.ask(order, seconds, kind)
            finally:
                call.began = max(call.began, helper.started_at)  # without the start of a process
                self._idle.append(helper)

    async def close(self) -> None:
        """Kill the processes, even at work."""
        await asyncio.gather(*(helper.close() for helper in self._helpers))


def forking_helpers(program: str, seconds: float, cpu_seconds: int, memory: int) -> Helpers:
    """Make two helpers of a program that forks a child for each order, within these limits (`server.children.forked`).

    Their callers wait `FORK_GRACE_SECONDS` longer than `seconds`.
    """
    return Helpers(2, f"server.children.programs.{program}", str(seconds), str(cpu_seconds), str(memory))


async def ask_once(function: str, order: Any, seconds: float | None) -> Any:
    """Run a function (`package.module.function`) in a process of its own. Raises the errors of `Helper.ask`."""
    helper = Helper(WORK_PROGRAM, priority="low")
    try:
        return await helper.ask({"function": function, "order": order}, seconds)
    finally:
        await helper.close()


async def _read(process: Process) -> bytes:
    assert process.stdout is not None
    size = int.from_bytes(await process.stdout.readexactly(PREFIX_BYTES), "little")
    if size > _MAX_ANSWER:
        raise HelperLimit(f"makes an answer of more than {_MAX_ANSWER} bytes")
    return await process.stdout.readexactly(size)


def _decode_answer(content: bytes, kind: Any) -> Any:
    match msgspec.json.decode(content):
        case {"answer": answer}:
            return msgspec.convert(answer, kind)
        case {"refused": fields}:
            raise AdapterError(**fields)
        case {"late": predicate}:
            raise HelperTimeout(predicate)
        case {"limit": predicate}:
            raise HelperLimit(predicate)
        case {"system": fault}:
            raise OSError(*fault)
        case other:  # a traceback
            log.error("a helper process failed: %s", other)
            raise HelperFailed(str(other).strip().rpartition("\n")[2])
