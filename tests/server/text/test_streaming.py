"""Text that grows token by token: incremental decoding, and stop strings found however the text is cut."""

from collections.abc import Callable, Sequence
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from server.text.streaming import Detokenizer, StopStrings
from tests.support.tiny import _tokenizer

BYTE_LEVEL: Tokenizer = _tokenizer().backend_tokenizer
VOCABULARY = BYTE_LEVEL.get_vocab_size()


def _sentencepiece() -> Tokenizer:
    """Llama 2's kind: a mark for spaces, byte tokens, and the very first space dropped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "b", "▁漢", "é", "."]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


SENTENCEPIECE = _sentencepiece()
BYTES = {byte: SENTENCEPIECE.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}


def _id(tokenizer: Tokenizer, piece: str) -> int:
    found = tokenizer.token_to_id(piece)
    assert found is not None
    return found


def _decoder(tokenizer: Tokenizer, skip: bool = True) -> Callable[[Sequence[int]], str]:
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=skip)


def _stream(tokenizer: Tokenizer, ids: Sequence[int], prompt: Sequence[int] = (), skip: bool = True) -> list[str]:
    added = tokenizer.get_added_tokens_decoder()
    silent = {id_ for id_, token in added.items() if token.special} if skip else set()
    detokenizer = Detokenizer(_decoder(tokenizer, skip), prompt, silent)
    pieces = [detokenizer.add(id_) for id_ in ids]
    return [*pieces, detokenizer.flush()]


@given(st.lists(st.integers(0, VOCABULARY + 3), max_size=60), st.booleans())
def test_byte_level_pieces_joined_are_the_whole(ids: list[int], skip: bool) -> None:
    assert "".join(_stream(BYTE_LEVEL, ids, skip=skip)) == BYTE_LEVEL.decode(ids, skip_special_tokens=skip)


@given(st.text())
def test_no_piece_has_half_a_character(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False).ids
    pieces = _stream(BYTE_LEVEL, ids)
    assert "".join(pieces) == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


_WORDS = st.sampled_from(["<s>", "</s>", "▁", "▁a", "a", "b", "▁漢", "é", "."]).map(
    lambda p: [SENTENCEPIECE.token_to_id(p)]
)
_SPELLED = st.characters(min_codepoint=0x80, exclude_categories=["Cs"]).map(lambda c: [BYTES[b] for b in c.encode()])


@given(st.lists(st.one_of(_WORDS, _SPELLED)), st.lists(_WORDS, max_size=8))
def test_sentencepiece_pieces_follow_the_prompt_as_the_whole_does(
    new: list[list[int]], before: list[list[int]]
) -> None:
    ids, prompt = list(chain(*new)), list(chain(*before))
    whole = SENTENCEPIECE.decode(prompt + ids)
    assert SENTENCEPIECE.decode(prompt) + "".join(_stream(SENTENCEPIECE, ids, prompt)) == whole


def test_the_space_before_the_first_new_word_survives() -> None:
    ids = [_id(SENTENCEPIECE, piece) for piece in ("a", "▁a", "▁a")]
    assert _stream(SENTENCEPIECE, ids[1:], ids[:1]) == [" a", " a", ""]


def test_an_unfinished_character_is_held_and_shown_at_the_end() -> None:
    first, second, third = BYTE_LEVEL.encode("漢", add_special_tokens=False).ids
    assert _stream(BYTE_LEVEL, [first, second, third]) == ["", "", "漢", ""]
    assert _stream(BYTE_LEVEL, [first, second]) == ["", "", "\N{REPLACEMENT CHARACTER}"]


def test_work_per_token_stays_small_whatever_the_tokens() -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return BYTE_LEVEL.decode(ids)

    half = BYTE_LEVEL.encode("漢", add_special_tokens=False).ids[0]
    unknown, special = VOCABULARY + 1, _id(BYTE_LEVEL, "<|im_end|>")
    detokenizer = Detokenizer(decode, silent={special})
    for token in [*[special] * 300, *[unknown] * 300, *[half] * 300]:
        detokenizer.add(token)
    assert longest < 200


# --- stop strings -----------------------------------------------------------------------------------


def _reference(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The match that ends first, of those the longest."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


_SMALL = st.text(alphabet="ab漢", max_size=12)


@given(
    st.lists(_SMALL, max_size=8), st.lists(st.text(alphabet="ab漢", min_size=1, max_size=5), max_size=4), st.booleans()
)
def test_stops_are_found_however_the_text_is_cut(pieces: list[str], stops: list[str], include: bool) -> None:
    expected, expected_stop = _reference("".join(pieces), stops, include)
    search = StopStrings(stops, include=include)
    emitted, stop = "", None
    for piece in pieces:
        fragment, stop = search.add(piece)
        emitted += fragment
        assert expected.startswith(emitted)  # nothing that has to be taken back
        if stop is not None:
            break
    else:
        emitted += search.flush()
    assert (emitted, stop) == (expected, expected_stop)


@given(st.lists(_SMALL, min_size=1, max_size=8), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1))
def test_only_what_may_become_a_stop_is_held(pieces: list[str], stops: list[str]) -> None:
    search = StopStrings(stops)
    seen = emitted = ""
    for piece in pieces:
        seen += piece
        fragment, stop = search.add(piece)
        emitted += fragment
        if stop is not None:
            return
        held = seen[len(emitted) :]
        longest = max(k for stop in stops for k in range(len(stop)) if seen.endswith(stop[:k]))
        assert len(held) == longest


def test_a_match_that_ends_too_early_does_not_count_but_one_that_began_early_does() -> None:
    search = StopStrings(["end"])
    assert search.add("an end, e", may_stop=False) == ("an end, ", None)
    assert search.add("nd") == ("", "end")


@pytest.mark.parametrize("length", [10, 100_000])
def test_long_stop_strings_cost_no_more_per_character(length: int) -> None:
    search = StopStrings(["a" * length + "b"])
    for _ in range(200):
        search.add("a" * 10)
    assert search.flush() == "a" * min(2000, length)
