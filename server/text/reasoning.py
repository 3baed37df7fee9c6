"""Thoughts in answers: what a model writes before it answers, between two marks that its family has for that."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from server.text.tools.grammar import as_lark
from server.text.tools.source import Parser, Reader, Source, Step

_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought")  # of messages, as templates name them


@dataclass(frozen=True)
class ReasoningFormat:
    """How a family of models thinks.

    Attributes:
        signs: texts by any of which a chat template is known to be of this format.
        begin, end: around a thought; the prompt may have begun it.
        close: `end` with what models write around it, to cut a thought short.
        silent: texts around the answer that are not part of it.
    """

    name: str
    signs: tuple[str, ...]
    begin: str
    end: str
    close: str
    silent: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        """Special tokens that have to be seen, if they are any."""
        return (self.begin, self.end, *self.silent)

    def written(self, thought: str) -> str:
        """A thought before its answer, for templates that know none."""
        between = self.close.partition(self.end)[0]
        return f"{self.begin}{between}{thought}{self.close}"


_TURN, _FINAL = "<|start|>assistant", "<|channel|>final<|message|>"
THINK = ReasoningFormat("think", ("<think>", "</think>"), "<think>", "</think>", "\n</think>\n\n")
# In the order in which a template is held against them.
_ALL = (
    ReasoningFormat("seed", ("<seed:think>",), "<seed:think>", "</seed:think>", "</seed:think>\n"),
    ReasoningFormat("minimax_m3", ("<mm:think>",), "<mm:think>", "</mm:think>", "</mm:think>"),
    ReasoningFormat("minicpm", ("<|thought_start|>",), "<|thought_start|>", "<|thought_end|>", "\n<|thought_end|>\n"),
    ReasoningFormat("mistral", ("[THINK]",), "[THINK]", "[/THINK]", "[/THINK]"),
    ReasoningFormat("gemma", ("<|channel>",), "<|channel>thought", "<channel|>", "\n<channel|>"),
    ReasoningFormat(
        "gpt_oss",
        ("<|channel|>analysis",),
        "<|channel|>analysis<|message|>",
        "<|end|>",
        f"<|end|>{_TURN}{_FINAL}",
        (_TURN, _FINAL),
    ),
    ReasoningFormat(
        "cohere",
        ("<|START_THINKING|>",),
        "<|START_THINKING|>",
        "<|END_THINKING|>",
        "<|END_THINKING|><|START_RESPONSE|>",
        ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    ReasoningFormat(
        "granite",
        ("Here is my thought process:",),
        "Here is my thought process:",
        "Here is my response:",
        "\n\nHere is my response:\n\n",
    ),
    ReasoningFormat(
        "granite_response",
        ("<response>",),
        "<think>",
        "</think>",
        "</think><response>",
        ("<response>", "</response>"),
    ),
    ReasoningFormat(
        "hunyuan",
        ("<answer>",),
        "<think>",
        "</think>",
        "\n</think>\n<answer>\n",
        ("<answer>", "</answer>"),
    ),
    THINK,
)
REASONING_FORMATS = {each.name: each for each in _ALL}
VLLM_NAMES = dict.fromkeys(("deepseek_r1", "deepseek_v3", "glm45", "kimi_k2", "olmo3", "qwen3"), "think") | {
    "gemma4": "gemma",
    "hunyuan_a13b": "hunyuan",
    "openai_gptoss": "gpt_oss",
    "seed_oss": "seed",
}


@lru_cache(64)
def reasoning_of(template: str) -> ReasoningFormat | None:
    """The format of a chat template's source; None where it knows no thoughts."""
    return next((each for each in _ALL if any(sign in template for sign in each.signs)), None)


def begun(reasoning: ReasoningFormat, prompt: str, continued: str | None = None) -> bool | None:
    """Whether a prompt ends within a thought; None where the answer may begin with one.

    Args:
        continued: the last message's text, where the answer goes on with that.
    """
    if continued is not None:
        _, opened, rest = continued.rpartition(reasoning.begin)
        return bool(opened) and reasoning.end not in rest
    tail = prompt.rstrip()
    return True if tail.endswith(reasoning.begin) else False if tail.endswith(reasoning.end) else None


