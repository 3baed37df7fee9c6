"""The base's tokenizer and chat template, from its directory: text to token ids, and back.

Uses the `tokenizers` library directly: `transformers` would import torch into the API process. Streaming of text is in
`server.text.streaming`.
"""

import asyncio
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken, Tokenizer

from adapters.peft_format.text import AdapterText
from server.errors import ContextLengthExceeded, InvalidRequest
from server.text.chat_template import ChatTemplate, TemplateRefusal
from server.text.reasoning import REASONING_FORMATS, ReasoningFormat, reasoning_of, with_thoughts
from server.text.sandbox import TemplateRenderer
from server.text.tools.format import ToolFormat
from server.text.tools.prompt import for_template, takes_one_call, with_one_call_each
from server.text.tools.table import format_of

T = TypeVar("T")

_LONG = 2048  # characters or tokens from which work leaves the event loop
_TURN = 2**16  # characters of several texts encoded before other requests have their turn
_ADAPTED = 8  # cached tokenizers of adapters, tens of megabytes each
_PROBE = ({"role": "user", "content": "Say it."}, {"role": "assistant", "content": "Ara ararauna"})
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(Exception):
    """The model's directory has no usable tokenizer; the message names the file and the reason."""


@dataclass(frozen=True)
class TokenText:
    """One token by itself: its exact bytes, and these as readable text."""

    text: str
    bytes: bytes


