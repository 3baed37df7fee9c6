"""The engine process's loop: messages in, steps run, outputs out, and training or merging in between.

    drain messages -> schedule -> run -> hand back what came out -> (train or merge a little)

Knows no sockets of any library: whatever polls, receives and sends will do.
"""

import time
from typing import Protocol

from server.engine.engine import Engine
from server.engine.merges import Merges
from server.messages import protocol
from server.messages.training import PlanMemory, StartJob, StopJob
from server.training.pacing import Pacer
from server.training.trainer import Trainer

HEARTBEAT_SECONDS = 1.0
LOADING_POLL_MS = 2  # how soon a finished adapter load is noticed while nothing else runs
WRITING_POLL_MS = 20  # the same for a checkpoint


class Socket(Protocol):
    """What the loop needs of ZeroMQ's PAIR socket."""

    def poll(self, timeout: int) -> int:
        """Wait at most so many milliseconds; whether a message is there."""

    def recv(self) -> bytes:
        """The next message."""

    def send(self, data: bytes) -> object:
        """Hand over a message."""


class Loop:
    """Messages in, steps run, outputs out; training and merging in between, each at its own pace."""

    def __init__(self, engine: Engine, trainer: Trainer, config: protocol.EngineConfig, socket: Socket) -> None:
        self._engine = engine
        self._trainer = trainer
        stall = config.finetune_max_stall_ms / 1e3
        self._training = Pacer(stall, config.finetune_share)
        self._merging = Pacer(stall, config.merge_share)
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
            if not self._trainer.idle:
                self._train(stats.step_seconds)
            if self._engine.merges.ready:
                self._fill_gap(self._engine.merges, self._merging, stats.step_seconds)
            for reply in self._engine.merges.take_replies():
                self._send(reply)

    def _is_news(self, stats: protocol.Stats) -> bool:
        """Whether there is more to tell than that nothing happened; the increments among it are told once or never."""
        counted = stats.step_requests or stats.loads or stats.evictions
        changed = stats.adapters is not None or stats.merges is not None
        return bool(counted) or changed or (stats.running, stats.waiting) != self._told

    def _take_messages(self) -> None:
        """Handle what has arrived; wait for more only when there is nothing to compute."""
        if self._engine.busy or self._trainer.ready or self._engine.merges.ready:
            timeout = 0
        elif self._engine.loading:
            timeout = LOADING_POLL_MS
        else:
            timeout = int(HEARTBEAT_SECONDS * 1e3) if self._trainer.idle else WRITING_POLL_MS
        while self._socket.poll(timeout):
            self._handle(protocol.decode_request(self._socket.recv()))
            timeout = 0

    def _handle(self, message: protocol.Request) -> None:
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
            case protocol.Merge():
                self._engine.merges.start(message)
            case protocol.Unmerge():
                self._engine.merges.stop(message)
            case protocol.Inspect():
                self._send(self._engine.inspect(message.id))
            case protocol.Drain():
                self._draining = True
            case StartJob():
                self._trainer.start(message)
            case StopJob():
                self._trainer.stop(message)
            case PlanMemory():
                self._send(self._trainer.plan_memory(message))

    def _train(self, step_seconds: float) -> None:
        self._fill_gap(self._trainer, self._training, step_seconds)
        for reply in self._trainer.take_replies():
            self._send(reply)

    def _fill_gap(self, worker: Trainer | Merges, pacer: Pacer, step_seconds: float) -> None:
        """Run what fits in here: beside requests a little, otherwise a piece before the next look around."""
        if not self._engine.busy:
            if worker.ready:
                worker.run_piece()
        else:
            pacer.served(step_seconds)
            while worker.ready and pacer.allows(worker.next_seconds):
                self._engine.wait()  # or the piece would be charged for a step in flight
                pacer.spent(worker.run_piece())

    def _send(self, message: protocol.Reply) -> None:
        self._last_word = time.monotonic()
        self._socket.send(protocol.encode(message))