def thinking(reasoning: ReasoningFormat, inside: bool | None, then: Reader) -> Reader:
    """A thought, if there is one, and the answer, which `then` reads; `inside` is as `begun` has it."""

    def reader(source: Source) -> Step[None]:
        source.silent = reasoning.silent
        source.thinking = inside
        if inside is None:
            source.attempt()
            yield from source.space()
            source.thinking = yield from source.follows(reasoning.begin)
        if source.thinking:
            yield from source.thought(reasoning.end)
        else:
            source.give_back()
        yield from then(source)

    return reader


def any_text(source: Source) -> Step[None]:
    """An answer without calls."""
    yield from source.text()


class ThoughtTokens:
    """Counts the tokens of an answer's thought, its marks included, and tells its text from the answer's."""

    def __init__(self, reasoning: ReasoningFormat, inside: bool | None) -> None:
        self._parser = Parser(thinking(reasoning, inside, any_text), {})
        self._parser.feed("")
        self._format = reasoning
        self.end = reasoning.end
        self._tokens = 0
        self._thought = False
        self._tail = ""  # the thought's last characters, which may begin its end
        self._held = ""  # what may be of either
        self._ended = self._answering = False

    def add(self, text: str) -> tuple[str, str]:
        """One more token, with the text that it completes. Returns what `split` does."""
        if self._parser.thinking is not False:
            self._tokens += 1
            self._thought |= bool(self._parser.thinking)
            self._parser.feed(text)
            self._thought |= bool(self._parser.thinking)
        return self.split(text)

    def split(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """What of the text up to here is thought, with marks and white space around, and what is answer."""
        if self._answering:
            return "", text
        text, self._held = self._held + text, ""
        if self._parser.thinking is None and not last:
            self._held = text
            return "", ""
        if not self._thought:
            self._answering = True
            return "", text
        if self._parser.thinking:
            self._tail = (self._tail + text)[1 - len(self.end) :]
            return text, ""
        start = 0
        if not self._ended:
            self._ended = True
            start = (self._tail + text).find(self.end) + len(self.end) - len(self._tail)
        answer = text[start:].lstrip()
        while mark := next((mark for mark in self._format.silent if answer.startswith(mark)), None):
            answer = answer[len(mark) :].lstrip()
        thought = text[: len(text) - len(answer)]
        if not last and (not answer or any(mark.startswith(answer) for mark in self._format.silent)):
            self._held = answer
            return thought, ""
        self._answering = True
        return thought, answer

    @property
    def count(self) -> int:
        """So far."""
        return self._tokens if self._thought else 0


def lark_of_thought(
    reasoning: ReasoningFormat, inside: bool | None, tokens: Mapping[str, int], stops: Collection[int]
) -> str:
    """Lark of a thought and of `@answer`, the grammar of what comes after it; empty where there is no thought.

    Args:
        tokens: that texts are split into before all others, such as special ones.
        stops: tokens that end an answer: no thought has these.
    """
    if inside is False:
        return ""
    end = tokens.get(reasoning.end)
    if end is None:
        pattern = re.escape(reasoning.end).replace("/", r"\/")
        thought = rf"thought[lazy]: /(.|\n)*{pattern}/"
    else:
        thought = f"thought: <[^{','.join(map(str, sorted({end, *stops})))}]>* <[{end}]>"
    opening = reasoning.close.partition(reasoning.end)[2]
    parts = [f"({as_lark(part, tokens)} SPACE)?" for part in reasoning.silent if part in opening]
    after = f"thought SPACE {' '.join(parts)} @answer"
    start = after if inside else f"begin {after} | @answer"
    lazy = "" if any(token in reasoning.begin for token in tokens) else "[lazy]"  # or free text would swallow it
    begin = f"begin{lazy}: {as_lark(reasoning.begin, tokens)}"
    return "\n".join(["%llguidance {}", f"start: {start}", begin, thought, r"SPACE: /[ \t\n]{0,4}/"]) + "\n"


def with_thoughts(chat: list[dict[str, Any]], template: str, reasoning: ReasoningFormat | None) -> list[dict[str, Any]]:
    """Messages whose `reasoning` stands where this template looks for it; in the text, where it looks nowhere."""
    known = [field for field in _FIELDS if re.search(rf"""\.{field}\b|["']{field}["']""", template)]
    for message in chat:
        thought = message.pop("reasoning", None)
        if not thought or reasoning is None:
            continue
        if known and reasoning.name != "mistral":
            message.update(dict.fromkeys(known, thought))
        else:
            message["content"] = reasoning.written(thought) + message["content"]
    return chat