class TextProcessor:
    """The tokenizer and the chat template of one base model, with those of adapters that have their own.

    Args:
        tokenizer: the tokenizer.
        chat_template: None when the base has none: chat is then refused.
        special_tokens: the templates' variables `bos_token`, ...
        renderer: of adapters' templates; None: these are not used.
        stop_tokens: tokens that end an answer -> the model's files that name them.
        tool_parser: the format of tool calls, for templates that know tools; None: recognised from the template.
        reasoning_parser: the format of thoughts; "auto": recognised from the template; "none".

    Attributes:
        stop_tokens: id -> names of its sources, the chat template's end of an assistant's turn among them.
        longest_token: the most bytes of text that one token stands for.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        special_tokens: Mapping[str, str] | None = None,
        renderer: TemplateRenderer | None = None,
        stop_tokens: Mapping[int, Sequence[str]] | None = None,
        tool_parser: str | None = None,
        reasoning_parser: str = "auto",
    ) -> None:
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.chat_template = chat_template
        self.renderer = renderer
        self._tool_parser = tool_parser
        self._reasoning_parser = reasoning_parser
        self._special_tokens = dict(special_tokens or {})
        self._own_template: str | None = None  # an adapter's
        self._key = ""  # the adapter's
        self._adapted: OrderedDict[str, TextProcessor] = OrderedDict()  # least recently used first
        self._piece_bytes = _piece_decoder(json.loads(tokenizer.to_str()))
        added = tokenizer.get_added_tokens_decoder()
        self._added = {id_: token.content for id_, token in added.items()}
        self.special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        characters = self._piece_bytes is _byte_level  # one character per byte
        pieces = tokenizer.get_vocab(with_added_tokens=True)
        self.longest_token = max((len(p) if characters else len(p.encode()) for p in pieces), default=1)
        self._named_stops = dict(stop_tokens or {})
        self.stop_tokens = self._with_turn_end(_probed(chat_template))
        # One thread, since tokenising must not take the engine's cores.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="text")

    @classmethod
    def load(
        cls,
        directory: Path,
        renderer: TemplateRenderer | None = None,
        tool_parser: str | None = None,
        reasoning_parser: str = "auto",
    ) -> "TextProcessor":
        """Load a directory in Hugging Face layout: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`.

        Raises `TokenizerError`.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise TokenizerError(
                f"{directory} has no tokenizer.json. Make one with transformers: "
                "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as exc:  # the library raises plain Exception
            raise TokenizerError(f"{path}: {exc}") from exc
        config = _read_json(directory / "tokenizer_config.json")
        source = _chat_template_source(directory, config)
        special_tokens = _special_tokens(directory, config)
        template = ChatTemplate(source, special_tokens) if source else None
        stop_tokens = _stop_tokens(directory, tokenizer, special_tokens)
        return cls(tokenizer, template, special_tokens, renderer, stop_tokens, tool_parser, reasoning_parser)

    def close(self) -> None:
        """Stop the tokenising thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """`bos_token`, `eos_token`, ... from the model's files."""
        return self._special_tokens

    @property
    def tool_format(self) -> ToolFormat | None:
        """The answers' format of tool calls; None without a chat template."""
        source = self._template_source
        return None if source is None else format_of(source, self._tool_parser)

    @property
    def reasoning_format(self) -> ReasoningFormat | None:
        """The answers' format of thoughts; None if they have none."""
        source = self._template_source
        if source is None or self._reasoning_parser == "none":
            return None
        return reasoning_of(source) if self._reasoning_parser == "auto" else REASONING_FORMATS[self._reasoning_parser]

    def template_takes(self, argument: str) -> bool:
        """Whether the chat template's source contains this name."""
        return re.search(rf"\b{argument}\b", self._template_source or "") is not None

    @property
    def _template_source(self) -> str | None:
        own = self.chat_template.source if self.chat_template is not None else None
        return own if self._own_template is None or self.renderer is None else self._own_template

    # --- adapters

    async def with_adapter_text(self, key: str, read: Callable[[], AdapterText]) -> "TextProcessor":
        """Return a copy with an adapter's tokens and template, cached under `key`. `read` runs in a thread."""
        found = self._adapted.get(key)
        if found is None:
            found = await asyncio.to_thread(lambda: self._extended(read()))
            found._key = key
            if found._own_template is not None:
                found.stop_tokens = found._with_turn_end(await found._render_probe())
            self._adapted[key] = found
            if len(self._adapted) > _ADAPTED:
                self._adapted.popitem(last=False)
        elif len(self._adapted) > 1:
            self._adapted.move_to_end(key)
        return found

    def _extended(self, text: AdapterText) -> "TextProcessor":
        other = copy(self)
        if text.tokens:
            other.tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
            # All at once, since each call iterates over the existing tokens.
            fields = [{name: value for name, value in vars(token).items() if name != "id"} for token in text.tokens]
            other.tokenizer.add_tokens([AddedToken(**each) for each in fields])
            other._added = self._added | {token.id: token.content for token in text.tokens}
            other.special_ids = self.special_ids | {token.id for token in text.tokens if token.special}
            other.longest_token = max(self.longest_token, *(len(token.content.encode()) for token in text.tokens))
        if self.renderer is not None:
            other._own_template = text.chat_template
        return other

    # --- stop tokens and formats

    def _with_turn_end(self, rendered: str) -> dict[int, tuple[str, ...]]:
        """Return the files' stop tokens, and the special token that follows the answer in a rendered probe."""
        stops = {id_: tuple(named) for id_, named in self._named_stops.items()}
        _, found, rest = rendered.rpartition(_PROBE[-1]["content"])
        for id_ in self._encode([rest], add_special_tokens=False)[0] if found else ():
            if id_ in self._added:
                stops[id_] = (*stops.get(id_, ()), "chat template")
                break
            if self.token_bytes(id_).strip():  # white space may precede it
                break
        return stops

    async def _render_probe(self) -> str:
        """Render a short conversation with an adapter's own template; empty if that refuses it."""
        with suppress(InvalidRequest):
            return await self.render_chat(
                _PROBE,
                add_generation_prompt=False,
                continue_final_message=False,
                arguments={},
                max_tokens=1024,
            )
        return ""

    def with_stops(self, ids: Iterable[int], named_by: str) -> "TextProcessor":
        """Return a copy with additional stop tokens."""
        other = copy(self)
        other.stop_tokens = dict(self.stop_tokens)
        for id_ in ids:
            other.stop_tokens[id_] = (*self.stop_tokens.get(id_, ()), named_by)
        return other

    def with_formats(self, tool_parser: str | None, reasoning_parser: str | None) -> "TextProcessor":
        """Return a copy with other formats; None keeps one as it is."""
        other = copy(self)
        other._tool_parser = tool_parser or self._tool_parser
        other._reasoning_parser = reasoning_parser or self._reasoning_parser
        return other

    @property
    def added_tokens(self) -> Mapping[int, str]:
        """Tokens added to the vocabulary, special ones among them."""
        return self._added

    def stops_as_json(self) -> list[dict[str, Any]]:
        """Return the stop tokens in the API's form."""
        return [
            {"id": id_, "token": self.token(id_).text, "named_by": list(named)}
            for id_, named in self.stop_tokens.items()
        ]

    def details(self) -> dict[str, Any]:
        """Return stop tokens and formats in the API's form."""
        formats = {"tool_format": self.tool_format, "reasoning_format": self.reasoning_format}
        return {"stop_tokens": self.stops_as_json()} | {key: each and each.name for key, each in formats.items()}

    # --- text -> tokens

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool, max_tokens: int, param: str
    ) -> list[list[int]]:
        """Return the token ids of each text; `add_special_tokens` lets the tokenizer add its own, such as a BOS.

        Raises `ContextLengthExceeded`, before any work, for a text of more bytes than `max_tokens` can stand for. (A
        tokenizer that drops white space could fit it nevertheless, but only with hundreds of kilobytes of that.)
        """
        max_bytes = max_tokens * self.longest_token
        for text in texts:
            size = len(text) if len(text) > max_bytes or 4 * len(text) <= max_bytes else len(text.encode())
            if size > max_bytes:
                raise ContextLengthExceeded(
                    f"`{param}` has a text of more than {max_bytes} bytes, which cannot fit into {max_tokens} tokens.",
                    param=param,
                )
        ids: list[list[int]] = []
        for batch in _batches(texts):
            work = partial(self._encode, batch, add_special_tokens)
            ids += await self.in_thread(sum(map(len, batch)) + len(batch), work)
        return ids

    def offsets(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the start of each token of `encode` in `text`, in characters."""
        encoding = self.tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        return [start for start, _ in encoding.offsets]

    async def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        continue_final_message: bool,
        arguments: Mapping[str, str | int | float | bool | None],
        max_tokens: int,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """Render messages to the prompt's text. Raises `InvalidRequest` when the template refuses them, when there is
        none, and when an adapter's template writes more than `max_tokens` can stand for."""
        if self._template_source is None:
            raise InvalidRequest("The base model has no chat template; use /v1/completions.", param="messages")
        size = sum(len(message["content"]) for message in messages) + len(messages) + _LONG * bool(tools)
        size += sum(len(message.get("reasoning", "")) for message in messages)
        if takes_one_call(self._template_source):
            messages = with_one_call_each(messages)
        chat, shown = messages, None
        if tools or any(_is_more_than_text(message) for message in messages):
            chat, shown = await self.in_thread(size, partial(self.for_template, messages, tools))
        if self._own_template is not None and self.renderer is not None:
            return await self.renderer.render(
                self._own_template,
                self._special_tokens,
                chat,
                max_tokens * self.longest_token,
                self._key,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                arguments=dict(arguments),
                tools=shown,
            )
        assert self.chat_template is not None
        render = partial(
            self.chat_template.render,
            chat,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            arguments=arguments,
            tools=shown,
        )
        try:
            return await self.in_thread(size, render)
        except TemplateRefusal as refusal:
            raise InvalidRequest(refusal.message, param=refusal.param) from refusal

    def for_template(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Return messages and tools in the chat template's form; tools are None if it must not see any."""
        source, tool_format = self._template_source, self.tool_format
        assert source is not None
        assert tool_format is not None
        chat = with_thoughts([dict(message) for message in messages], source, self.reasoning_format)
        return for_template(chat, tools, source, tool_format)

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        # `encode_batch*` releases the interpreter's lock; `encode` does not.
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    async def in_thread(self, size: int, work: Callable[[], T]) -> T:
        """Run `work` here if `size` (characters or tokens) is small, else in the tokenising thread."""
        if size < _LONG:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # --- tokens -> text

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of token ids. Ids unknown to the tokenizer have no text."""
        if len(ids) < _LONG:
            text: str = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        else:  # releases the interpreter's lock, at the cost of a thread pool
            [text] = self.tokenizer.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        return text

    @property
    def special_texts(self) -> dict[int, str]:
        """The text of every special token, by id."""
        return {id_: self._added[id_] for id_ in self.special_ids}

    def has_special(self, texts: Sequence[str]) -> bool:
        """Whether a special token's text occurs in any of these."""
        return bool(texts) and any(special in text for special in self.special_texts.values() for text in texts)

    def token(self, id_: int) -> TokenText:
        """Return one token by itself. Bytes that are not UTF-8 read `bytes:\\xe2\\x82`, as with OpenAI."""
        raw = self.token_bytes(id_)
        try:
            return TokenText(raw.decode(), raw)
        except UnicodeDecodeError:
            return TokenText("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw)

    def token_bytes(self, id_: int) -> bytes:
        """Return the bytes that one token adds to a text; empty for an id unknown to the tokenizer."""
        if (content := self._added.get(id_)) is not None:
            return content.encode()
        piece = self.tokenizer.id_to_token(id_)
        return b"" if piece is None else self._piece_bytes(piece)


def _is_more_than_text(message: Mapping[str, Any]) -> bool:
    return message["role"] == "tool" or "tool_calls" in message or "reasoning" in message


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield texts in groups, so that a request with many of them lets others run in between."""
    turn: list[str] = []
    size = 0
    for text in texts:
        turn.append(text)
        size += len(text)
        if size >= _TURN:
            yield turn
            turn, size = [], 0
    if turn:
        yield turn


def _probed(template: ChatTemplate | None) -> str:
    """Render a short conversation with the base's template; empty if that refuses it."""
    with suppress(TemplateRefusal):
        return template.render(_PROBE, add_generation_prompt=False) if template is not None else ""
    return ""


# --- reading a model's directory ---------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise TokenizerError(f"{path}: {exc}") from exc
    return content if isinstance(content, dict) else {}


def _chat_template_source(directory: Path, config: Mapping[str, Any]) -> str | None:
    """Return the template's source: from its own file in newer repositories, from the tokenizer's config in older ones,
    the default one of several."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    places = [config, *(_read_json(directory / name) for name in ("chat_template.json", "processor_config.json"))]
    template = next((place["chat_template"] for place in places if place.get("chat_template")), None)
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def _stop_tokens(directory: Path, tokenizer: Tokenizer, special_tokens: Mapping[str, str]) -> dict[int, list[str]]:
    """Return the end-of-text tokens named in the model's files, with the names of these files."""
    named: dict[int, list[str]] = {}
    for name in ("generation_config.json", "config.json"):
        content = _read_json(directory / name)
        ids = content.get("eos_token_id", (content.get("text_config") or {}).get("eos_token_id"))
        for id_ in ids if isinstance(ids, list) else [ids]:
            if isinstance(id_, int):
                named.setdefault(id_, []).append(name)
    eos = tokenizer.token_to_id(special_tokens.get("eos_token", ""))
    if eos is not None:
        named.setdefault(eos, []).append("tokenizer")
    return named


def _special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    known = _read_json(directory / "special_tokens_map.json") | dict(config)
    tokens = {}
    for name in _SPECIAL_TOKENS:
        token = known.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[name] = token
    return tokens


# --- bytes of a vocabulary's pieces --------------------------------------------------------------------


def _piece_decoder(tokenizer: Mapping[str, Any]) -> Any:
    """Return the function from piece to bytes for this kind of vocabulary."""
    decoder = tokenizer.get("decoder") or {}
    kinds = {step.get("type") for step in decoder.get("decoders", [decoder])}
    if "ByteLevel" in kinds:
        return _byte_level
    if kinds & {"ByteFallback", "Metaspace", "Replace"}:
        return _sentencepiece
    return str.encode


def _byte_level_alphabet() -> dict[str, int]:
    """Return GPT-2's alphabet: printable Latin-1 for itself, characters from U+0100 on for the other bytes in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level(piece: str) -> bytes:
    if all(char in _ALPHABET for char in piece):
        return bytes(_ALPHABET[char] for char in piece)
    return piece.encode()


def _sentencepiece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
