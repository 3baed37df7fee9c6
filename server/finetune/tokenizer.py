"""The served model's tokenizer for data sets: synchronous, for worker threads."""

from collections.abc import Sequence
from typing import Any

from server.text.chat_template import TemplateRefusal
from server.text.processor import TextProcessor
from server.text.reasoning import THINK


class TrainingTokenizer:
    """`dataset.Tokenizer` over the text processor that also serves requests.

    Args:
        eos_token_ids: the engine's end-of-text tokens, the usual one first.

    Attributes:
        eos_token_ids: every token that ends an answer in serving.
        special_tokens: the tokenizer's added tokens, and their texts.
    """

    def __init__(self, text: TextProcessor, eos_token_ids: Sequence[int]) -> None:
        # A template without thoughts gets them as text.
        self._text = text = text if text.reasoning_format is not None else text.with_formats(None, THINK.name)
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *text.stop_tokens]))
        self.special_tokens = text.added_tokens

    @property
    def formats(self) -> tuple[str | None, str | None]:
        tools, reasoning = self._text.tool_format, self._text.reasoning_format
        return tools.name if tools else None, reasoning.name if reasoning else None

    @property
    def markers(self) -> tuple[str, ...]:
        known = self._text.tool_format, self._text.reasoning_format
        return tuple(marker for each in known if each is not None for marker in each.markers)

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[dict[str, Any]] = (),
    ) -> str:
        template = self._text.chat_template
        if template is None:
            raise ValueError("the base model has none; use `prompt` and `completion`")
        chat, shown = self._text.for_template(messages, tools)
        try:
            return template.render(chat, add_generation_prompt=add_generation_prompt, tools=shown)
        except TemplateRefusal as error:
            raise ValueError(error.message) from None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # `encode_batch*` releases the GIL, so that a large file delays no request.
        ids: list[int] = self._text.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._text.tokenizer.encode_batch([text], add_special_tokens=False)[0]
        return encoding.ids, encoding.offsets
