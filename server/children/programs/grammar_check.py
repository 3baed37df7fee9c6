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
from server.children.programs.grammar_culprit import culprit, keywords_of
from server.messages.grammar_definition import LIMITS, definition
from server.messages.protocol import Grammar

_BYTES = LLTokenizer("byte")


def _run_order(order: dict[str, Any]) -> dict[str, Any]:
    grammar = msgspec.convert(order["grammar"], Grammar)
    start = time.monotonic()
    before = _resident()
    error = _error(grammar)
    if error is None:
        return {"size": max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)}
    answer: dict[str, Any] = {"error": _reworded(" ".join(error.split()))}
    if grammar.kind == "json":
        with contextlib.suppress(TimeoutError):
            is_refused = _refusal_test(error, start + order["seconds"])
            answer["path"] = culprit(json.loads(grammar.text), is_refused, keywords_of(error))
    return answer


def _reworded(error: str) -> str:
    """Reword an error for the author of the schema, without llguidance's options."""
    if error.startswith("oneOf constraints"):
        return "oneOf: branches that may overlap cannot be told apart; anyOf can be followed"
    return error


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
    serve_forked(lambda order: {"answer": _run_order(order)})
