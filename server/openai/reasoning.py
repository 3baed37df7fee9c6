"""Thoughts in one request's answers: reading, exemption from the answer's grammar, counting, limits."""

from collections.abc import Collection
from dataclasses import dataclass

import msgspec

from server.messages.protocol import Grammar, ThoughtBudget
from server.text.processor import TextProcessor
from server.text.reasoning import ReasoningFormat, ThoughtTokens, ends_in_thought, thought_grammar, thought_reader
from server.text.tools.source import Reader

_ANY_TEXT = Grammar("lark", "%llguidance {}\nstart: <[*]>*\n")


@dataclass(frozen=True)
class Thinking:
    """Handling of thoughts in the answers to one prompt.

    Attributes:
        inside: whether the prompt ends within a thought; None if the answer may begin with one.
        stops: tokens that end an answer.
    """

    text: TextProcessor
    format: ReasoningFormat
    inside: bool | None
    stops: Collection[int]

    @classmethod
    def for_prompt(
        cls, text: TextProcessor, reasoning: ReasoningFormat, prompt: str, continued: str | None
    ) -> "Thinking | None":
        """Return it for a prompt, with its last message's text if continued; None if the answers cannot think."""
        inside = ends_in_thought(reasoning, prompt, continued)
        return None if inside is False else cls(text, reasoning, inside, list(text.stop_tokens))

    def reader(self, answer_reader: Reader) -> Reader:
        """Return a reader of the thought, followed by `answer_reader`."""
        return thought_reader(self.format, self.inside, answer_reader)

    def counter(self) -> ThoughtTokens:
        """Return a counter of one answer's thought tokens."""
        return ThoughtTokens(self.format, self.inside)

    async def grammar(
        self, answer: Grammar | None, max_tokens: int | None
    ) -> tuple[Grammar | None, ThoughtBudget | None]:
        """Return the grammar of thought and answer, and the thought's budget of `max_tokens` tokens if set."""
        if answer is not None:
            tokens = {token: id_ for id_, token in self.text.added_tokens.items()}
            lark = thought_grammar(self.format, self.inside, tokens, self.stops)
            answer = msgspec.structs.replace(answer, thought=lark)
        if max_tokens is None:
            return answer, None
        close = self.format.close
        [ids] = await self.text.encode([close], add_special_tokens=False, max_tokens=len(close), param="messages")
        begin = "" if self.inside else self.format.begin
        return answer or _ANY_TEXT, ThoughtBudget(max_tokens, begin, self.format.end, ids)
