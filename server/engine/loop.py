"""The engine process's loop: receive messages, run steps, send outputs, and run gap work in between.

    receive messages -> schedule -> run -> send the outputs -> fill the gap

Gap work, such as training and merging, is done by a `GapWorker` in pieces, each with an estimated duration; `Gaps`
decides when they run. While there are requests, every worker has a share of the device's time and a longest stall;
otherwise one piece runs in each turn of the loop.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from server.engine.engine import Engine
from server.messages import protocol
from server.training.pacing import Pacer

HEARTBEAT_SECONDS = 1.0
LOADING_POLL_MS = 2  # poll interval for finished adapter loads while nothing else runs
WRITING_POLL_MS = 20  # the same for gap work in a thread, such as writing a checkpoint


class GapWorker(Protocol):
    """Work that runs in pieces short enough to fit between inference steps."""

    @property
    def handles(self) -> tuple[type, ...]:
        """The types of messages that this worker takes."""

    def handle(self, message: protocol.Request) -> None:
        """Process a message of one of the types in `handles`."""

    @property
    def idle(self) -> bool:
        """Whether nothing is in progress, in this thread or another."""

    @property
    def ready(self) -> bool:
        """Whether there is a piece to run now."""

    @property
    def next_seconds(self) -> float:
        """The estimated duration of the next piece; 0 if none of its kind has run yet."""

    def run_piece(self) -> float:
        """Run the next piece. Returns its duration in seconds."""

    def take_replies(self) -> Sequence[protocol.Reply]:
        """Return the messages for the API process since the last call."""


class Gaps:
    """Runs gap workers between the steps of one engine.

    Args:
        workers: each with the pacer of its pieces.
    """

    def __init__(self, workers: Sequence[tuple[GapWorker, Pacer]]) -> None:
        self._workers = workers
        self._active: list[tuple[GapWorker, Pacer]] = []  # workers with a message that is not finished yet

    @property
    def idle(self) -> bool:
        """Whether no worker has anything in progress."""
        return all(worker.idle for worker, _ in self._active)

    @property
    def ready(self) -> bool:
        """Whether a worker has a piece to run now."""
        return any(worker.ready for worker, _ in self._active)

    def handle(self, message: protocol.Request) -> None:
        """Pass a message to the workers that take its type, if any."""
        for pair in self._workers:
            if isinstance(message, pair[0].handles):
                pair[0].handle(message)
                if pair not in self._active:
                    self._active.append(pair)

    def fill(self, step_seconds: float, wait: Callable[[], None], *, busy: bool) -> list[protocol.Reply]:
        """Run the pieces that fit after a step of this duration. Returns the workers' replies.

        Args:
            wait: waits for the step in flight, since its time would be charged to a piece otherwise.
            busy: whether there are requests.
        """
        if not self._active:
            return []
        for worker, pacer in self._active:
            if not busy:
                if worker.ready:
                    worker.run_piece()
            elif not worker.idle:
                pacer.served(step_seconds)
                while worker.ready and pacer.allows(worker.next_seconds):
                    wait()
                    pacer.spent(worker.run_piece())
        replies = [reply for worker, _ in self._active for reply in worker.take_replies()]
        self._active = [pair for pair in self._active if pair[0].ready or not pair[0].idle]
        return replies


class Socket(Protocol):
    """The part of ZeroMQ's PAIR socket that the loop uses."""

    def poll(self, timeout: int) -> int:
        """Wait at most `timeout` milliseconds for a message. Returns nonzero if there is one."""

    def recv(self) -> bytes:
        """Receive the next message."""

    def send(self, data: bytes) -> object:
        """Send a message."""


class Loop:
    """Receives messages, runs steps and gap work, and sends outputs."""

    def __init__(self, engine: Engine, gaps: Gaps, socket: Socket) -> None:
        self._engine = engine
        self._gaps = gaps
        self._socket = socket
        self._draining = False
        self._last_sent = 0.0
        self._reported = (0, 0)  # sequences running and waiting, as last reported

    def run(self) -> None:
        """Serve until a `Drain` is received and all requests have finished."""
        self._send(self._engine.ready())
        while not (self._draining and self._engine.idle):
            self._take_messages()
            outputs, stats = self._engine.step()
            for done in self._engine.take_done():
                self._send(done)
            if outputs or self._is_reportable(stats) or time.monotonic() - self._last_sent > HEARTBEAT_SECONDS:
                self._send(protocol.Step(outputs=outputs, stats=stats))
                self._reported = (stats.running, stats.waiting)
            for reply in self._gaps.fill(stats.step_seconds, self._engine.wait, busy=self._engine.busy):
                self._send(reply)

    def _is_reportable(self, stats: protocol.Stats) -> bool:
        """Whether these statistics must be sent: their increments and changes are reported only once."""
        counted = stats.step_requests or stats.loads or stats.evictions
        changed = stats.adapters or stats.merges is not None
        return bool(counted or changed) or (stats.running, stats.waiting) != self._reported

    def _take_messages(self) -> None:
        """Process received messages, waiting for more only if there is nothing to compute."""
        if self._engine.busy or self._gaps.ready:
            timeout = 0
        elif self._engine.loading:
            timeout = LOADING_POLL_MS
        else:
            timeout = int(HEARTBEAT_SECONDS * 1e3) if self._gaps.idle else WRITING_POLL_MS
        while self._socket.poll(timeout):
            self._handle(protocol.decode_request(self._socket.recv()))
            timeout = 0

    def _handle(self, message: protocol.Request) -> None:
        self._gaps.handle(message)
        match message:
            case protocol.Generate():
                self._engine.add(message)
            case protocol.Abort():
                self._engine.abort(message.id)
            case protocol.Warm():
                self._engine.warm(message)
            case protocol.Pin():
                self._engine.pin(message)
            case protocol.Forget():
                self._engine.forget(message)
            case protocol.Inspect():
                self._send(self._engine.inspect(message.id))
            case protocol.Drain():
                self._draining = True

    def _send(self, message: protocol.Reply) -> None:
        self._last_sent = time.monotonic()
        self._socket.send(protocol.encode(message))
