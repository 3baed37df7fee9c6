"""Queue limits and draining.

A request beyond a limit is refused at once, with an estimate of the time to retry. It is accepted nevertheless while
its tenant has less than an even share of the limit waiting, so that no tenant can fill the queue for others.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar

from adapters.background import thread_pool
from server.errors import InvalidRequest, TooManyRequests
from server.tenants.limits import NO_ROWS, Allowance, Rows

_LONGEST_RETRY = 60
_SLOT_SECONDS = 30.0


# Set in the task of a background request: no limit of the queue counts it, and it runs in steps without clients'.
BACKGROUND: ContextVar[bool] = ContextVar("background", default=False)


class Ticket:
    """One sequence's place in the queue, given back by `leave` at its first output or its end, and its place among its
    tenant's running sequences, given back by `end`.
    """

    def __init__(
        self,
        admission: "Admission",
        tenant: str,
        tokens: int,
        allowance: Allowance | None = None,
        adapters: Iterable[str] = (),
        *,
        waiting: bool = True,
    ) -> None:
        self._admission = admission
        self._tenant = tenant
        self._tokens = tokens
        self._allowance = allowance
        self._adapters = adapters
        self._since = time.monotonic()
        self._waiting = waiting

    def leave(self, *, served: bool) -> None:
        """Stop counting as waiting. Further calls do nothing. `served`: use this wait to estimate those of others."""
        if self._waiting:
            self._waiting = False
            self._admission._left(self._tenant, self._tokens, time.monotonic() - self._since if served else None)

    def end(self) -> None:
        """Count the end of the sequence. Further calls do nothing."""
        self.leave(served=False)
        if self._allowance is not None:
            self._allowance.end(self._adapters)
            self._allowance = None


class Admission:
    """The two limits on the queue, of sequences and of prompt tokens, and the counts against them."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._requests: Counter[str] = Counter()  # sequences of each tenant
        self._tokens: Counter[str] = Counter()
        self._typical_wait = 1.0  # seconds; a moving average

    @property
    def requests(self) -> int:
        """Waiting sequences."""
        return self._requests.total()

    @property
    def tokens(self) -> int:
        """Prompt tokens of waiting sequences."""
        return self._tokens.total()

    def check_size(self, sequences: int, param: str = "n") -> None:
        """Raise `InvalidRequest` for a request of more sequences than the limit."""
        if sequences > self._max_requests:
            raise InvalidRequest(
                f"This request asks for {sequences} sequences; at most {self._max_requests} are accepted.", param=param
            )

    def enter(
        self,
        prompt_lengths: Sequence[int],
        tenant: str = "",
        allowance: Allowance | None = None,
        prompt_tokens: int = 0,
        rows: Rows = NO_ROWS,
    ) -> list[Ticket]:
        """Admit a request; return a ticket for each of its sequences.

        Args:
            allowance: its tenant's; `prompt_tokens` and `rows` are counted against it.

        Raises `InvalidRequest` when the request alone exceeds the limit of sequences, `TooManyRequests` when there is
        no room now. With an empty queue, prompt tokens never refuse a request.
        """
        count, tokens = len(prompt_lengths), sum(prompt_lengths)
        self.check_size(count)
        if BACKGROUND.get():
            return [Ticket(self, tenant, length, waiting=False) for length in prompt_lengths]
        if allowance is not None and not allowance.limited:
            allowance = None
        if allowance is not None:
            allowance.check(count, prompt_tokens, rows)
        tenants = len(self._requests.keys() | {tenant})
        if self.requests + count > self._max_requests and self._requests[tenant] + count > self._max_requests / tenants:
            raise self._full(f"{self.requests} sequences are waiting; at most {self._max_requests} may.")
        own = self._tokens[tenant]
        if own and self.tokens + tokens > self._max_tokens and own + tokens > self._max_tokens / tenants:
            raise self._full(f"{self.tokens} prompt tokens are waiting; at most {self._max_tokens} may.")
        self._requests[tenant] += count
        self._tokens[tenant] += tokens
        if allowance is not None:
            allowance.take(count, prompt_tokens, rows)
        return [Ticket(self, tenant, length, allowance, rows) for length in prompt_lengths]

    def _left(self, tenant: str, tokens: int, waited: float | None) -> None:
        self._requests[tenant] -= 1
        self._tokens[tenant] -= tokens
        if not self._requests[tenant]:
            del self._requests[tenant], self._tokens[tenant]
        if waited is not None:
            self._typical_wait += 0.2 * (waited - self._typical_wait)

    def _full(self, message: str) -> TooManyRequests:
        retry_after = min(max(math.ceil(self._typical_wait), 1), _LONGEST_RETRY)
        return TooManyRequests(message, retry_after=retry_after)


class UploadSlots:
    """The slots for concurrent uploads, and one thread for each, which writes it to disk."""

    def __init__(self, count: int) -> None:
        self.threads = thread_pool(count, "upload", "normal")
        self._count = count
        self._free = asyncio.Semaphore(count)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Take a slot. Raises TooManyRequests when none becomes free for a while."""
        try:
            async with asyncio.timeout(_SLOT_SECONDS):
                await self._free.acquire()
        except TimeoutError:
            message = f"{self._count} uploads are being received already."
            raise TooManyRequests(message, retry_after=int(_SLOT_SECONDS)) from None
        try:
            yield
        finally:
            self._free.release()


class Drain:
    """The count of open requests, and whether new ones are refused."""

    def __init__(self) -> None:
        self.draining = False
        self.open_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def begin(self) -> None:
        """Refuse new requests from now on."""
        self.draining = True

    def enter(self) -> None:
        self.open_requests += 1
        self._idle.clear()

    def leave(self) -> None:
        self.open_requests -= 1
        if not self.open_requests:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until no request is open."""
        await self._idle.wait()
