"""Copying files by names from outside: nothing beyond one directory is read, even if links change in the meantime."""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from adapters.peft_format.fields import AdapterError
from adapters.storage.copying import copy_files

NAMES = ("a", "b")


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, Path]:
    """A root with a directory of two files, an empty target, and a secret beside the root."""
    (tmp_path / "root" / "dir").mkdir(parents=True)
    (tmp_path / "target").mkdir()
    (tmp_path / "secret").write_text("secret")
    for name in NAMES:
        (tmp_path / "root" / "dir" / name).write_text(name)
    return tmp_path / "root", tmp_path / "target"


def copied(world: tuple[Path, Path], directory: str = "dir") -> dict[str, str]:
    root, target = world
    copy_files(NAMES, root / directory, target, root)
    return {path.name: path.read_text() for path in target.iterdir()}


def test_plain_files_and_links_inside(world: tuple[Path, Path]) -> None:
    root, _ = world
    (root / "dir" / "b").unlink()
    (root / "dir" / "b").symlink_to("../blob")
    (root / "blob").write_text("blob")
    (root / "link").symlink_to("dir")
    assert copied(world, "link") == {"a": "a", "b": "blob"}


def test_missing_files_are_skipped(world: tuple[Path, Path]) -> None:
    (world[0] / "dir" / "b").unlink()
    assert copied(world) == {"a": "a"}


@pytest.mark.parametrize("target", ["../../secret", "/etc/passwd", "nothing", "b", "../../no/such"])
def test_links_to_elsewhere(target: str, world: tuple[Path, Path]) -> None:
    (world[0] / "dir" / "b").unlink()
    (world[0] / "dir" / "b").symlink_to(target)
    with pytest.raises(AdapterError, match="b does not exist, or lies outside"):
        copied(world)


def test_a_special_file_is_refused(world: tuple[Path, Path]) -> None:
    (world[0] / "dir" / "b").unlink()
    os.mkfifo(world[0] / "dir" / "b")
    with pytest.raises(AdapterError, match="not a regular file"):
        copied(world)


def test_a_link_slipped_in_after_the_look(world: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root, _ = world
    resolve = Path.resolve

    def slow(path: Path, *args: Any) -> Path:
        found = resolve(path, *args)
        if path.name == "b":
            shutil.rmtree(root / "dir")
            (root / "dir").symlink_to(root.parent / "other")
            (root.parent / "other").mkdir()
            (root.parent / "other" / "b").write_text("secret")
        return found

    monkeypatch.setattr(Path, "resolve", slow)
    with pytest.raises(AdapterError, match="does not exist, or lies outside"):
        copied(world)


def test_a_file_that_changes_while_it_is_copied(world: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copyfileobj

    def slow(source: Any, *args: Any) -> None:
        copy(source, *args)
        writer = threading.Thread(target=lambda: (world[0] / "dir" / "a").write_text("changed"))
        writer.start()
        writer.join()

    monkeypatch.setattr(shutil, "copyfileobj", slow)
    with pytest.raises(AdapterError, match="changed while"):
        copied(world)


def test_another_users_file_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root, as which tests may run, can read every file."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "copy").mkdir()
    really = os.open

    def refusing(path: str, flags: int, **more: int) -> int:
        if path == "file":
            raise PermissionError(13, "Permission denied", path)
        return really(path, flags, **more)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(AdapterError, match="file may not be read by the server's user"):
        copy_files(["file"], tmp_path, tmp_path / "copy", Path("/"))
