"""Preview of a data file: its lines as tokens, with the mask of trained tokens."""

import codecs
from pathlib import Path
from typing import Any

from server.finetune.dataset import Encoded, encode, read_lines
from server.finetune.rows import read_examples
from server.finetune.tokenizer import TrainingTokenizer
from server.text.processor import TextProcessor

MOST_TOKENS = 16_384  # of a page; the line that exceeds it is the last


def preview(
    path: Path, text: TextProcessor, tokenizer: TrainingTokenizer, *, after: int, limit: int, max_length: int
) -> tuple[list[dict[str, Any]], bool]:
    """Return the non-blank lines after line number `after`, and whether more follow."""
    lines: list[dict[str, Any]] = []
    tokens = 0
    with path.open("rb") as file:
        passed = (line if number > after else b"" for number, line in enumerate(read_lines(file), start=1))
        for number, example in read_examples(passed):
            if example is None:
                continue
            if len(lines) == limit or tokens > MOST_TOKENS:
                return lines, True
            sequences = encode(example, tokenizer)
            length = max(len(sequence.tokens) for sequence in sequences)
            shown = [_shown(text, sequence, max_length) for sequence in sequences]
            kept = [one for one in shown if any(one["trained"])]
            tokens += sum(len(one["tokens"]) for one in kept)
            lines.append({"line": number, "length": length, "cut": length > max_length, "sequences": kept})
    return lines, False


def _shown(text: TextProcessor, sequence: Encoded, max_length: int) -> dict[str, Any]:
    """Return a sequence's tokens as text. A character split over several tokens is shown with the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    tokens = [decoder.decode(text.token_bytes(id_)) for id_ in sequence.tokens[:max_length]]
    return {"tokens": tokens, "trained": sequence.trained[:max_length]}
