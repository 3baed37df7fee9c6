"""Full disks, killed processes, missing files: nothing acknowledged is lost, no partial write is visible."""

import errno
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters import disk
from adapters.disk import StorageFull
from adapters.peft_format.directory import CONFIG_NAME, WEIGHTS_NAME, AdapterSpec
from adapters.storage import files as files_module
from adapters.storage.versions import UnknownAdapter
from tests.support.publishing import Box, content_of, put, spec_of

ROOT = Path(__file__).parents[3]


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path, retain=3)
    yield box
    box.names.close()


def digest_of(content: str) -> str:
    return spec_of(content).digest


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, number: int) -> None:
    """Make the `call`-th file operation of a publication raise `OSError(number)`."""
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count == call:
                raise OSError(number, os.strerror(number))
            return real(*args)

        return wrapper

    monkeypatch.setattr(files_module, "sync", counted(disk.sync))
    monkeypatch.setattr(AdapterSpec, "save", counted(AdapterSpec.save))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", range(1, 7))
def test_a_full_disk_keeps_nothing_and_loses_nothing(
    box: Box, monkeypatch: pytest.MonkeyPatch, call: int, number: int
) -> None:
    put(box.store, "x", "one")
    with monkeypatch.context() as patch:
        fail_at(patch, call, number)
        with pytest.raises(StorageFull):
            put(box.store, "x", "two")
    assert box.on_disk() == (0, ["one"])
    assert content_of(box.store.get("t", "x")) == "one"
    assert put(box.store, "x", "two")[1]
    assert content_of(box.again().get("t", "x")) == "two"


def test_a_full_database_keeps_nothing_and_loses_nothing(box: Box) -> None:
    put(box.store, "x", "one")
    with box.names.database.transaction() as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
    published: list[str] = []

    def publish_until_full() -> None:
        for i in range(1000):
            published.append(f"n{i}")
            put(box.store, published[-1], f"c{i}")

    with pytest.raises(StorageFull):
        publish_until_full()
    failed = published.pop()
    with pytest.raises(UnknownAdapter):
        box.store.get("t", failed)
    staged, versions = box.on_disk()
    assert (staged, len(versions)) == (0, len(published) + 1)
    with box.names.database.transaction() as connection:
        connection.execute("PRAGMA max_page_count = 1000000")
    assert put(box.store, failed, "later")[1]
    assert len(box.again().list("t")) == len(published) + 2


def test_a_refused_transaction_leaves_the_store_working(box: Box) -> None:
    with box.names.database.transaction() as connection:
        connection.execute(
            "CREATE TEMP TRIGGER refuse BEFORE INSERT ON adapter_versions WHEN new.name = 'bad' "
            "BEGIN SELECT RAISE(ABORT, 'refused'); END"
        )
    with pytest.raises(sqlite3.IntegrityError):
        put(box.store, "bad", "one")
    assert box.on_disk() == (0, [])
    assert put(box.store, "good", "one")[1]
    assert [version.name for version in box.again().list("t")] == ["good"]


def test_other_faults_pass_unchanged(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_at(monkeypatch, 3, errno.EIO)
    with pytest.raises(OSError, match="Input/output error") as caught:
        put(box.store, "x", "one")
    assert not isinstance(caught.value, StorageFull)
    assert box.on_disk() == (0, [])


def test_files_of_a_dead_process_are_removed(box: Box) -> None:
    put(box.store, "x", "one")
    left = box.store.stage()
    (left.__enter__() / WEIGHTS_NAME).write_text("half")
    with box.store.stage() as placed:
        box.store._files.place(placed, digest_of("placed only"))
    assert content_of(box.again().get("t", "x")) == "one"
    assert box.on_disk() == (0, ["one"])
    assert not box.set_aside()


def test_a_name_whose_files_were_taken_away_is_not_served_by_an_older_version(
    box: Box, caplog: pytest.LogCaptureFixture
) -> None:
    put(box.store, "x", "one")
    version, _ = put(box.store, "x", "two")
    version.path.rename(box.root / "elsewhere")
    store = box.again()
    assert "missing" in caplog.text
    with pytest.raises(UnknownAdapter):
        store.get("t", "x")
    (box.root / "elsewhere").rename(version.path)
    assert [content_of(version) for version in box.again().versions("t", "x")] == ["two", "one"]


def test_a_store_keeps_at_least_the_current_version(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Box(tmp_path, retain=0)


def test_kill_at_any_moment_loses_nothing_acknowledged_and_shows_nothing_half_written(tmp_path: Path) -> None:
    random_source = random.Random(0)
    first = 1
    state: dict[str, str] = {}
    for _ in range(8):
        program = [sys.executable, "-m", "tests.support.publishing", str(tmp_path), str(first)]
        with subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            time.sleep(random_source.uniform(0.0, 0.2))
            child.kill()
            acknowledged = child.stdout.read().splitlines()
        assert child.returncode == -signal.SIGKILL

        last = first - 1
        for line in acknowledged:
            action, number = line.split()
            last = int(number)
            state[f"n{last % 5}"] = f"c{last}" if action == "put" else ""
        # One change may have been in progress: the next publication, or a deletion not yet acknowledged.
        allowed = {name: {content} for name, content in state.items()}
        allowed.setdefault(f"n{(last + 1) % 5}", {""}).add(f"c{last + 1}")
        if acknowledged and last % 7 == 0:
            allowed[f"n{last % 5}"].add("")

        box = Box(tmp_path, retain=2)
        found = {version.name: version for version in box.store.list("t")}
        for name, contents in allowed.items():
            assert (content_of(found[name]) if name in found else "") in contents
        assert found.keys() <= allowed.keys()
        for version in found.values():
            assert AdapterSpec.read(version.path) == spec_of(content_of(version))
            assert (version.path / CONFIG_NAME).read_text() == "{}"
        retained = {content_of(version) for name in found for version in box.store.versions("t", name)}
        assert box.on_disk() == (0, sorted(retained))
        assert not box.set_aside(), "files of unacknowledged uploads are recognised as such"
        box.names.close()
        state = {name: content_of(found[name]) if name in found else "" for name in allowed}
        first = last + 2
