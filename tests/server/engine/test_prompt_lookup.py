"""Drafts compared with a search through the whole text, and the drafter's learning from rejected drafts."""

import random

from hypothesis import given
from hypothesis import strategies as st

from server.engine.prompt_lookup import SIZES, Drafter

texts = st.lists(st.integers(0, 3), max_size=40)


def search(tokens: list[int], count: int) -> list[int]:
    """The tokens after the latest earlier occurrence of the longest suffix that has one."""
    for size in SIZES:
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[len(tokens) - size :]:
                longer = list(tokens)
                for _ in range(count):  # continues periodically
                    longer.append(longer[len(longer) - len(tokens) + start + size])
                return longer[len(tokens) :]
    return []


@given(text=texts, pieces=st.lists(texts, max_size=5), most=st.integers(1, 8))
def test_it_finds_what_a_search_finds(text: list[int], pieces: list[list[int]], most: int) -> None:
    drafter, tokens = Drafter(most), list(text)
    assert drafter.draft(tokens, most, 0.0) == search(tokens, most)
    for piece in pieces:
        tokens += piece
        assert drafter.draft(tokens, most, 0.0) == search(tokens, most)


@given(text=texts, most=st.integers(0, 8), price=st.floats(0, 1))
def test_a_draft_is_a_part_of_it(text: list[int], most: int, price: float) -> None:
    draft = Drafter(8).draft(text, most, price)
    assert len(draft) <= most
    assert draft == search(text, 8)[: len(draft)]


def test_a_dearer_draft_is_a_shorter_one() -> None:
    text = [1, 2, 3, 4] * 3
    lengths = [len(Drafter(8).draft(text, 8, price)) for price in (0.0, 0.1, 0.3, 0.6)]
    assert lengths == [8, 3, 1, 0]


def test_it_stops_where_a_text_does_not_repeat_itself_and_starts_again_where_it_does() -> None:
    draw = random.Random(0)
    drafter, tokens, price = Drafter(4), [1, 2] * 8, 0.2
    drafted = []
    for token in [*(draw.randrange(3) for _ in range(100)), *[1, 2, 0, 2] * 20]:
        drafted.append(len(drafter.draft(tokens, 4, price)))
        drafter.learn([token])  # the first sampled token: the only evidence when nothing was computed
        tokens.append(token)
    wild, tame = drafted[20:100], drafted[-20:]
    assert sum(wild) < 0.5 * len(wild) * 4
    assert tame == [4] * 20


def test_each_draft_counts_until_the_first_that_is_wrong() -> None:
    text, price = [1, 2, 3, 4] * 3, 0.3
    for drawn, expected in (([1, 2, 3, 4, 1], 3), ([1, 2, 9], 1), ([9], 1), ([], 1)):
        drafter = Drafter(4)
        drafter.draft(text, 4, price)
        drafter.learn(drawn)
        assert len(drafter.draft(text, 4, price)) == expected, drawn


def test_a_proposal_counts_once() -> None:
    drafter, text = Drafter(4), [1, 2, 3, 4] * 3
    drafter.draft(text, 4, 0.0)
    for _ in range(50):
        drafter.learn([9])
    assert drafter.draft(text, 4, 0.3)
