"""A program that compiles untrusted grammars: some take all memory, some overflow the stack.

An answer is `{"size": bytes taken}`, or `{"error": reason, "path": path to the culprit in a JSON Schema}`.
"""

import contextlib
import json
import os
import resource
import time
from collections.abc import Callable
from typing import Any

import msgspec
from llguidance import LLMatcher, LLTokenizer

from server.children.forked import serve_forked
from server.messages.grammar_definition import LIMITS, definition
from server.messages.protocol import Grammar

_BYTES = LLTokenizer("byte")
_SEARCHED_LAST = ("$defs", "definitions")  # members that others refer to are searched last


def _run_order(order: dict[str, Any]) -> dict[str, Any]:
    grammar = msgspec.convert(order["grammar"], Grammar)
    start = time.monotonic()
    before = _resident()
    error = _error(grammar)
    if error is None:
        return {"size": max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)}
    answer: dict[str, Any] = {"error": " ".join(error.split())}
    if grammar.kind == "json":
        with contextlib.suppress(TimeoutError):
            answer["path"] = culprit(json.loads(grammar.text), _refusal_test(error, start + order["seconds"]))
    return answer


def _resident() -> int:
    with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _error(grammar: Grammar) -> str | None:
    try:
        defined = definition(grammar)
        if grammar.kind in ("lark", "structural_tag"):  # may name tokens of the model
            return LLMatcher.validate_grammar(defined, limits=LIMITS) or None
        return _error_at_start(LLMatcher(_BYTES, defined, log_level=0, limits=LIMITS))
    except (ValueError, TypeError, KeyError, AssertionError, RecursionError) as fault:
        return f"{fault}" or type(fault).__name__


def _error_at_start(matcher: LLMatcher) -> str | None:
    """Return the reason why no text can begin under the grammar, found by computing the first mask; None if one can."""
    if matcher.is_error():
        return matcher.get_error()
    matcher.consume_tokens(matcher.compute_ff_tokens())
    if not matcher.is_stopped():
        matcher.compute_logit_bias()
    return "no text fits it, or none that ends" if matcher.is_error() else None


def _refusal_test(error: str, until: float) -> Callable[[Any], bool]:
    """Return a test whether a schema is refused for the same reason; it raises TimeoutError after `until`."""
    kind = error.partition(":")[0].split("'")[0]

    def is_refused(schema: Any) -> bool:
        if time.monotonic() > until:
            raise TimeoutError
        found = _error(Grammar("json", json.dumps(schema)))
        return found is not None and found.startswith(kind)

    return is_refused


def culprit(schema: Any, is_refused: Callable[[Any], bool]) -> list[str]:
    """Return the path to the first part that makes a schema refused: refused with it and the parts before it, accepted
    without it."""
    path: list[str] = []
    part = schema
    while isinstance(part, dict | list) and part:
        members = _members(part)
        fewest, most = 0, len(members)  # bounds of the number of leading members that are refused
        while fewest < most:
            count = (fewest + most) // 2
            _keep(part, members[:count])
            if is_refused(schema):
                most = count
            else:
                fewest = count + 1
        _keep(part, members[:fewest])
        if not fewest:
            break
        key, part = members[fewest - 1]
        path.append(str(key))
    return path


def _members(part: dict[str, Any] | list[Any]) -> list[tuple[Any, Any]]:
    """Return the part's members with their keys, scalars first, since these determine the meaning of the others."""
    if isinstance(part, list):
        return list(enumerate(part))
    return sorted(part.items(), key=lambda item: (item[0] in _SEARCHED_LAST, isinstance(item[1], dict | list)))


def _keep(part: dict[str, Any] | list[Any], members: list[tuple[Any, Any]]) -> None:
    if isinstance(part, list):
        part[:] = [member for _, member in members]
    else:
        part.clear()
        part.update(members)


if __name__ == "__main__":
    serve_forked(lambda order: {"answer": _run_order(order)})
