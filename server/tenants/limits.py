"""One tenant's limits: on running work, on rates per minute, and on rows on the device."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from operator import itemgetter
from types import MappingProxyType

import msgspec

from server.errors import PermissionDenied, TooManyRequests

_MINUTE = 60.0
Rows = Mapping[str, Mapping[str, int]]  # digest of an adapter -> its rows on the device, by module kind
NO_ROWS: Rows = MappingProxyType({})
RATE_HEADERS = [
    f"x-ratelimit-{kind}-{unit}" for unit in ("requests", "tokens") for kind in ("limit", "remaining", "reset")
]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of one tenant; None: no limit but the server's."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt and generated tokens
    running: int | None = None  # concurrent sequences
    device_rows: int | None = None  # of its adapters on the device, for each module kind
    stored_bytes: int | None = None  # adapters, files and kept responses
    training_jobs: int | None = None  # unfinished jobs
    training_tokens_per_day: int | None = None  # checked when a job is created; running jobs continue
    weight: float = 1.0  # of its share of the engine, relative to other tenants


UNLIMITED = Limits()


class _Bucket:
    """A token bucket that holds one minute's amount. Its level may be negative: a response's length is known only once
    it has finished."""

    def __init__(self, per_minute: int) -> None:
        self.limit = per_minute
        self._level = float(per_minute)
        self._since = time.monotonic()

    def level(self) -> float:
        now = time.monotonic()
        self._level = min(self.limit, self._level + (now - self._since) * self.limit / _MINUTE)
        self._since = now
        return self._level

    def take(self, amount: float) -> None:
        self._level = self.level() - amount

    def wait_seconds(self, amount: float) -> float:
        """Return the seconds until this amount is available."""
        return max(0.0, amount - self.level()) * _MINUTE / self.limit


class Allowance:
    """The rest of a tenant's limits. Used on the event loop.

    Attributes:
        limited: whether requests are limited at all.
    """

    def __init__(self, limits: Limits = UNLIMITED) -> None:
        self.running = 0
        self._users: Counter[str] = Counter()  # running sequences by digest of the adapter
        self._rows: dict[str, Mapping[str, int]] = {}  # of these adapters
        self.set(limits)

    def set(self, limits: Limits) -> None:
        """Replace the limits and refill the buckets; running sequences stay counted."""
        self.limits = limits
        each = {"requests": limits.requests_per_minute, "tokens": limits.tokens_per_minute}
        self._buckets = {name: _Bucket(limit) for name, limit in each.items() if limit is not None}
        self.limited = bool(self._buckets) or limits.running is not None or limits.device_rows is not None

    def check(self, sequences: int, prompt_tokens: int, rows: Rows = NO_ROWS) -> None:
        """Raise TooManyRequests for a request beyond a limit at present, and the errors of `check_rows`."""
        self.check_rows(rows)
        running = self.limits.running
        if running is not None and self.running and self.running + sequences > running:
            raise self._too_many(f"{self.running} sequences are under way; your limit is {running}.", 1)
        wanted = {"requests": 1, "tokens": prompt_tokens}
        for name, bucket in self._buckets.items():
            if wait := bucket.wait_seconds(min(wanted[name], bucket.limit)):
                raise self._too_many(f"Your limit is {bucket.limit} {name} per minute.", wait)

    def check_rows(self, rows: Rows) -> None:
        """Check that these adapters' rows fit the limit, together with those of running requests' adapters.

        Raises TooManyRequests when they do not fit now, PermissionDenied when they never can.
        """
        limit = self.limits.device_rows
        if limit is None or not rows:
            return
        kind, count = _largest(rows)
        if count > limit:
            message = f"This adapter and those that you have pinned take {count} rows of {kind} on the device;"
            raise PermissionDenied(f"{message} your limit is {limit}.", code="device_rows_exceeded")
        kind, count = _largest({**self._rows, **rows})
        if count > limit:
            message = f"With adapters that you use at present this one takes {count} rows of {kind} on the device;"
            raise self._too_many(f"{message} your limit is {limit}.", 1)

    def take(self, sequences: int, prompt_tokens: int, rows: Rows = NO_ROWS) -> None:
        """Count a starting request; each of its sequences must `end`."""
        self._rows.update(rows)
        for digest in rows:
            self._users[digest] += sequences
        self.running += sequences
        for name, bucket in self._buckets.items():
            bucket.take(prompt_tokens if name == "tokens" else 1)

    def end(self, adapters: Iterable[str]) -> None:
        """Count the end of one sequence of a request with these adapters."""
        self.running -= 1
        for digest in adapters:
            self._users[digest] -= 1
            if not self._users[digest]:
                del self._users[digest], self._rows[digest]

    def spend(self, tokens: int) -> None:
        """Count generated tokens."""
        if "tokens" in self._buckets:
            self._buckets["tokens"].take(tokens)

    def headers(self) -> dict[str, str]:
        """Return OpenAI's rate limit headers, for the limits that are set."""
        found = {}
        for name, bucket in self._buckets.items():
            found[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
            found[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level())))
            found[f"x-ratelimit-reset-{name}"] = f"{bucket.wait_seconds(bucket.limit):.3f}s"
        return found

    def _too_many(self, message: str, seconds: float) -> TooManyRequests:
        return TooManyRequests(message, retry_after=max(1, math.ceil(seconds)))


def _largest(rows: Rows) -> tuple[str, int]:
    """Return the module kind of which these adapters take the most rows together, and the number of rows."""
    sums = Counter[str]()
    for each in rows.values():
        sums.update(each)
    return max(sums.items(), key=itemgetter(1), default=("", 0))
