"""Adapters are checked in a process of its own: a thread would hold the interpreter while those served wait for it.

The more so at a priority that gives way: what has the interpreter and no core keeps everybody waiting. The other end is
`adapters.offline.checker`.
"""

import asyncio
import logging
import pickle
import sys
from asyncio.subprocess import PIPE, Process

from adapters.background import Priority
from adapters.offline.checker import Answer, Check, Refused
from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.fields import AdapterError

log = logging.getLogger(__name__)


class CheckerDied(RuntimeError):
    """The process ended while it was checking, twice."""


class Checker:
    """One process that checks adapters in turn, started when it is first needed."""

    def __init__(self, priority: Priority) -> None:
        self._priority = priority
        self._turn = asyncio.Lock()
        self._process: Process | None = None

    async def check(self, check: Check) -> AdapterSpec:
        """Run it there. Raises AdapterError, OSError, CheckerDied; whoever is cancelled ends the process."""
        async with self._turn:
            try:
                answer = await self._ask(check)
            except (asyncio.IncompleteReadError, OSError):
                log.warning("the process that checks adapters ended; it is started again")
                await self._end()
                try:
                    answer = await self._ask(check)
                except (asyncio.IncompleteReadError, OSError):
                    await self._end()
                    raise CheckerDied("the process that checks adapters ended twice") from None
            except BaseException:
                await self._end()
                raise
        if isinstance(answer, Refused):
            raise AdapterError(answer.message, answer.param, answer.code)
        if isinstance(answer, OSError):
            raise answer
        return answer

    async def close(self) -> None:
        """End the process."""
        async with self._turn:
            await self._end()

    async def _ask(self, check: Check) -> Answer:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "adapters.offline.checker", self._priority), stdin=PIPE, stdout=PIPE
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        content = pickle.dumps(check)
        self._process.stdin.write(len(content).to_bytes(8, "little") + content)
        await self._process.stdin.drain()
        size = int.from_bytes(await self._process.stdout.readexactly(8), "little")
        answer: Answer = pickle.loads(await self._process.stdout.readexactly(size))
        return answer

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()
