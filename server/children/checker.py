"""Uploads are checked in processes of their own: a thread would hold the interpreter while those served wait for it."""

from collections.abc import Callable
from typing import TypeVar, get_type_hints

from adapters.background import Priority
from adapters.peft_format.fields import AdapterError
from server.children.helper import WORK, HelperLimit, Helpers

_PROCESSES = 2

A = TypeVar("A")
T = TypeVar("T")


class Checker(Helpers):
    """Runs functions of `adapters.offline.check`, each for `seconds` at most and in `memory` bytes."""

    def __init__(self, priority: Priority, memory: int, seconds: float) -> None:
        super().__init__(_PROCESSES, WORK, priority=priority, memory=memory)
        self._seconds = seconds

    async def run(self, key: str, function: Callable[[A], T], order: A, param: str) -> T:
        """What `function(order)` returns, in `key`'s turn; whoever is cancelled ends the work.

        Raises AdapterError, of `param` when it takes too much; OSError; HelperFailed.
        """
        named = {"function": f"{function.__module__}.{function.__qualname__}", "order": order}
        try:
            result: T = await self.ask(key, named, self._seconds, get_type_hints(function)["return"])
        except HelperLimit as limit:
            message = f"checking it {limit} (--adapter-check-seconds, --adapter-check-bytes)"
            raise AdapterError(message, param, "adapter_too_large") from None
        return result
