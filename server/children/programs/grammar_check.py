"""A program that compiles grammars which nobody vouches for: some take all memory, some overflow the stack.

An answer is `{"size": bytes that it took}`, or `{"error": why it cannot be, "path": of the culprit in a JSON Schema}`.
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
from server.children.programs.grammar_culprit import culprit, keywords_of
from server.messages.grammar_definition import LIMITS, definition
from server.messages.protocol import Grammar

_BYTES = LLTokenizer("byte")


def _carry_out(order: dict[str, Any]) -> dict[str, Any]:
    grammar = msgspec.convert(order["grammar"], Grammar)
    begun = time.monotonic()
    before = _resident()
    error = _error(grammar)
    if error is None:
        return {"size": max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)}
    answer: dict[str, Any] = {"error": _told(" ".join(error.split()))}
    if grammar.kind == "json":
        with contextlib.suppress(TimeoutError):
            is_refused = _is_refused_like(error, begun + order["seconds"])
            answer["path"] = culprit(json.loads(grammar.text), is_refused, keywords_of(error))
    return answer


def _told(error: str) -> str:
    """In words for those who wrote the schema: they have no options of llguidance's."""
    if error.startswith("oneOf constraints"):
        return "oneOf: branches that may overlap cannot be told apart; anyOf can be followed"
    return error


def _resident() -> int:
    with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _error(grammar: Grammar) -> str | None:
    try:
        defined = definition(grammar)
        if grammar.kind in ("lark", "structural_tag"):  # which may name tokens of the model
            return LLMatcher.validate_grammar(defined, limits=LIMITS) or None
        return _error_at_start(LLMatcher(_BYTES, defined, log_level=0, limits=LIMITS))
    except (ValueError, TypeError, KeyError, AssertionError, RecursionError) as fault:
        return f"{fault}" or type(fault).__name__


def _error_at_start(matcher: LLMatcher) -> str | None:
    """Why no answer can begin; it is found out where one would."""
    if matcher.is_error():
        return matcher.get_error()
    matcher.consume_tokens(matcher.compute_ff_tokens())
    if not matcher.is_stopped():
        matcher.compute_logit_bias()
    return "no text fits it, or none that ends" if matcher.is_error() else None


def _is_refused_like(error: str, until: float) -> Callable[[Any], bool]:
    """Whether a schema is refused for the same reason; raises TimeoutError when there is no time left to say."""
    kind, keywords = error.partition(":")[0].split("'")[0], set(keywords_of(error))

    def is_refused(schema: Any) -> bool:
        if time.monotonic() > until:
            raise TimeoutError
        found = _error(Grammar("json", json.dumps(schema)))
        if found is None or not keywords:
            return found is not None and found.startswith(kind)
        return not keywords.isdisjoint(keywords_of(found))

    return is_refused


if __name__ == "__main__":
    serve_forked(lambda order: {"answer": _carry_out(order)})
