"""Where the assistant's turns of a chat lie in the text that the chat template makes of it.

`render(messages, add_generation_prompt=...)` is the template; it raises ValueError for messages that it refuses.
"""

import itertools
from collections.abc import Callable, Container, Iterable
from typing import Any

FEW_TURNS = 16
_REPETITION = 128  # how often as much as a chat may be rendered to find its turns


class HiddenTurn(ValueError):
    """The template hides where a turn begins, which the message names."""


def trained_turns(
    messages: list[dict[str, Any]], trained: Iterable[int], render: Callable[..., str]
) -> list[tuple[str, int]]:
    """For each trained message: the text up to and including it, and where it begins."""
    turns: list[tuple[str, int]] = []
    for index in trained:
        before = render(messages[:index], add_generation_prompt=True)
        through = render(messages[: index + 1])
        start = len(before)
        if not through.startswith(before):
            # A generation prompt may end in words put into the model's mouth (`<think>`) that no finished turn keeps.
            # The turn then begins where the two part, which must be behind all that came before it.
            start = next(i for i, (a, b) in enumerate(zip(before, through + "\0", strict=False)) if a != b)
            if start <= len(render(messages[:index])):
                raise HiddenTurn(f"messages[{index}]")
        turns.append((through, start))
    return turns


def spans_by_exchange(
    whole: str, messages: list[dict[str, Any]], trained: Container[int], render: Callable[..., str]
) -> list[tuple[int, int]] | None:
    """Where a long chat's trained turns lie, found in time that grows with its length.

    Each exchange, a user's message and the answers to it, is rendered by itself behind the chat's system message. None
    when these texts do not make up the whole one's.
    """
    opening = next((i for i, message in enumerate(messages) if message["role"] not in ("system", "developer")), 0)
    first, *others = [i for i, message in enumerate(messages) if message["role"] == "user"] or [0]
    bounds = [opening, *(others if first == opening else [first, *others]), len(messages)]
    exchanges = list(itertools.pairwise(bounds))
    size = sum(len(message["content"]) for message in messages[:opening])
    if len(exchanges) < 2 or size * len(exchanges) > _REPETITION * len(whole):
        return None
    spans: list[tuple[int, int]] = []
    texts: list[str] = []
    try:
        for begin, end in exchanges:
            part = messages[:opening] + messages[begin:end]
            texts.append(render(part))
        repeated = (sum(map(len, texts)) - len(whole)) // (len(texts) - 1)  # by each but the first: the opening
        if repeated < 0 or whole != texts[0] + "".join(text[repeated:] for text in texts[1:]):
            return None
        position = 0
        for (begin, end), text in zip(exchanges, texts, strict=True):
            part = messages[:opening] + messages[begin:end]
            inside = [i - begin + opening for i in range(begin, end) if i in trained]
            if len(inside) > FEW_TURNS:
                return None
            for through, start in trained_turns(part, inside, render):
                if not text.startswith(through):
                    return None
                spans.append((position + start, position + len(through)))
            position += len(text) - repeated
    except ValueError:  # a template may refuse an exchange alone
        return None
    return spans
