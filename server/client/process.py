"""The engine's process on this machine: start, socket, supervision, restart after its death.

Messages about the state of the process are read here; all messages are passed on.
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
from server.children.helper import CHILD_ENVIRONMENT
from server.errors import EngineUnavailable
from server.messages import protocol
from server.messages.protocol import EngineConfig, Ready

log = logging.getLogger("lorakeet.engine")

_WATCH_SECONDS = 1.0  # between checks for messages from the engine
_RETRY_SECONDS = 1.0  # before another attempt after a process could not be started
_SOCKET = "engine.sock"
_SILENCE_SECONDS = 60.0  # of silence after which a loaded engine is no longer reported ready
_MAX_DEATHS = 3  # in a row before the engine is not restarted any more


class EngineDied(EngineUnavailable):
    """503: the engine died while it had this message, which may have been the cause."""


class EngineProcess:
    """A supervised engine process, restarted after each death until stopped or given up.

    Args:
        config: configuration of the process (`address` is filled in here).
        on_message: called with every message.
        on_lost: called with an error class when messages sent so far will get no reply any more.
        is_training: whether the engine has a job: its death then does not count. A job is never sent to more than two
            processes that die.
        start_seconds: an engine not loaded after this long is killed and restarted.
        stall_seconds: a loaded engine that sends no message for this long is killed and restarted.

    Attributes:
        failed_for_good: set once the engine will not be restarted any more.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_message: Callable[[protocol.Reply], None],
        on_lost: Callable[[type[EngineUnavailable]], None],
        is_training: Callable[[], bool],
        *,
        start_seconds: float,
        stall_seconds: float,
    ) -> None:
        self._config = config
        self._on_message = on_message
        self._on_lost = on_lost
        self._is_training = is_training
        self._start_seconds = start_seconds
        self._stall_seconds = stall_seconds
        self._unready_reason: str | None = "the engine has not been started"  # why it is not up
        self._ever_loaded = False
        self._last_message_at = time.monotonic()
        self._deaths = 0  # in a row, without a step with outputs in between
        self._context = zmq.Context()
        self._process: asyncio.subprocess.Process | None = None
        self._engine_socket: _Socket | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = False
        self.failed_for_good = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """The current process id, or None while no process runs."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    @property
    def unready_reason(self) -> str | None:
        """None when the engine is loaded and making progress, else the reason why it is not."""
        silence = time.monotonic() - self._last_message_at
        if self._unready_reason is None and silence > _SILENCE_SECONDS:
            return f"the engine has sent no message for {silence:.0f} s"
        return self._unready_reason

    def send(self, message: protocol.Request) -> None:
        """Send a message to the engine. Raises EngineUnavailable when it is not up."""
        if self._unready_reason is not None or self._engine_socket is None:
            raise EngineUnavailable(self._unready_reason or "the engine is not running")
        try:
            self._engine_socket.send(protocol.encode(message))
        except zmq.ZMQError:  # the process has just died, unnoticed so far
            raise EngineUnavailable("the engine has just stopped") from None

    # --- start, supervision, stop ---------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine and return at once; `unready_reason` is None once it is up."""
        self._unready_reason = "the engine is loading the model"
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def stop(self, grace: float) -> None:
        """Let running sequences finish for at most `grace` seconds, then end the process."""
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            if self._unready_reason is None:
                with contextlib.suppress(EngineUnavailable, TimeoutError):
                    self.send(protocol.Drain())
                    await asyncio.wait_for(process.wait(), max(grace, 0.0))
            await _kill(process)
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._unready_reason = "the server is shutting down"
        self._on_lost(EngineUnavailable)
        self._context.destroy(linger=0)

    def _stop_requested(self) -> bool:
        return self._stopping

    async def _supervise(self) -> None:
        """Run one engine process after another until stopped or given up."""
        while not self._stop_requested():
            started = time.monotonic()
            try:
                with scratch(_SOCKET) as directory:
                    reason, retry = await self._run_process(directory / _SOCKET)
                counts = not self._is_training()
            except (OSError, zmq.ZMQError) as fault:  # no space for its socket, no memory for its process
                reason, retry = f"its process cannot be started: {fault}", True
                counts = not self._ever_loaded  # one that started before can start again
                await asyncio.sleep(_RETRY_SECONDS)
            except Exception as fault:  # a bug of ours, which would repeat at every restart
                log.exception("supervising the engine failed")
                reason, retry, counts = f"a fault in the server: {fault!r}", False, False
            self._process = self._engine_socket = None
            if self._stop_requested():
                return
            # A loaded engine that lived this long was healthy. Earlier deaths, and those without a served step, add up.
            if self._unready_reason is None and time.monotonic() - started > _SILENCE_SECONDS:
                self._deaths = 0
            self._deaths += counts
            if not retry or self._deaths >= _MAX_DEATHS:
                self._unready_reason = (
                    reason if not retry else f"the engine died {self._deaths} times in a row: {reason}"
                )
                self._on_lost(EngineDied)
                log.error("the engine will not be restarted: %s", self._unready_reason)
                self.failed_for_good.set()
                return
            self._unready_reason = f"the engine is being restarted ({reason})"
            self._on_lost(EngineDied)
            log.warning("%s", self._unready_reason)

    async def _run_process(self, socket: Path) -> tuple[str, bool]:
        """Run one process until it ends; return the reason for its end and whether to restart."""
        config = msgspec.structs.replace(self._config, address=f"ipc://{socket}")
        fatal: asyncio.Future[protocol.Fatal] = asyncio.get_running_loop().create_future()
        with contextlib.closing(_Socket(self._context, config.address, partial(self._receive, fatal))) as engine_socket:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "server.engine.process",
                str(os.getpid()),
                protocol.encode_config(config).decode(),
                stdin=asyncio.subprocess.DEVNULL,
                # torch's idle threads must sleep, not spin, or they take the cores from our own kernels' threads.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **CHILD_ENVIRONMENT},
            )
            self._process, self._engine_socket = process, engine_socket
            death = asyncio.create_task(process.wait())
            stall = asyncio.create_task(self._wait_for_stall())
            ends: set[asyncio.Future[Any]] = {fatal, death, stall}
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if fatal.done():  # the engine reported a fatal error
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(asyncio.shield(death), 5)
                    return fatal.result().message, fatal.result().retry
                if not death.done():
                    return stall.result(), True
                return f"engine process ended with status {process.returncode}", True
            finally:
                stall.cancel()
                await _kill(process)

    async def _wait_for_stall(self) -> str:
        """Return a reason once the engine has sent nothing for too long; while it loads, it sends nothing.

        Only time in which this process runs counts: if both processes were suspended, the engine has not stalled.
        """
        last_message_at, silence = self._last_message_at, 0.0
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            silence = silence + _WATCH_SECONDS if last_message_at == self._last_message_at else 0.0
            last_message_at = self._last_message_at
            if self._unready_reason is not None and silence >= self._start_seconds:
                return f"it was not loaded within {self._start_seconds:.0f} s (--engine-start-seconds)"
            if self._unready_reason is None and silence >= self._stall_seconds:
                return f"it sent no message for {self._stall_seconds:.0f} s (--engine-stall-seconds)"

    def _receive(self, fatal: asyncio.Future[protocol.Fatal], data: bytes) -> None:
        """Update the process's state from a message, and pass the message on."""
        self._last_message_at = time.monotonic()
        message = protocol.decode_reply(data)
        match message:
            case protocol.Step(outputs=outputs) if outputs:
                self._deaths = 0
            case protocol.Ready():
                self._unready_reason, self._ever_loaded = None, True
                log.info("%s", _summary(message))
            case protocol.Fatal():
                fatal.set_result(message)
        self._on_message(message)


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill the process, if it has not ended."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _summary(ready: Ready) -> str:
    """One log line about an engine that is up."""
    kinds = {linear.kind for linear in ready.linears.values()}  # rank rows only, as --adapter-bytes counts them
    rows = {kind: units for kind, units in ready.pool_rows.items() if kind in kinds}
    adapters = device_bytes(rows, ready.linears) / 2**20
    return (
        f"engine ready: {ready.architecture} on {ready.device} in {ready.dtype}, KV cache of "
        f"{ready.num_blocks * ready.block_size} tokens, {adapters:.0f} MiB for adapters, "
        f"{ready.kernels or 'unknown'} kernels"
    )


class _Socket:
    """The listening end of a ZeroMQ PAIR socket on the event loop; messages are passed on as they arrive.

    ZeroMQ's own asyncio sockets create several futures and callbacks per message. With an engine that reports every
    few milliseconds on busy cores, these were a third of the API process's CPU time.

    Args:
        address: the address to listen on.
        on_message: called with every message, on the running event loop. Its exceptions are logged.
    """

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", address: str, on_message: Callable[[bytes], None]
    ) -> None:
        self._on_message = on_message
        self._socket = context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._socket.bind(address)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._receive)

    def send(self, message: bytes) -> None:
        """Send a message without waiting. Raises `zmq.ZMQError` when the socket is closed or has no peer."""
        self._socket.send(message, zmq.NOBLOCK)
        # The descriptor is edge-triggered, and sending may have consumed an edge.
        self._loop.call_soon(self._receive)

    def close(self) -> None:
        """Stop receiving and sending. May be called twice."""
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
                self._on_message(message)
            except Exception:  # go on, or the messages behind it would wait for the next event
                log.exception("handling a message from the engine failed")
