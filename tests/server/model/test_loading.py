"""The cached copy of a quantised base."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from server.model import experts, loading
from server.model.base import UnservableModel


def base(*, by: Path | None = None) -> Any:
    """A base that writes a file. `by`: another process has put its copy there in the meantime."""

    def save_pretrained(directory: Path) -> None:
        Path(directory).mkdir()
        (directory / "config.json").write_text("ours")
        if by is not None:
            by.mkdir(parents=True)
            (by / "config.json").write_text("theirs")

    return cast("Any", SimpleNamespace(save_pretrained=save_pretrained))


@pytest.fixture(autouse=True)
def no_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "save", lambda *_: None)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnservableModel, match=r"could not be written to the cache: .*file"):
        loading._save_atomically(base(), tmp_path / "file/quantized/copy")


def test_it_is_there_whole_for_all_whom_the_umask_lets(tmp_path: Path) -> None:
    target, before = tmp_path / "quantized/copy", os.umask(0o022)
    try:
        loading._save_atomically(base(), target)
    finally:
        os.umask(before)
    assert (target / "config.json").read_text() == "ours"
    assert target.stat().st_mode & 0o777 == 0o755
    assert list(target.parent.iterdir()) == [target]


def test_another_processs_copy_is_as_good(tmp_path: Path) -> None:
    target = tmp_path / "quantized/copy"
    loading._save_atomically(base(by=target), target)
    assert (target / "config.json").read_text() == "theirs"
    assert list(target.parent.iterdir()) == [target]
