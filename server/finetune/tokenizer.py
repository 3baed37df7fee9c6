"""The served model's tokenizer as data sets use it: synchronously, in a worker thread."""

from collections.abc import Sequence

from server.text.chat_template import TemplateRefusal
from server.text.processor import TextProcessor


class TrainingTokenizer:
    """`dataset.Tokenizer` over the text processor that also serves requests.

    Args:
        eos_token_ids: the engine's end-of-text tokens, the usual one first.

    Attributes:
        eos_token_ids: every token that ends an answer when it is served.
        special_tokens: the tokenizer's added tokens, and their texts.
    """

    def __init__(self, text: TextProcessor, eos_token_ids: Sequence[int]) -> None:
        self._text = text
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids, *text.stop_tokens]))
        self.special_tokens = text.added_tokens

    def render_chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        template = self._text.chat_template
        if template is None:
            raise ValueError("the base model has none; use `prompt` and `completion`")
        try:
            return template.render(messages, add_generation_prompt=add_generation_prompt)
        except TemplateRefusal as error:
            raise ValueError(error.message) from None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # `encode_batch*` releases the interpreter's lock, so that a large file holds up no request.
        ids: list[int] = self._text.tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._text.tokenizer.encode_batch([text], add_special_tokens=False)[0]
        return encoding.ids, encoding.offsets
