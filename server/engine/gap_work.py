"""Work in the gaps between inference steps: training, merging, and whatever else can wait.

A `GapWorker` does its work in pieces, each announced with its cost before it is run; `Gaps` decides which run when.
Beside requests every worker has a share of the device's time and a longest stall; without them, a piece runs at each
look around.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from server.messages.protocol import Reply, Request
from server.training.pacing import Pacer


class GapWorker(Protocol):
    """Work that runs in pieces short enough to fit between inference steps."""

    @property
    def handles(self) -> tuple[type, ...]:
        """The types of message that are for it."""

    def handle(self, message: Request) -> None:
        """Take a message of one of the types in `handles`."""

    @property
    def idle(self) -> bool:
        """Nothing is under way, in this thread or another."""

    @property
    def ready(self) -> bool:
        """There is a piece to run now."""

    @property
    def next_seconds(self) -> float:
        """About how long the next piece will take; 0 when nothing like it has run yet."""

    def run_piece(self) -> float:
        """Run the next piece; the seconds it took."""

    def take_replies(self) -> Sequence[Reply]:
        """Messages for the API process since the last call."""


class Gaps:
    """The gaps of one engine's loop.

    Args:
        workers: each with the pacer of its pieces.
    """

    def __init__(self, workers: Sequence[tuple[GapWorker, Pacer]]) -> None:
        self._workers = workers

    @property
    def idle(self) -> bool:
        """No worker has anything under way."""
        return all(worker.idle for worker, _ in self._workers)

    @property
    def ready(self) -> bool:
        """A worker has a piece to run now."""
        return any(worker.ready for worker, _ in self._workers)

    def handle(self, message: Request) -> None:
        """Hand a message to the workers that it is for, if any."""
        for worker, _ in self._workers:
            if isinstance(message, worker.handles):
                worker.handle(message)

    def fill(self, step_seconds: float, wait: Callable[[], None], *, busy: bool) -> list[Reply]:
        """Run what fits after a step that took so long; what the workers have to say.

        Args:
            wait: waits for the step in flight, for whose time a piece would be charged.
            busy: requests are there.
        """
        for worker, pacer in self._workers:
            if not busy:
                if worker.ready:
                    worker.run_piece()
            elif not worker.idle:
                pacer.served(step_seconds)
                while worker.ready and pacer.allows(worker.next_seconds):
                    wait()
                    pacer.spent(worker.run_piece())
        return [reply for worker, _ in self._workers for reply in worker.take_replies()]
