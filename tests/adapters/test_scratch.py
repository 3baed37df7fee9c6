"""Temporary directories: removed at exit, or at the next start after a kill."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from adapters.scratch import remove_stale, scratch

HOLD = """
import time
from adapters.scratch import scratch
with scratch() as path:
    (path / "engine.sock").touch()
    print(path, flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_it_is_gone_at_the_end() -> None:
    with scratch() as path:
        (path / "folder").mkdir()
        assert remove_stale() == []
        assert path.is_dir()
    assert not path.exists()


def test_a_socket_finds_room_however_long_the_way_is(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with scratch("a.sock") as path:
        assert path.parent == temporary
    (far := temporary / ("far" * 40)).mkdir()
    (near := temporary / "near").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(far))
    monkeypatch.setattr("adapters.scratch._SHORT", str(near))
    with scratch() as path:
        assert path.parent == far
    with scratch("a.sock") as path:
        assert path.parent == near
        assert list(far.iterdir()) == remove_stale() == []
        (near / "lorakeet-killed").mkdir()
        (near / "lorakeet-killed/.lock").touch()
        assert remove_stale() == [near / "lorakeet-killed"]


def test_directories_of_killed_processes_are_removed_and_of_live_ones_kept(temporary: Path) -> None:
    holders = [subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        left, used = (Path((holder.stdout or sys.stdin).readline().strip()) for holder in holders)
        holders[0].kill()
        holders[0].wait()
        (temporary / "lorakeet-data").mkdir()  # a user's own directory
        (temporary / "lorakeet-file").touch()
        (temporary / "lorakeet-link").symlink_to(used)
        assert left.exists()
        assert remove_stale() == [left]
        assert not left.exists()
        assert (used / "engine.sock").exists()
        assert (temporary / "lorakeet-data").exists()
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()
    assert remove_stale() == [used]
