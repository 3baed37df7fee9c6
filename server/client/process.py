"""The engine's process on this machine: started, heard over a socket, watched, and started again when it dies.

Of messages it looks at those that tell how the process is; all of them are handed on.
"""

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import zmq

from adapters.peft_format.sizes import device_bytes
from adapters.scratch import scratch
from server.children.helper import OURS
from server.errors import EngineUnavailable
from server.messages import protocol
from server.messages.protocol import EngineConfig, Ready

log = logging.getLogger("lorakeet.engine")

_WATCH_SECONDS = 1.0  # between looks at whether the engine has said anything
_RETRY_SECONDS = 1.0  # before another try to start a process that could not be started
_SOCKET = "engine.sock"
_QUIET_SECONDS = 60.0  # without a word from a loaded engine, after which it is not called ready
_DEATHS = 3  # in a row, after which it is not restarted


class EngineDied(EngineUnavailable):
    """503: the engine died while it had this message, which may have been the reason."""


class EngineProcess:
    """An engine process, kept alive: one after another until stopped or given up.

    Args:
        config: what to start it with (`address` is filled in here).
        hear: called with every message.
        ended: called when no answer to what was sent will come any more, with the error to tell.
        training: whether it has a job: then its death does not count. A job is never sent to more than two that die.
        start_seconds: an engine that is not loaded after this long is killed and started again.
        stall_seconds: without a word for this long, a loaded engine stands still: the same becomes of it.

    Attributes:
        failed_for_good: set when no restart will be tried any more.
    """

    def __init__(
        self,
        config: EngineConfig,
        hear: Callable[[protocol.Reply], None],
        ended: Callable[[type[EngineUnavailable]], None],
        training: Callable[[], bool],
        *,
        start_seconds: float,
        stall_seconds: float,
    ) -> None:
        self._config = config
        self._take = hear
        self._ended = ended
        self._training = training
        self._start_seconds = start_seconds
        self._stall_seconds = stall_seconds
        self._reason: str | None = "the engine has not been started"  # why it is not there
        self._ever_loaded = False
        self._last_word = time.monotonic()
        self._deaths = 0  # in a row, no step having been served in between
        self._context = zmq.Context()
        self._process: asyncio.subprocess.Process | None = None
        self._wire: _Wire | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = False
        self.failed_for_good = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """The process now, or None while there is none."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    @property
    def unready_reason(self) -> str | None:
        """None when it is loaded and making progress, else why it is not."""
        silence = time.monotonic() - self._last_word
        if self._reason is None and silence > _QUIET_SECONDS:
            return f"the engine has not answered for {silence:.0f} s"
        return self._reason

    def send(self, message: protocol.Request) -> None:
        """Raises EngineUnavailable when there is nobody to send it to."""
        if self._reason is not None or self._wire is None:
            raise EngineUnavailable(self._reason or "the engine is not running")
        try:
            self._wire.send(protocol.encode(message))
        except zmq.ZMQError:  # its process has died this moment
            raise EngineUnavailable("the engine has just stopped") from None

    # --- from its start to its end --------------------------------------------------------------------

    def start(self) -> None:
        """Start it and return at once; `unready_reason` tells when it is up."""
        self._reason = "the engine is loading the model"
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def stop(self, grace: float) -> None:
        """Let running sequences finish for at most `grace` seconds, then end the process."""
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            if self._reason is None:
                with contextlib.suppress(EngineUnavailable, TimeoutError):
                    self.send(protocol.Drain())
                    await asyncio.wait_for(process.wait(), max(grace, 0.0))
            await _kill(process)
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._reason = "the server is shutting down"
        self._ended(EngineUnavailable)
        self._context.destroy(linger=0)

    def _told_to_stop(self) -> bool:
        return self._stopping

    async def _supervise(self) -> None:
        """Run one engine process after another until stopped or given up."""
        while not self._told_to_stop():
            born = time.monotonic()
            try:
                with scratch(_SOCKET) as directory:
                    reason, retry = await self._live(directory / _SOCKET)
                counts = not self._training()
            except (OSError, zmq.ZMQError) as fault:  # no space for its socket, no memory for its process
                reason, retry = f"its process cannot be started: {fault}", True
                counts = not self._ever_loaded  # else it could be once, and will be again
                await asyncio.sleep(_RETRY_SECONDS)
            except Exception as fault:  # of ours: it would load for ever
                log.exception("supervising the engine failed")
                reason, retry, counts = f"a fault in the server: {fault!r}", False, False
            self._process = self._wire = None
            if self._told_to_stop():
                return
            # One that was loaded and lived long was well: deaths before that, or without a served step, add up.
            if self._reason is None and time.monotonic() - born > _QUIET_SECONDS:
                self._deaths = 0
            self._deaths += counts
            if not retry or self._deaths >= _DEATHS:
                self._reason = reason if not retry else f"the engine died {self._deaths} times in a row: {reason}"
                self._ended(EngineDied)
                log.error("the engine will not be restarted: %s", self._reason)
                self.failed_for_good.set()
                return
            self._reason = f"the engine is being restarted ({reason})"
            self._ended(EngineDied)
            log.warning("%s", self._reason)

    async def _live(self, socket: Path) -> tuple[str, bool]:
        """One process from birth to death. Returns why it ended and whether to try again."""
        config = msgspec.structs.replace(self._config, address=f"ipc://{socket}")
        fatal: asyncio.Future[protocol.Fatal] = asyncio.get_running_loop().create_future()
        with contextlib.closing(_Wire(self._context, config.address, partial(self._hear, fatal))) as wire:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "server.engine.process",
                str(os.getpid()),
                protocol.encode_config(config).decode(),
                stdin=asyncio.subprocess.DEVNULL,
                # torch's idle threads must sleep, not spin, or they take the cores from our own kernels' threads.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **OURS},
            )
            self._process, self._wire = process, wire
            death = asyncio.create_task(process.wait())
            stall = asyncio.create_task(self._stall())
            ends: set[asyncio.Future[Any]] = {fatal, death, stall}
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if fatal.done():  # it said that it cannot go on
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(asyncio.shield(death), 5)
                    return fatal.result().message, fatal.result().retry
                if not death.done():
                    return stall.result(), True
                return f"engine process ended with status {process.returncode}", True
            finally:
                stall.cancel()
                await _kill(process)

    async def _stall(self) -> str:
        """Return, with the reason, once the engine has said nothing for too long: while it loads, it is silent.

        Time counts in which this process could have heard it: when both were stopped, the engine is not to blame.
        """
        heard, silence = self._last_word, 0.0
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            silence = silence + _WATCH_SECONDS if heard == self._last_word else 0.0
            heard = self._last_word
            if self._reason is not None and silence >= self._start_seconds:
                return f"it was not loaded within {self._start_seconds:.0f} s (--engine-start-seconds)"
            if self._reason is None and silence >= self._stall_seconds:
                return f"it stood still for {self._stall_seconds:.0f} s (--engine-stall-seconds)"

    def _hear(self, fatal: asyncio.Future[protocol.Fatal], data: bytes) -> None:
        """Take note of a message, and hand it on."""
        self._last_word = time.monotonic()
        message = protocol.decode_reply(data)
        match message:
            case protocol.Step(outputs=outputs) if outputs:
                self._deaths = 0
            case protocol.Ready():
                self._reason, self._ever_loaded = None, True
                log.info("%s", _summary(message))
            case protocol.Fatal():
                fatal.set_result(message)
        self._take(message)


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill the process, if it has not ended."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _summary(ready: Ready) -> str:
    """What an engine that came up has, in one line."""
    kinds = {linear.kind for linear in ready.linears.values()}  # rank rows alone: what --adapter-bytes says
    rows = {kind: units for kind, units in ready.pool_rows.items() if kind in kinds}
    adapters = device_bytes(rows, ready.linears) / 2**20
    return (
        f"engine ready: {ready.architecture} on {ready.device} in {ready.dtype}, KV cache of "
        f"{ready.num_blocks * ready.block_size} tokens, {adapters:.0f} MiB for adapters, "
        f"{ready.kernels or 'unknown'} kernels"
    )


class _Wire:
    """A ZeroMQ PAIR socket on the event loop, which the other end connects to: what arrives is handed over at once.

    ZeroMQ's own asyncio sockets make several futures and callbacks of each message. With an engine that reports every
    few milliseconds on cores that compute, those were a third of what the API process took.

    Args:
        address: where to listen.
        take: called with every message, on the running event loop. What it raises is logged.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", address: str, take: Callable[[bytes], None]) -> None:
        self._take = take
        self._socket = context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._socket.bind(address)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._receive)

    def send(self, message: bytes) -> None:
        """Hand a message over; never waits. Raises `zmq.ZMQError` when it is closed or nobody is at the other end."""
        self._socket.send(message, zmq.NOBLOCK)
        # The descriptor tells of changes only, and sending may have taken note of one.
        self._loop.call_soon(self._receive)

    def close(self) -> None:
        """Nothing is taken or sent any more. May be called twice."""
        if not self._socket.closed:
            self._loop.remove_reader(self._socket.FD)
            self._socket.close()

    def _receive(self) -> None:
        while not self._socket.closed:
            try:
                message = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._take(message)
            except Exception:  # or those behind it would lie there until another comes
                log.exception("handling a message from the engine failed")
