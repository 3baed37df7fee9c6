"""Text that grows token by token: incremental decoding."""

from collections.abc import Callable, Sequence
from itertools import chain

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from server.text.detokenizer import Detokenizer
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
