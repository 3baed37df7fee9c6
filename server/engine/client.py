"""What the API process knows of an engine: an interface, and the local engine process behind it.

`EngineClient` is the only door. Its address may be remote and several engines may answer: another implementation.
"""

from collections.abc import AsyncIterator
from typing import Protocol

from server.engine.protocol import AdapterRef, Generate, Inspection, Output, Ready


class EngineUnavailable(Exception):
    """The engine died, is starting, or is draining: the request may be retried after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineClient(Protocol):
    """One engine, as the API process sees it."""

    @property
    def info(self) -> Ready | None:
        """What the engine serves. Set by the first `Ready` and kept while the engine restarts."""

    @property
    def pid(self) -> int | None:
        """The engine process now, or None while there is none."""

    @property
    def unready_reason(self) -> str | None:
        """None when the engine is loaded and making progress, else why it is not."""

    def generate(self, request: Generate) -> AsyncIterator[Output]:
        """Outputs of one sequence, the last with `finish_reason` or `error`. Closing the iterator aborts the sequence.

        Raises EngineUnavailable (from the first or any later step) when the engine is not there or dies meanwhile.
        """

    async def warm(self, adapter: AdapterRef) -> float:
        """Make the adapter resident; returns the seconds it took."""

    async def forget(self, digest: str) -> None:
        """Drop the adapter's rows and host copy once unused."""

    async def inspect(self) -> Inspection:
        """A fresh hash of the base and the accounting of blocks and rows."""

    async def start(self) -> None:
        """Start the engine and return at once; `unready_reason` tells when it is up."""

    async def stop(self, grace: float) -> None:
        """Let running sequences finish for at most `grace` seconds, then end the process."""
