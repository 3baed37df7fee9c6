"""Training data: JSONL lines -> validated examples -> token ids with a mask of what is trained on.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "...", "weight": 1}]}
    {"prompt": "...", "completion": "..."}
    {"text": "..."}

The loss falls on completions: a chat's assistant turns (through the chat template), a completion, a whole text. Every
line is checked, and a bad one is named together with its field. The tokenizer comes in as a `Tokenizer`.
"""

import hashlib
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Literal, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from adapters.strict_json import JsonFault, parse_json
from server.finetune.turns import FEW_TURNS, HiddenTurn, spans_by_exchange, trained_turns
from server.messages.dataset import Dataset, Report

MAX_LINE_BYTES = 4 << 20
MAX_TURNS = 256  # trained, of a chat whose exchanges the template does not render alike by themselves


class DatasetError(ValueError):
    """A data set that is refused; `line` counts from 1 and `field` is the culprit's path within the line."""

    def __init__(self, reason: str, line: int | None = None, field: str | None = None) -> None:
        where = [f"line {line}"] if line is not None else []
        where += [f"field `{field}`"] if field else []
        super().__init__(f"{', '.join(where)}: {reason}" if where else reason)
        self.reason = reason
        self.line = line
        self.field = field


# --- what a line may hold -------------------------------------------------------------------------


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn. `weight` 0 keeps an assistant turn out of the loss."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None
    weight: Literal[0, 1] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatExample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    messages: list[Message]


class CompletionExample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prompt: str
    completion: str


class TextExample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str


Example = ChatExample | CompletionExample | TextExample
ExampleType = type[ChatExample] | type[CompletionExample] | type[TextExample]
_FIELDS: dict[ExampleType, set[str]] = {
    ChatExample: {"messages"},
    CompletionExample: {"prompt", "completion"},
    TextExample: {"text"},
}


def read_examples(lines: Iterable[bytes]) -> Iterator[tuple[int, Example | None]]:
    """Parse JSONL: `(line number, example)`, with None for a blank line.

    Raises:
        DatasetError: naming the line, and the field where one is to blame.
    """
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_LINE_BYTES:
            raise DatasetError(f"longer than {MAX_LINE_BYTES} bytes", number)
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors write
        yield number, (_parse(line, number) if line.strip() else None)


def _parse(line: bytes, number: int) -> Example:
    try:
        record = parse_json(line)
    except JsonFault as fault:
        if fault.key is not None:
            raise DatasetError("given twice", number, fault.key) from fault
        raise DatasetError(str(fault), number) from fault
    if not isinstance(record, dict):
        raise DatasetError(f"a JSON object is wanted, not {type(record).__name__}", number)
    record = _without_empty_fields(record)
    kind = _kind_of(record, number)
    try:
        example = msgspec.convert(record, kind, strict=True)
    except msgspec.ValidationError as error:
        reason, name = _locate(str(error))
        raise DatasetError(reason, number, name) from error
    if isinstance(example, ChatExample):
        _check_chat(example, number)
    _check_unicode(record, number)
    return example


_EMPTY: tuple[Any, ...] = (None, "", [], {})


def _without_empty_fields(record: dict[str, Any]) -> dict[str, Any]:
    """The record without fields that say nothing: unknown ones that are null or empty, and null ones of other kinds.

    Answers of a chat endpoint carry such fields (`refusal`, `tool_calls`), and table exports one for every column.
    """
    given = [names for names in _FIELDS.values() if any(record.get(name) is not None for name in names)]
    if given:
        others = set().union(*_FIELDS.values()).difference(*given)
        record = {name: value for name, value in record.items() if not (name in others and value is None)}
    known = set().union(*_FIELDS.values())
    record = {name: value for name, value in record.items() if name in known or value not in _EMPTY}
    if isinstance(messages := record.get("messages"), list):
        record["messages"] = [_plain_message(message) for message in messages]
    return record


def _plain_message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    plain = {name: value for name, value in message.items() if name in Message.__struct_fields__ or value not in _EMPTY}
    weight = plain.get("weight")
    if isinstance(weight, float) and weight in (0.0, 1.0):
        plain["weight"] = int(weight)
    return plain


