"""Text and logprobs of one sequence, cut at stop strings and incomplete characters."""

from typing import Any

import pytest

from server.messages.protocol import Output
from server.openai.assembly import Assembler, Piece
from tests.support.scripted import EOS, encode, logprob
from tests.support.tiny import _tokenizer


def _decode(ids: Any) -> str:
    return _tokenizer().backend_tokenizer.decode(ids, skip_special_tokens=True)


def _output(*tokens: int, **fields: Any) -> Output:
    return Output(id="x", tokens=list(tokens), logprobs=[logprob(token, 0) for token in tokens], **fields)


def _run(text: str, *, per_output: int = 1, eos: bool = False, **options: Any) -> tuple[list[Piece], Assembler]:
    """Pieces of `text` arriving `per_output` tokens at a time, until the assembler has finished."""
    assembler = Assembler(_decode, [], **options)
    tokens = encode(text) + [EOS] * eos
    pieces = []
    for i in range(0, len(tokens), per_output):
        part = tokens[i : i + per_output]
        last = i + per_output >= len(tokens)
        finish = {"finish_reason": "stop" if eos else "length", "stop_token": EOS if eos else None} if last else {}
        pieces.append(assembler.add(_output(*part, **finish)))
        if pieces[-1].finish_reason is not None:
            break
    return pieces, assembler


def _text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _tokens(pieces: list[Piece]) -> list[int]:
    return [entry.logprob.token for piece in pieces for entry in piece.entries]


@pytest.mark.parametrize("per_output", [1, 3, 100])
def test_text_and_logprobs_come_out_whole(per_output: int) -> None:
    text = "A fox, 漢字 🦜 and jumps."
    pieces, assembler = _run(text, per_output=per_output, eos=True)
    assert _text(pieces) == text
    assert _tokens(pieces) == encode(text)
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].stop_reason is None
    assert assembler.tokens == len(encode(text)) + 1


@pytest.mark.parametrize("per_output", [1, 4, 100])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_cuts_text_and_logprobs_alike(per_output: int, include: bool) -> None:
    text = "one two three four five"
    pieces, assembler = _run(text, per_output=per_output, stops=["three"], include_stop=include)
    kept = "one two three" if include else "one two "
    assert _text(pieces) == kept
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop", "three")
    covered = ""
    for token in _tokens(pieces):
        assert len(covered) < len(kept)  # a token that begins beyond the cut is not reported
        covered += _decode([token])
    assert covered.startswith(kept)
    assert assembler.tokens <= len(encode("one two three fo"))


def test_logprobs_wait_for_their_text() -> None:
    pieces, _ = _run("one tw", stops=["two"])
    for piece in pieces[:-1]:
        shown = sum(len(other.text) for other in pieces[: pieces.index(piece) + 1])
        assert all(entry.offset < shown for entry in piece.entries)
    assert _text(pieces) == "one tw"
    assert _tokens(pieces) == encode("one tw")


def test_offsets_count_characters_also_while_one_is_incomplete() -> None:
    pieces, _ = _run("a漢b")
    offsets = [entry.offset for piece in pieces for entry in piece.entries]
    assert offsets == [0, 1, 1, 1, 2]


def test_min_tokens_keeps_a_stop_string_from_counting() -> None:
    stop_after = len(encode("one two"))
    pieces, _ = _run("one two one two", stops=["two"], min_tokens=stop_after)
    assert _text(pieces) == "one two one "


def test_a_stop_token_is_told_only_when_the_client_named_it() -> None:
    assembler = Assembler(_decode, [], stop_token_ids=[EOS])
    piece = assembler.add(_output(EOS, finish_reason="stop", stop_token=EOS))
    assert (piece.text, piece.entries, piece.stop_reason) == ("", [], EOS)


def test_an_unfinished_character_is_shown_when_nothing_follows() -> None:
    assembler = Assembler(_decode, [])
    first = encode("漢")[0]
    piece = assembler.add(_output(first, finish_reason="length"))
    assert piece.text == "\N{REPLACEMENT CHARACTER}"
    assert _tokens([piece]) == [first]


IM_END, END = "<|im_end|>", "<|endoftext|>"


@pytest.mark.parametrize("per_output", [1, 100])
@pytest.mark.parametrize(
    ("text", "stop", "include", "kept"),
    [
        (f"one{END}two", END, False, "one"),
        (f"one{END}two", END, True, f"one{END}"),
        (f"one{END} two three", f"{END} two", False, "one"),
        (f"a{IM_END}one two{END}three", "two", False, "aone "),
        (f"a{IM_END}one two{END}three", f"o{END}th", False, "aone tw"),
        (f"a{IM_END}one{END}{END}two", f"{END}{IM_END}", False, "aonetwo"),
    ],
)
def test_a_stop_string_sees_special_tokens_that_the_client_does_not(
    text: str, stop: str, include: bool, kept: str, per_output: int
) -> None:
    hidden = {encode(token)[0]: token for token in (IM_END, END)}
    assembler = Assembler(_raw, [], stops=[stop], hidden=hidden, include_stop=include)
    tokens = encode(text)
    shown, reason = "", None
    for i in range(0, len(tokens), per_output):
        last = i + per_output >= len(tokens)
        piece = assembler.add(_output(*tokens[i : i + per_output], **({"finish_reason": "length"} if last else {})))
        shown += piece.text
        if piece.finish_reason is not None:
            reason = piece.finish_reason
            break
    assert shown == kept
    assert reason == ("length" if kept == "aonetwo" else "stop")


def _raw(ids: Any) -> str:
    return _tokenizer().backend_tokenizer.decode(ids, skip_special_tokens=False)
