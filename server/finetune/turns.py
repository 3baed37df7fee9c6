"""Positions of a chat's assistant turns in its rendered text.

`render(messages, add_generation_prompt=...)` is the chat template; it raises ValueError for messages that it refuses.
"""

import itertools
from collections.abc import Callable, Container, Iterable
from typing import Any

FEW_TURNS = 16
_REPETITION = 128  # most text rendered to find a chat's turns, in multiples of the chat


class HiddenTurn(ValueError):
    """The template hides the beginning of the turn named by the message."""


def trained_turns(
    messages: list[dict[str, Any]], trained: Iterable[int], render: Callable[..., str]
) -> list[tuple[str, int]]:
    """Return, for each trained message, the text up to and including it, and the position of its beginning."""
    turns: list[tuple[str, int]] = []
    for index in trained:
        before = render(messages[:index], add_generation_prompt=True)
        prefix = render(messages[: index + 1])
        start = len(before)
        if not prefix.startswith(before):
            # A generation prompt may end in text (`<think>`) that finished turns do not keep. The turn then begins
            # at the first difference, which must lie after all earlier messages.
            start = next(i for i, (a, b) in enumerate(zip(before, prefix + "\0", strict=False)) if a != b)
            if start <= len(render(messages[:index])):
                raise HiddenTurn(f"messages[{index}]")
        turns.append((prefix, start))
    return turns


def spans_by_exchange(
    rendered: str, messages: list[dict[str, Any]], trained: Container[int], render: Callable[..., str]
) -> list[tuple[int, int]] | None:
    """Return the spans of a long chat's trained turns, in time linear in its length.

    Each exchange, a user's message and its answers, is rendered by itself after the chat's system message. None when
    these texts do not add up to the whole chat's.
    """
    opening = next((i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), 0)
    first, *others = [i for i, message in enumerate(messages) if message["role"] == "user"] or [0]
    bounds = [opening, *(others if first == opening else [first, *others]), len(messages)]
    exchanges = list(itertools.pairwise(bounds))
    size = sum(len(message["content"]) for message in messages[:opening])
    if len(exchanges) < 2 or size * len(exchanges) > _REPETITION * len(rendered):
        return None
    spans: list[tuple[int, int]] = []
    texts: list[str] = []
    try:
        for begin, end in exchanges:
            part = messages[:opening] + messages[begin:end]
            texts.append(render(part))
        repeated = (sum(map(len, texts)) - len(rendered)) // (len(texts) - 1)  # length of the repeated opening
        if repeated < 0 or rendered != texts[0] + "".join(text[repeated:] for text in texts[1:]):
            return None
        position = 0
        for (begin, end), text in zip(exchanges, texts, strict=True):
            part = messages[:opening] + messages[begin:end]
            inside = [i - begin + opening for i in range(begin, end) if i in trained]
            if len(inside) > FEW_TURNS:
                return None
            for prefix, start in trained_turns(part, inside, render):
                if not text.startswith(prefix):
                    return None
                spans.append((position + start, position + len(prefix)))
            position += len(text) - repeated
    except ValueError:  # a template may refuse an exchange by itself
        return None
    return spans
