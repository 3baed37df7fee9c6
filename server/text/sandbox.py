"""Work that may explode, done in processes that can be killed, within limits of time and memory: chat templates of
adapters, for one.

A few helper processes wait (started when first needed); each takes one order at a time and gives it a child of its own.
"""

import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.errors import InvalidRequest

PROCESSES = 2
_START_SECONDS = 60.0  # for a process to come up, on the busiest of machines
_GRACE_SECONDS = 2.0  # beyond the limit, for a child to be ended and its parent to tell
_MAX_ANSWER = 256 * 1024 * 1024  # bytes; an answer is bounded by its child's memory


@dataclass(frozen=True)
class Limits:
    """What one order may cost."""

    seconds: float = 2.0
    cpu_seconds: int = 2
    memory_bytes: int = 256 * 1024 * 1024


@dataclass
class Sandbox:
    """Lets a program of `server.children.programs` carry out orders. `close` ends its processes."""

    program: str
    limits: Limits
    _idle: list[asyncio.subprocess.Process] = field(default_factory=list)
    _places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(PROCESSES))

    def close(self) -> None:
        """End the processes that wait; those at work end with their work."""
        for process in self._idle:
            _kill(process)
        self._idle.clear()

    async def ask(self, order: Mapping[str, Any]) -> Any:
        """The program's answer; None when the order exceeded its limits."""
        async with self._places:
            try:
                process = await self._take()
            except TimeoutError:
                return None
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                async with asyncio.timeout(self.limits.seconds + _GRACE_SECONDS):
                    process.stdin.write(json.dumps(order).encode() + b"\n")
                    await process.stdin.drain()
                    line = await process.stdout.readline()
                answer = json.loads(line)
            except (TimeoutError, ValueError, OSError):
                _kill(process)
                return None
            except BaseException:
                _kill(process)
                raise
            self._idle.append(process)
        return answer

    async def _take(self) -> asyncio.subprocess.Process:
        while self._idle:
            process = self._idle.pop()
            if process.returncode is None:
                return process
        return await self._start()

    async def _start(self) -> asyncio.subprocess.Process:
        limits = self.limits
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", f"server.children.programs.{self.program}"),
            *(str(limits.seconds), str(limits.cpu_seconds), str(limits.memory_bytes)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_ANSWER,
        )
        assert process.stdout is not None
        try:
            await asyncio.wait_for(process.stdout.readline(), _START_SECONDS)  # it is ready; no order's time passes
        except BaseException:
            _kill(process)
            raise
        return process


class TemplateRenderer(Sandbox):
    """Renders any template."""

    def __init__(self, limits: Limits) -> None:
        super().__init__("template_sandbox", limits)

    async def check(self, source: str) -> None:
        """Raises `InvalidRequest` for what is no template."""
        await self._render({"source": source, "special_tokens": {}})

    async def render(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        messages: Sequence[Mapping[str, Any]],
        **options: Any,
    ) -> str:
        """As `ChatTemplate.render`. Raises `InvalidRequest` also for one that exceeds its limits."""
        order = {"source": source, "special_tokens": special_tokens, "messages": messages, "options": options}
        return await self._render(order)

    async def _render(self, order: Mapping[str, Any]) -> str:
        answer = await self.ask(order)
        if answer is None:
            answer = {"error": "The adapter's chat template takes too long, or too much memory."}
        if "text" in answer:
            text: str = answer["text"]
            return text
        raise InvalidRequest(answer["error"], param=answer.get("param") or "messages", code="chat_template_failed")


def _kill(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