def _locate(message: str) -> tuple[str, str]:
    """msgspec's "Object missing required field `role` - at `$.messages[0]`" as (reason, field's path)."""
    reason, _, place = message.partition(" - at `$")
    path = place.rstrip("`").lstrip(".")
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", reason):
        return "not known here", f"{path}.{unknown[1]}".lstrip(".")
    if missing := re.fullmatch(r"Object missing required field `(.*)`", reason):
        return "missing", f"{path}.{missing[1]}".lstrip(".")
    return reason, path


def _kind_of(record: dict[str, Any], number: int) -> ExampleType:
    """Which of the three shapes a record has, by the fields it carries."""
    present = [kind for kind, names in _FIELDS.items() if names & record.keys()]
    if not present:
        raise DatasetError("has neither `messages`, nor `prompt` and `completion`, nor `text`", number)
    for name in record:
        if not any(name in _FIELDS[kind] for kind in present):
            raise DatasetError("not known here", number, name)
    if len(present) > 1:
        raise DatasetError(f"mixes kinds of example: {', '.join(record)}", number, list(record)[-1])
    return present[0]


def _check_chat(example: ChatExample, number: int) -> None:
    if not example.messages:
        raise DatasetError("is empty", number, "messages")
    for index, message in enumerate(example.messages):
        if message.weight is not None and message.role != "assistant":
            raise DatasetError("only an assistant message has a weight", number, f"messages[{index}].weight")
        if message.role == "system" and index > 0:
            raise DatasetError("a system message comes first", number, f"messages[{index}].role")
    if not any(message.role == "assistant" for message in example.messages):
        raise DatasetError("no assistant message to learn from", number, "messages")


def _check_unicode(value: Any, number: int, path: str = "") -> None:
    """Refuse lone surrogates, which JSON can spell and no tokenizer can read."""
    match value:
        case str():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DatasetError("holds a lone surrogate", number, path) from error
        case dict():
            for name, item in value.items():
                _check_unicode(item, number, f"{path}.{name}" if path else name)
        case list():
            for index, item in enumerate(value):
                _check_unicode(item, number, f"{path}[{index}]")


# --- examples -> tokens -----------------------------------------------------------------------------


