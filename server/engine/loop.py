"""The engine process's loop: messages in, steps run, outputs out, and gap work in between.

    drain messages -> schedule -> run -> hand back what came out -> fill the gap

The socket may be anything that polls, receives and sends.
"""

import time
from typing import Protocol

from server.engine.engine import Engine
from server.engine.gap_work import Gaps
from server.messages import protocol

HEARTBEAT_SECONDS = 1.0
LOADING_POLL_MS = 2  # how soon a finished adapter load is noticed while nothing else runs
WRITING_POLL_MS = 20  # the same for what gap work has under way in a thread, as a checkpoint


class Socket(Protocol):
    """What the loop needs of ZeroMQ's PAIR socket."""

    def poll(self, timeout: int) -> int:
        """Wait at most so many milliseconds; whether a message is there."""

    def recv(self) -> bytes:
        """The next message."""

    def send(self, data: bytes) -> object:
        """Hand over a message."""


class Loop:
    """Messages in, steps run, outputs out; gap work in between."""

    def __init__(self, engine: Engine, gaps: Gaps, socket: Socket) -> None:
        self._engine = engine
        self._gaps = gaps
        self._socket = socket
        self._draining = False
        self._last_word = 0.0
        self._told = (0, 0)  # sequences running and waiting, as last reported

    def run(self) -> None:
        """Serve until told to drain and everything has finished."""
        self._send(self._engine.ready())
        while not (self._draining and self._engine.idle):
            self._take_messages()
            outputs, stats = self._engine.step()
            for done in self._engine.take_done():
                self._send(done)
            if outputs or self._is_news(stats) or time.monotonic() - self._last_word > HEARTBEAT_SECONDS:
                self._send(protocol.Step(outputs=outputs, stats=stats))
                self._told = (stats.running, stats.waiting)
            for reply in self._gaps.fill(stats.step_seconds, self._engine.wait, busy=self._engine.busy):
                self._send(reply)

    def _is_news(self, stats: protocol.Stats) -> bool:
        """Whether there is more to tell than that nothing happened; the increments among it are told once or never."""
        counted = stats.step_requests or stats.loads or stats.evictions
        changed = stats.adapters or stats.merges is not None
        return bool(counted or changed) or (stats.running, stats.waiting) != self._told

    def _take_messages(self) -> None:
        """Handle what has arrived; wait for more only when there is nothing to compute."""
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
        self._last_word = time.monotonic()
        self._socket.send(protocol.encode(message))
