"""Thoughts: text that a model writes before its answer, between two marks of its family's reasoning format."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from server.text.tools.grammar import as_lark
from server.text.tools.source import Parser, Reader, Source, Step

_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought")  # templates' names for a message's thought


@dataclass(frozen=True)
class ReasoningFormat:
    """The format in which a family of models writes thoughts.

    Attributes:
        signs: texts, any of which in a chat template identifies the format.
        begin, end: marks around a thought; `begin` may be the prompt's end.
        close: `end` with its usual surroundings, for ending a thought early.
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
        """Texts of the marks; those that are special tokens must be decoded."""
        return (self.begin, self.end, *self.silent)

    def as_text(self, thought: str) -> str:
        """Return a thought as text in front of its answer, for templates without thoughts."""
        between = self.close.partition(self.end)[0]
        return f"{self.begin}{between}{thought}{self.close}"


_TURN, _FINAL = "<|start|>assistant", "<|channel|>final<|message|>"
THINK = ReasoningFormat("think", ("<think>", "</think>"), "<think>", "</think>", "\n</think>\n\n")
# In the order of matching.
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
    """Return the format of a chat template's source; None for a template without thoughts."""
    return next((each for each in _ALL if any(sign in template for sign in each.signs)), None)


def ends_in_thought(reasoning: ReasoningFormat, prompt: str, continued: str | None = None) -> bool | None:
    """Whether a prompt ends within a thought; None if the answer may begin with one.

    Args:
        continued: the text of the last message, if the answer continues it.
    """
    if continued is not None:
        _, opened, rest = continued.rpartition(reasoning.begin)
        return bool(opened) and reasoning.end not in rest
    tail = prompt.rstrip()
    return True if tail.endswith(reasoning.begin) else False if tail.endswith(reasoning.end) else None


def thought_reader(reasoning: ReasoningFormat, inside: bool | None, answer_reader: Reader) -> Reader:
    """Return a reader of an optional thought, and of the answer. `inside`: the result of `ends_in_thought`."""

    def reader(source: Source) -> Step[None]:
        source.silent = reasoning.silent
        source.thinking = inside
        if inside is None:
            source.attempt()
            yield from source.space()
            source.thinking = yield from source.read_if(reasoning.begin)
        if source.thinking:
            yield from source.thought(reasoning.end)
        else:
            source.abandon_call()
        yield from answer_reader(source)

    return reader


def any_text(source: Source) -> Step[None]:
    """Read an answer without calls."""
    yield from source.text()


class ThoughtTokens:
    """The count of the tokens of an answer's thought, marks included, and the split of its text from the answer's."""

    def __init__(self, reasoning: ReasoningFormat, inside: bool | None) -> None:
        self._parser = Parser(thought_reader(reasoning, inside, any_text), {})
        self._parser.feed("")
        self._format = reasoning
        self.end = reasoning.end
        self._tokens = 0
        self._thought = False
        self._tail = ""  # the thought's last characters, possibly the beginning of its end mark
        self._held = ""  # text not yet assigned to thought or answer
        self._ended = self._answering = False

    def add(self, text: str) -> tuple[str, str]:
        """Add a token with the text that it completes. Returns the result of `split`."""
        if self._parser.thinking is not False:
            self._tokens += 1
            self._thought |= bool(self._parser.thinking)
            self._parser.feed(text)
            self._thought |= bool(self._parser.thinking)
        return self.split(text)

    def split(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """Split text, with any held before, into thought (with its marks and white space) and answer."""
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
        """Tokens of the thought so far."""
        return self._tokens if self._thought else 0


def thought_grammar(
    reasoning: ReasoningFormat, inside: bool | None, tokens: Mapping[str, int], stops: Collection[int]
) -> str:
    """Return the Lark grammar of a thought followed by `@answer`, the answer's grammar; empty without a thought.

    Args:
        tokens: added tokens by text, such as special ones, which tokenising matches first.
        stops: tokens that end an answer, not allowed in a thought.
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
    """Move messages' `reasoning` to the fields that this template reads, or into the text if it reads none."""
    known = [field for field in _FIELDS if re.search(rf"""\.{field}\b|["']{field}["']""", template)]
    for message in chat:
        thought = message.pop("reasoning", None)
        if not thought or reasoning is None:
            continue
        if known and reasoning.name != "mistral":
            message.update(dict.fromkeys(known, thought))
        else:
            message["content"] = reasoning.as_text(thought) + message["content"]
    return chat
