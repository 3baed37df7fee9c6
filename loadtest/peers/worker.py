"""A side in a worker process: one JSON line in for each burst, one JSON line back with the time of every step.

For libraries. Without HTTP in between, they have a small advantage. Times are `perf_counter` seconds, on Linux one
clock for all processes.
"""

import asyncio
import contextlib
import json
import os
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.client import Timeline
from loadtest.peers import base


class WorkerSide(base.Side):
    """A side that starts `command()`, sends it `settings()`, then one line per burst.

    A burst is `{"prompts": [[id]], "tokens": n, "adapters": [name or null]}`; its answer is, for each request,
    `{"times": [time of each token], "tokens": [id]}`.
    """

    def __init__(self) -> None:
        self._child: asyncio.subprocess.Process | None = None
        self._log = Path()

    @abstractmethod
    def command(self) -> list[str]:
        """Return the worker's command line."""

    @abstractmethod
    def settings(self, kit: base.Kit) -> dict[str, Any]:
        """Return the worker's first line of input, which it answers once everything is loaded."""

    @abstractmethod
    def adapter(self, adapter: base.AdapterId) -> str:
        """Return the worker's name of an adapter."""

    async def start(self, kit: base.Kit) -> None:
        self._log = kit.folder / f"{self.name}.log"
        with self._log.open("wb") as stderr:
            self._child = await asyncio.create_subprocess_exec(
                *self.command(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                limit=2**24,  # of one answer's line
                env=os.environ | {"OMP_NUM_THREADS": str(kit.threads), "TOKENIZERS_PARALLELISM": "false"},
            )
        await self._ask(self.settings(kit))

    async def burst(self, works: Sequence[base.Work]) -> list[Timeline]:
        [tokens] = {work.output_tokens for work in works}
        names = [None if work.adapter is None else self.adapter(work.adapter) for work in works]
        sent = time.perf_counter()
        answers = await self._ask({"prompts": [w.prompt for w in works], "tokens": tokens, "adapters": names})
        return [_timeline(sent, work, answer) for work, answer in zip(works, answers, strict=True)]

    async def _ask(self, message: dict[str, Any]) -> Any:
        child = self._child
        assert child is not None, "start() comes first"
        assert child.stdin is not None
        assert child.stdout is not None
        answer = b""
        with contextlib.suppress(ConnectionError):
            child.stdin.write(json.dumps(message).encode() + b"\n")
            await child.stdin.drain()
            answer = await child.stdout.readline()
        if not answer:
            raise base.SideError(f"the worker ended:\n{base.tail(self._log)}")
        return json.loads(answer)

    async def stop(self) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.terminate()
            await self._child.wait()
            self._child = None


def _timeline(sent: float, work: base.Work, answer: dict[str, Any]) -> Timeline:
    count = len(answer["tokens"])
    return Timeline(
        scheduled=sent,
        sent=sent,
        expected_tokens=work.output_tokens,
        tokens=[(moment, i + 1) for i, moment in enumerate(answer["times"])],
        prompt_tokens=len(work.prompt),
        output_tokens=count,
        text=" ".join(map(str, answer["tokens"])),
        finished=answer["times"][-1],
        error=None if count == work.output_tokens else f"{count} of {work.output_tokens} tokens returned",
    )
