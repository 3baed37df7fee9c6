"""Allowed names of adapters."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.peft_format.fields import AdapterError
from adapters.storage.versions import check_name
from tests.support.publishing import Box, put


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path, retain=3)
    yield box
    box.names.close()


@pytest.mark.parametrize("name", ["a", "0", "legal-v1.2_final", "org/adapter", "support:v2", "A" * 128])
def test_names_that_are_allowed(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "-x",
        "_x",
        "a//b",
        "a/.b",
        "a/versions",
        "a\\b",
        "../x",
        "a b",
        "a\n",
        "a\0",
        "ü",
        "a@b",
        "a:",
        "A" * 129,
        "ft:x:y:z",
    ],
)
def test_names_that_are_not(name: str, box: Box) -> None:
    with pytest.raises(AdapterError) as caught:
        put(box.store, name, "x")
    assert caught.value.param == "name"
    assert box.on_disk() == (0, [])


def test_names_of_fine_tunes_need_the_flag(box: Box) -> None:
    assert put(box.store, "ft:base:mine:ab12cd:ckpt-step-5", "x", fine_tuned=True)[1]
    for name in "mine", "ft:", "ft:base", "ft:base:a/b", "ft:base:..\n":
        with pytest.raises(AdapterError):
            put(box.store, name, "x", fine_tuned=True)
