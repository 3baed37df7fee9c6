"""Trial compilation of requests' grammars, in a process that can be killed, before they reach an engine."""

import asyncio
import json
import logging
import math
from collections import OrderedDict
from hashlib import blake2b
from typing import Any

import msgspec

from server.children.helper import FORK_GRACE_SECONDS, HelperFailed, HelperLimit, HelperTimeout, forking_helpers
from server.errors import InvalidRequest, Unavailable, printable
from server.messages.protocol import INVALID_GRAMMAR, Grammar

_CACHE_SIZE = 1024  # answers, a few numbers each
_WALL_TIME_FACTOR = 4.0  # wall time per processor time of the limit, as a busy machine takes longer

log = logging.getLogger(__name__)


class GrammarChecker:
    """Checks of grammars: refuses those that do not compile, or not within the limits. `close` ends its processes.

    Args:
        seconds: limit of processor time for compiling.
        memory: limit of its memory, in bytes.
    """

    def __init__(self, seconds: float, memory: int) -> None:
        self._seconds = seconds
        self._memory = memory
        self._helpers = forking_helpers("grammar_check", _WALL_TIME_FACTOR * seconds, math.ceil(seconds), memory)
        self._answers: OrderedDict[bytes, dict[str, Any] | None] = OrderedDict()

    async def close(self) -> None:
        """End the processes."""
        await self._helpers.close()

    async def check(self, grammar: Grammar, param: str) -> Grammar:
        """Check a grammar and return it with its size.

        Args:
            param: the request's field with the grammar.

        Raises `InvalidRequest`, for a schema with the keyword and its path; `Unavailable` when the machine is too busy.
        """
        key = blake2b(msgspec.msgpack.encode(grammar)).digest()
        if key in self._answers:
            self._answers.move_to_end(key)
            answer = self._answers[key]
        else:
            # Half of the time is for the search of the culprit.
            order = {"grammar": msgspec.to_builtins(grammar), "seconds": self._seconds / 2}
            answer = None
            try:
                answer = await self._helpers.ask(
                    key.hex(), order, _WALL_TIME_FACTOR * self._seconds + FORK_GRACE_SECONDS
                )
            except HelperTimeout as timeout:  # not the grammar's fault
                log.warning("a grammar was not compiled: it %s", timeout)
                raise Unavailable(f"The server was too busy to compile `{param}`.", retry_after=5) from None
            except (HelperLimit, HelperFailed) as fault:
                if grammar.kind == "json":
                    answer = {"path": await asyncio.to_thread(_path_to_largest, grammar.text)}
                if isinstance(fault, HelperFailed):  # not remembered: it may succeed the next time
                    raise self._refusal(answer or {}, param) from None
            self._answers[key] = answer
            if len(self._answers) > _CACHE_SIZE:
                self._answers.popitem(last=False)
        if answer is not None and "size" in answer:
            return msgspec.structs.replace(grammar, size=answer["size"])
        raise self._refusal(answer or {}, param)

    def _refusal(self, answer: dict[str, Any], param: str) -> InvalidRequest:
        path = answer.get("path") or []
        limits = f"{self._seconds:g} s (--grammar-seconds), {self._memory >> 20} MiB (--grammar-bytes)"
        reason = answer.get("error") or f"it takes more than is allowed to compile: {limits}"
        place = f" at `{printable('/' + '/'.join(path))}`" if path else ""
        where = ".".join([param, *path])[:200]
        return InvalidRequest(
            f"`{param}` is not supported{place}: {printable(reason)}", param=where, code=INVALID_GRAMMAR
        )


def _path_to_largest(text: str) -> list[str]:
    """Return the path to the part of a schema that makes it large; empty if the schema is nested too deep to parse."""
    path: list[str] = []
    try:
        part: Any = json.loads(text)
        while isinstance(part, dict | list) and part:
            members = list(part.items()) if isinstance(part, dict) else list(enumerate(part))
            sizes = [len(json.dumps(m) if isinstance(m, dict | list) else str(m)) for _, m in members]
            largest = max(range(len(members)), key=sizes.__getitem__)
            if sizes[largest] * 2 < sum(sizes):
                break
            key, part = members[largest]
            path.append(str(key))
    except RecursionError:
        return []
    return path
