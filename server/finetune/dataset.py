"""Training data: JSONL lines -> validated examples -> token ids with a mask of trained tokens.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "...", "weight": 1}]}
    {"prompt": "...", "completion": "..."}
    {"text": "..."}

The loss covers completions: a chat's assistant turns (through the chat template, with thoughts and tool calls), a
completion, a whole text. Errors name the line and its field.
"""

import hashlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from server.finetune.rows import (
    MAX_LINE_BYTES,
    ChatExample,
    CompletionExample,
    DatasetError,
    Example,
    TextExample,
    read_examples,
)
from server.finetune.turns import FEW_TURNS, HiddenTurn, spans_by_exchange, trained_turns
from server.messages.dataset import Dataset, Report

MAX_TURNS = 256  # trained turns, if the template renders a chat's exchanges differently by themselves


# --- examples -> tokens -----------------------------------------------------------------------------


class Tokenizer(Protocol):
    """The served model's tokenizer, as far as encoding needs it."""

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """The tokens that end a completion, the usual one first."""

    @property
    def special_tokens(self) -> Mapping[int, str]:
        """The tokens that ordinary text never encodes to, and their texts."""

    @property
    def markers(self) -> Collection[str]:
        """The tokens of tool calls and thoughts, which end no turn."""

    @property
    def formats(self) -> tuple[str | None, str | None]:
        """The formats of tool calls and of thoughts."""

    def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[dict[str, Any]] = (),
    ) -> str:
        """Return the rendered chat. Raises ValueError when the chat template refuses these messages."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the token ids of a text."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids without added special tokens, and the character range of each."""


@dataclass(frozen=True)
class Encoded:
    """One training sequence: `trained[i]` if the prediction of token i counts in the loss."""

    tokens: list[int]
    trained: list[bool]


def encode(example: Example, tokenizer: Tokenizer, *, completions_only: bool = True) -> list[Encoded]:
    """Return token ids and loss mask of an example, with the same tokens as in serving.

    One sequence, unless the chat template renders earlier turns differently once later ones follow (as with thinking
    models): then one sequence for each trained turn, rendered as when that turn was generated.

    Raises:
        DatasetError: the chat template refuses the messages, or hides the positions of the assistant's turns.
    """
    match example:
        case TextExample():
            tokens = _with_eos(_with_bos(example.text, tokenizer), tokenizer)
            return [Encoded(tokens, [False] + [bool(example.text)] * (len(tokens) - 1))]
        case CompletionExample():
            prompt = _with_bos(example.prompt, tokenizer)
            answer = tokenizer.encode(example.completion, add_special_tokens=False) if example.completion else []
            tokens = prompt + _with_eos(answer, tokenizer)
            trained = [not completions_only] * len(prompt) + [bool(answer)] * (len(tokens) - len(prompt))
            return [Encoded(tokens, [False, *trained[1:]])]
        case ChatExample():
            return _encode_chat(example, tokenizer, completions_only)


