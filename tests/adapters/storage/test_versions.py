"""Pointers: shares of a split, their assignment to users, and retention."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.peft_format.fields import AdapterError
from adapters.storage.versions import AmbiguousDigest, Pointer, UnknownAdapter, Version

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")


def version(digest: str, staged: bool = False) -> Version:
    return Version("", "x", digest, Path("/nowhere"), 0.0, {}, staged)


NAME = Pointer((version(A), version(B), version(C, staged=True)))


def test_without_a_split_the_current_version_answers_everyone() -> None:
    assert {NAME.choose().digest, NAME.choose("ann").digest} == {A}
    assert NAME.shares == {A: 1.0}
    assert NAME.etag == A


def test_a_split_gives_each_version_its_share_and_each_user_always_the_same() -> None:
    split = NAME.with_split({A: 0.9, B: 0.1})
    users = [f"user-{i}" for i in range(4000)]
    chosen = {user: split.choose(user).digest for user in users}
    counts = Counter(chosen.values())
    assert abs(counts[B] / len(users) - 0.1) < 0.02
    assert all(split.choose(user).digest == digest for user, digest in chosen.items())
    assert {split.choose().digest for _ in range(500)} == {A, B}

    grown = NAME.with_split({A: 0.7, B: 0.3})
    assert all(grown.choose(user).digest == B for user, digest in chosen.items() if digest == B)


@given(st.lists(st.integers(1, 100), min_size=2, max_size=3), st.text())
def test_every_user_gets_a_version_under_any_shares(numbers: list[int], user: str) -> None:
    total = sum(numbers)
    shares = {digest: number / total for digest, number in zip((A, B, C), numbers, strict=False)}
    assert NAME.with_split(shares).choose(user).digest in shares


def test_etags_tell_splits_apart() -> None:
    splits = [NAME.with_split(shares) for shares in ({A: 0.9, B: 0.1}, {A: 0.1, B: 0.9}, {A: 0.9, C: 0.1})]
    assert len({NAME.etag, *(split.etag for split in splits)}) == 4
    assert NAME.with_split({A: 0.9, B: 0.1}).etag == splits[0].etag


def test_a_split_of_one_is_a_promotion() -> None:
    assert NAME.with_split({C: 1.0, A: 0.0}) == NAME.promoted(C)
    assert NAME.promoted(C).etag == C
    assert NAME.promoted(C).previous == version(A)


@pytest.mark.parametrize(
    "shares",
    [
        {},
        {A: 0.5},
        {A: 1.5, B: -0.5},
        {A: float("nan"), B: 0.5},
        {A: 0.5, A.removeprefix("sha256:"): 0.5},
        {f"sha256:{i:064x}": 1 / 1000 for i in range(1000)},
    ],
)
def test_shares_that_make_no_sense(shares: dict[str, float]) -> None:
    with pytest.raises(AdapterError) as caught:
        NAME.with_split(shares)
    assert caught.value.param == "split"


def test_digests_that_are_no_version() -> None:
    for digest in ("", "sha256:", "sha256:aaaaaaa", "d" * 64, A + "0", "sha256:sha256:aaaaaaaa", "é" * 8):
        with pytest.raises(UnknownAdapter):
            NAME.with_split({digest: 1.0})
    twins = Pointer((version("sha256:" + "a" * 10 + "0"), version("sha256:" + "a" * 10 + "1")))
    with pytest.raises(AmbiguousDigest):
        twins.with_split({"a" * 10: 1.0})


def test_the_version_before_is_one_that_has_answered() -> None:
    assert NAME.previous == version(B)
    assert Pointer((version(A), version(C, staged=True))).previous is None


@pytest.mark.parametrize(
    ("count", "keep", "kept"),
    [(1, A, [A]), (1, C, [A, C]), (2, A, [A, B]), (2, C, [A, C]), (3, A, [A, B, C]), (9, A, [A, B, C])],
)
def test_retention_keeps_what_is_needed_then_the_newest(count: int, keep: str, kept: list[str]) -> None:
    assert [version.digest for version in NAME.retained(count, keep)] == kept
