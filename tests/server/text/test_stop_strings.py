"""Stop strings, found however the text is cut."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.stop_strings import StopStrings


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