def _with_bos(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return token ids with the tokenizer's special tokens, but no second BOS before a text that begins with one."""
    added = tokenizer.encode(text, add_special_tokens=True)
    plain = tokenizer.encode(text, add_special_tokens=False)
    twice = len(added) > len(plain) > 0 and added[1 : len(plain) + 1] == plain and added[0] == plain[0]
    return added[1:] if twice else added


def _with_eos(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    """Return the tokens with EOS appended, unless they end with one."""
    ends = bool(tokens) and tokens[-1] in tokenizer.eos_token_ids
    return tokens if ends else [*tokens, *tokenizer.eos_token_ids[:1]]


def _encode_chat(example: ChatExample, tokenizer: Tokenizer, completions_only: bool) -> list[Encoded]:
    messages = example.shown_messages()
    render = partial(_render, tokenizer, tools=example.shown_tools())
    rendered = render(messages)
    if not completions_only:
        tokens, _ = tokenizer.encode_with_offsets(rendered)
        return [Encoded(tokens, [False] + [True] * (len(tokens) - 1))]
    trained = [index for index, message in enumerate(example.messages) if message.trained]
    if len(trained) > FEW_TURNS:
        if (spans := spans_by_exchange(rendered, messages, set(trained), render)) is not None:
            _check_complete(example, trained, [rendered[start:end] for start, end in spans])
            return [_mask_spans(rendered, spans, tokenizer)]
        if len(trained) > MAX_TURNS:
            reason = f"has {len(trained)} assistant turns; this chat template allows {MAX_TURNS}: divide the chat"
            raise DatasetError(reason, field="messages")
    try:
        turns = trained_turns(messages, trained, render)
    except HiddenTurn as hidden:
        raise DatasetError("the model's chat template hides where this turn begins", field=str(hidden)) from hidden
    _check_complete(example, trained, [prefix[start:] for prefix, start in turns])
    if all(rendered.startswith(prefix) for prefix, _ in turns):
        return [_mask_spans(rendered, [(start, len(prefix)) for prefix, start in turns], tokenizer)]
    return [_mask_spans(prefix, [(start, len(prefix))], tokenizer) for prefix, start in turns]


def _check_complete(example: ChatExample, trained: Sequence[int], texts: Sequence[str]) -> None:
    """Raise DatasetError if the template leaves out a thought or a call."""
    for index, text in zip(trained, texts, strict=True):
        message = example.messages[index]
        if message.thought.strip() not in text:
            raise DatasetError(
                "the model's chat template leaves this thought out", field=f"messages[{index}].reasoning"
            )
        names = [call.function.name for call in message.tool_calls or ()]
        for i, name in enumerate(names):
            if text.count(name) < names[: i + 1].count(name):
                reason = "the model's chat template leaves this call out"
                raise DatasetError(reason, field=f"messages[{index}].tool_calls[{i}]")


def _render(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[dict[str, Any]] = (),
) -> str:
    try:
        return tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt, tools=tools)
    except ValueError as error:
        raise DatasetError(f"the model's chat template refuses it: {error}", field="messages") from error


def _mask_spans(text: str, spans: list[tuple[int, int]], tokenizer: Tokenizer) -> Encoded:
    """Encode a text, training on the tokens inside `spans`, up to and including each span's end-of-turn token."""
    tokens, offsets = tokenizer.encode_with_offsets(text)
    trained = [False] * len(tokens)
    begins = [left for left, _ in offsets]
    for start, end in spans:
        for i in range(bisect_left(begins, start), bisect_left(begins, end)):
            left, right = offsets[i]
            if left < right <= end:
                trained[i] = True
                if tokens[i] in tokenizer.eos_token_ids:
                    break
    if trained:
        trained[0] = False  # there is no token to predict it from
    return Encoded(tokens, trained)


def turn_ends(example: ChatExample, tokenizer: Tokenizer) -> list[int]:
    """Return the token that follows each trained turn of a rendered chat, ignoring white space.

    It must be a special token; after the last turn an ordinary token counts, too, if nothing else follows. In chats
    with calls or thoughts, only the last turn's end is examined.
    """
    if any(message.tool_calls or message.thought for message in example.messages):
        last = max((i for i, message in enumerate(example.messages) if message.trained), default=-1)
        shown = example.shown_messages()[: last + 1]
        text = _render(tokenizer, shown, tools=example.shown_tools()).rstrip() if shown else ""
        special = tokenizer.special_tokens.items()
        return [id_ for id_, token in special if text.endswith(token) and token not in tokenizer.markers][:1]
    placeholder = "Ara ararauna"  # in place of the content: the text after it is the template's
    trained = [message.role == "assistant" and message.weight != 0 for message in example.messages]
    messages = [
        shown | ({"content": placeholder} if counts else {})
        for shown, counts in zip(example.shown_messages(), trained, strict=True)
    ]
    _, *parts = _render(tokenizer, messages, tools=example.shown_tools()).split(placeholder)
    ends: list[int] = []
    for rest in (text.strip() for text in parts):
        ends += [id_ for id_, text in tokenizer.special_tokens.items() if rest.startswith(text)][:1]
    if parts and not ends and len(ids := tokenizer.encode(parts[-1].strip(), add_special_tokens=False)) == 1:
        ends = ids
    return ends


# --- whole files ------------------------------------------------------------------------------------


def load_dataset(
    file: BinaryIO,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    completions_only: bool = True,
) -> Dataset:
    """Validate and encode a JSONL file.

    Args:
        max_length: most tokens of a sequence; longer ones are cut there and counted.
        completions_only: False trains on prompts, too.

    Raises:
        DatasetError: a bad line, or no line with tokens to train on.
    """
    report = Report()
    tokens: list[npt.NDArray[np.int32]] = []
    trained: list[npt.NDArray[np.bool_]] = []
    ends: Counter[int] = Counter()
    seen: set[bytes] = set()
    calls = thoughts = False
    for number, example in read_examples(read_lines(file)):
        if example is None:
            report.empty += 1
            continue
        digest = hashlib.blake2b(msgspec.json.encode(example), digest_size=16).digest()
        report.duplicates += digest in seen
        seen.add(digest)
        try:
            sequences = encode(example, tokenizer, completions_only=completions_only)
            ends.update(turn_ends(example, tokenizer) if isinstance(example, ChatExample) else ())
        except DatasetError as error:
            raise DatasetError(error.reason, number, error.field) from error
        if isinstance(example, ChatExample):
            calls = calls or bool(example.tools) or any(message.tool_calls for message in example.messages)
            thoughts = thoughts or any(message.thought for message in example.messages)
        report.over_long += any(len(sequence.tokens) > max_length for sequence in sequences)
        ids = [np.asarray(sequence.tokens[:max_length], np.int32) for sequence in sequences]
        masks = [np.asarray(sequence.trained[:max_length], np.bool_) for sequence in sequences]
        kept = [pair for pair in zip(ids, masks, strict=True) if pair[1].any()]
        if not kept:
            report.empty += 1
            continue
        report.examples += 1
        tokens += [part for part, _ in kept]
        trained += [part for _, part in kept]
    if not tokens:
        cut = f"; {report.over_long} cut at {max_length} tokens, before what is trained on" if report.over_long else ""
        raise DatasetError(f"no line has tokens to train on{cut}")
    all_tokens, all_trained = np.concatenate(tokens), np.concatenate(trained)
    report.tokens, report.trained_tokens = len(all_tokens), int(all_trained.sum())
    bounds = np.concatenate([[0], np.cumsum([len(part) for part in tokens])]).astype(np.int64)
    # Excludes ordinary tokens that also occur within answers: as stop tokens they would cut these short.
    stops = tuple(
        id_
        for id_, count in sorted(ends.items())
        if id_ in tokenizer.special_tokens or np.count_nonzero(all_tokens[all_trained] == id_) <= count
    )
    tool_format, reasoning_format = tokenizer.formats
    return Dataset(
        all_tokens,
        all_trained,
        bounds,
        report,
        stops,
        tool_format=tool_format if calls else None,
        reasoning_format=reasoning_format if thoughts else None,
    )


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines, reading an over-long one only just beyond the limit."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