class Tokenizer(Protocol):
    """What encoding needs of the served model's tokenizer."""

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """Tokens that end a completion, the usual one first."""

    @property
    def special_tokens(self) -> Mapping[int, str]:
        """Tokens that no ordinary text is made of, and their texts."""

    def render_chat(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """The chat template's text. Raises ValueError when the template refuses these messages."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids without added special tokens, and each one's character range."""


@dataclass(frozen=True)
class Encoded:
    """One training sequence: `trained[i]` says that token i, given those before it, counts in the loss."""

    tokens: list[int]
    trained: list[bool]


def encode(example: Example, tokenizer: Tokenizer, *, completions_only: bool = True) -> list[Encoded]:
    """Token ids and loss mask of an example, with the tokens that serving it would see.

    One sequence, except for a chat whose template renders earlier turns differently once later ones follow (a thinking
    model's, say): then one sequence for each trained turn, as it was when that turn was produced.

    Raises:
        DatasetError: the chat template refuses the messages, or hides where the assistant's turns are.
    """
    match example:
        case TextExample():
            tokens = _ended(_opened(example.text, tokenizer), tokenizer)
            return [Encoded(tokens, [False] + [bool(example.text)] * (len(tokens) - 1))]
        case CompletionExample():
            prompt = _opened(example.prompt, tokenizer)
            answer = tokenizer.encode(example.completion, add_special_tokens=False) if example.completion else []
            tokens = prompt + _ended(answer, tokenizer)
            trained = [not completions_only] * len(prompt) + [bool(answer)] * (len(tokens) - len(prompt))
            return [Encoded(tokens, [False, *trained[1:]])]
        case ChatExample():
            return _encode_chat(example, tokenizer, completions_only)


def _opened(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids with what the tokenizer adds, but no second BOS before a text that begins with one."""
    added = tokenizer.encode(text, add_special_tokens=True)
    plain = tokenizer.encode(text, add_special_tokens=False)
    twice = len(added) > len(plain) > 0 and added[1 : len(plain) + 1] == plain and added[0] == plain[0]
    return added[1:] if twice else added


def _ended(tokens: list[int], tokenizer: Tokenizer) -> list[int]:
    """The tokens with EOS behind them, unless they end so already."""
    ends = bool(tokens) and tokens[-1] in tokenizer.eos_token_ids
    return tokens if ends else [*tokens, *tokenizer.eos_token_ids[:1]]


def _encode_chat(example: ChatExample, tokenizer: Tokenizer, completions_only: bool) -> list[Encoded]:
    messages = [{"role": message.role, "content": message.text} for message in example.messages]
    whole = _render(tokenizer, messages)
    if not completions_only:
        tokens, _ = tokenizer.encode_with_offsets(whole)
        return [Encoded(tokens, [False] + [True] * (len(tokens) - 1))]
    trained = [
        index
        for index, message in enumerate(example.messages)
        if message.role == "assistant" and message.weight != 0 and message.text
    ]
    render = partial(_render, tokenizer)
    if len(trained) > FEW_TURNS:
        if (spans := spans_by_exchange(whole, messages, set(trained), render)) is not None:
            return [_mask_spans(whole, spans, tokenizer)]
        if len(trained) > MAX_TURNS:
            reason = f"has {len(trained)} assistant turns; this chat template allows {MAX_TURNS}: divide the chat"
            raise DatasetError(reason, field="messages")
    try:
        turns = trained_turns(messages, trained, render)
    except HiddenTurn as hidden:
        raise DatasetError("the model's chat template hides where this turn begins", field=str(hidden)) from hidden
    if all(whole.startswith(through) for through, _ in turns):
        return [_mask_spans(whole, [(start, len(through)) for through, start in turns], tokenizer)]
    return [_mask_spans(through, [(start, len(through))], tokenizer) for through, start in turns]


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)
    except ValueError as error:
        raise DatasetError(f"the model's chat template refuses it: {error}", field="messages") from error


def _mask_spans(text: str, spans: list[tuple[int, int]], tokenizer: Tokenizer) -> Encoded:
    """Train on the tokens inside `spans` of the text, up to each span's end-of-turn token: nothing follows it."""
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
        trained[0] = False  # nothing comes before it to predict it from
    return Encoded(tokens, trained)


def turn_ends(example: ChatExample, tokenizer: Tokenizer) -> list[int]:
    """The token that follows each trained turn of a chat as it is rendered, white space aside.

    It must be a special one; behind the last turn an ordinary one will do if nothing else is there.
    """
    said = "Ara ararauna"  # in place of what was said: what is behind it is the template's
    trained = [message.role == "assistant" and message.weight != 0 for message in example.messages]
    messages = [
        {"role": message.role, "content": said if counts else message.text}
        for message, counts in zip(example.messages, trained, strict=True)
    ]
    _, *behind = _render(tokenizer, messages).split(said)
    ends: list[int] = []
    for rest in (text.strip() for text in behind):
        ends += [id_ for id_, text in tokenizer.special_tokens.items() if rest.startswith(text)][:1]
    if behind and not ends and len(ids := tokenizer.encode(behind[-1].strip(), add_special_tokens=False)) == 1:
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
        max_length: tokens that a sequence may have; longer ones are cut there and counted.
        completions_only: False trains on prompts, too.

    Raises:
        DatasetError: a bad line, or no line that anything could be learned from.
    """
    report = Report()
    tokens: list[npt.NDArray[np.int32]] = []
    trained: list[npt.NDArray[np.bool_]] = []
    ends: Counter[int] = Counter()
    seen: set[bytes] = set()
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
        raise DatasetError("no line that anything can be learned from")
    all_tokens, all_trained = np.concatenate(tokens), np.concatenate(trained)
    report.tokens, report.trained_tokens = len(all_tokens), int(all_trained.sum())
    bounds = np.concatenate([[0], np.cumsum([len(part) for part in tokens])]).astype(np.int64)
    # An ordinary token that occurs within answers, too, would cut them short.
    stops = tuple(
        id_
        for id_, count in sorted(ends.items())
        if id_ in tokenizer.special_tokens or np.count_nonzero(all_tokens[all_trained] == id_) <= count
    )
    return Dataset(all_tokens, all_trained, bounds, report, stops)


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines, none read further than what is needed to see that it is too long."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
