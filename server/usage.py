"""What each adapter was asked for since the server started: as many entries as there are adapters that were used."""

import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Usage:
    """Requests that named an adapter, tokens of their prompts and answers, and the Unix time of the last one."""

    requests: int = 0
    tokens: int = 0
    last_used: float | None = None


class AdapterUsage:
    """By name, and only for names that were resolved to a stored version."""

    def __init__(self) -> None:
        self._by_name: dict[str, Usage] = {}

    def begin(self, names: Sequence[str]) -> list[Usage]:
        """Count a request; the entries that its tokens go to."""
        entries = [self._by_name.setdefault(name, Usage()) for name in names]
        for entry in entries:
            entry.requests += 1
            entry.last_used = time.time()
        return entries

    def of(self, name: str) -> Usage:
        return self._by_name.get(name) or Usage()

    def forget(self, name: str) -> None:
        self._by_name.pop(name, None)
