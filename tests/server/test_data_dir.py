"""Starting with a damaged data directory: intact versions are served, and nothing is deleted on a guess."""

import errno
import fcntl
import json
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapters.peft_format import packed_rows
from adapters.peft_format.directory import WEIGHTS_NAME
from adapters.peft_format.inspection import inspect
from adapters.storage.names import LocalNames
from adapters.storage.store import AdapterStore
from adapters.storage.versions import DamagedAdapter, Version
from server import data_dir
from server.cli import app
from server.settings import SettingError
from tests.support.harness import base_info, write_adapter

BASE = base_info()


@contextmanager
def opened(root: Path) -> Iterator[AdapterStore]:
    """Open the store of a data directory as a server does."""
    with closing(data_dir.open_names(root, 0.5)) as names:
        yield AdapterStore(root / "adapters", names)


def put(store: AdapterStore, name: str, seed: int) -> Version:
    with store.stage() as staging:
        write_adapter(staging, seed)
        spec = inspect(staging, BASE.linears, BASE.architecture)
        packed_rows.write(staging, spec)
        return store.publish("", name, staging, spec)[0]


@pytest.fixture
def kept(tmp_path: Path) -> dict[str, list[str]]:
    """The digests of three names, current ones first; one name has two versions and is rolled back to the older one."""
    with opened(tmp_path) as store:
        put(store, "a", 1)
        put(store, "b", 2)
        put(store, "b", 3)
        store.roll_back("", "b")
        put(store, "c", 1)
        store.pin("", "c", pinned=True)
        return meaning(store)


def meaning(store: AdapterStore) -> dict[str, list[str]]:
    names = [version.name for version in store.list("")]
    return {name: [version.digest for version in store.versions("", name)] for name in names}


def remove_database(root: Path) -> None:
    for path in root.glob("adapters.db*"):
        path.unlink()


def empty_database(root: Path) -> None:
    remove_database(root)
    (root / "adapters.db").touch()


def doctor(root: Path, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", "--data-dir", str(root), *arguments])
    return result.exit_code, result.output + (str(result.exception) if result.exit_code else "")


def set_aside(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "lost+found").glob("*/*"))


# --- files unknown to the database ------------------------------------------------------------------------


@pytest.mark.parametrize("lose", [remove_database, empty_database])
def test_a_lost_database_costs_no_version_and_the_doctor_brings_all_back(
    tmp_path: Path, kept: dict[str, list[str]], caplog: pytest.LogCaptureFixture, lose: object
) -> None:
    assert callable(lose)
    lose(tmp_path)
    with opened(tmp_path) as store:
        assert meaning(store) == {}
    assert len(set_aside(tmp_path)) == 3
    (line,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "3 entries" in line
    assert "lorakeet doctor" in line

    code, listed = doctor(tmp_path)
    assert code == 0
    assert all(name in listed for name in set_aside(tmp_path))
    assert {name for row in doctor(tmp_path, "--json")[1].splitlines() for name in json.loads(row)["names"]} == {*"abc"}
    assert doctor(tmp_path, "--restore", "--all")[0] == 0
    with opened(tmp_path) as store:
        assert meaning(store) == kept
        assert store.is_pinned("", "c")
        assert not store.is_pinned("", "a")
    assert not set_aside(tmp_path)


def test_the_doctor_restores_one_entry_as_an_older_version_and_removes_one(
    tmp_path: Path, kept: dict[str, list[str]]
) -> None:
    remove_database(tmp_path)
    with opened(tmp_path) as store:
        newer = put(store, "b", 9).digest
    chosen, other = (digest.removeprefix("sha256:") for digest in kept["b"])
    assert "--all" in doctor(tmp_path, "--remove")[1]
    assert "no item of this id" in doctor(tmp_path, "--remove", "nobody")[1]
    assert doctor(tmp_path, "--restore", chosen)[0] == 0
    assert doctor(tmp_path, "--remove", other)[0] == 0
    with opened(tmp_path) as store:
        assert meaning(store)["b"] == [newer, f"sha256:{chosen}"]
    assert set_aside(tmp_path) == [kept["a"][0].removeprefix("sha256:")]


def test_the_doctor_keeps_its_hands_off_a_directory_in_use(tmp_path: Path, kept: dict[str, list[str]]) -> None:
    with data_dir.locked(tmp_path):
        code, said = doctor(tmp_path, "--remove", "--all")
        assert code != 0
        assert "another server" in said


def test_a_disk_without_locks_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(SettingError, match=r"cannot be locked \(No locks available\)"), data_dir.locked(tmp_path):
        pass


def test_versions_of_earlier_releases_without_records_are_kept_too(
    tmp_path: Path, kept: dict[str, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    for path in (*tmp_path.rglob("files.json"), *tmp_path.rglob("names/*")):
        path.unlink()
    with opened(tmp_path) as store:
        assert meaning(store) == kept
    assert len(list(tmp_path.rglob("names/*"))) == 4, "each directory lists its names again"
    assert not set_aside(tmp_path)


# --- damaged files and databases -------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [b"no database at all" * 500, None])
def test_a_malformed_database_is_set_aside_and_made_anew(
    tmp_path: Path, kept: dict[str, list[str]], caplog: pytest.LogCaptureFixture, junk: bytes | None
) -> None:
    path = tmp_path / "adapters.db"
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096) if junk is None else junk)
    with opened(tmp_path) as store:
        assert meaning(store) == kept
        assert store.is_pinned("", "c")
    assert len(list(tmp_path.glob("adapters.db.damaged-*"))) == 1
    assert not set_aside(tmp_path)
    (line,) = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert "set aside as adapters.db.damaged-" in line
    with opened(tmp_path) as store:
        assert meaning(store) == kept
    assert "damaged database" in doctor(tmp_path)[1]


def test_a_receipt_that_cannot_be_read_is_made_anew(
    tmp_path: Path, kept: dict[str, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path) as store:
        receipt = store.get("", "a").receipt
    with closing(sqlite3.connect(tmp_path / "adapters.db", isolation_level=None)) as database:
        database.execute("UPDATE adapter_versions SET receipt = '{\"ran' WHERE name = 'a'")
    with opened(tmp_path) as store:
        assert meaning(store) == kept
        assert store.get("", "a").receipt == receipt
    assert "the receipt of adapter a could not be read" in caplog.text


def test_a_row_that_cannot_be_read_costs_its_name_alone(
    tmp_path: Path, kept: dict[str, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    with closing(sqlite3.connect(tmp_path / "adapters.db", isolation_level=None)) as database:
        database.execute("UPDATE adapter_versions SET created = 'yesterday' WHERE name = 'a'")
        database.execute("INSERT INTO adapter_splits VALUES ('', 'c', 'half and half')")
    with opened(tmp_path) as store:
        assert meaning(store) == {name: digests for name, digests in kept.items() if name != "a"}
    assert "adapter a is not served" in caplog.text
    assert "the split of adapter c cannot be read" in caplog.text
    assert not set_aside(tmp_path)


@pytest.mark.parametrize("place", ["staging", "versions"])
def test_a_plain_file_in_the_place_of_a_directory(tmp_path: Path, kept: dict[str, list[str]], place: str) -> None:
    directory = tmp_path / "adapters" / place
    if place == "versions":
        directory.rename(tmp_path / "elsewhere")
    else:
        directory.rmdir()
    directory.write_text("what is this?")
    with opened(tmp_path) as store:
        assert meaning(store) == (kept if place == "staging" else {})
        put(store, "new", 7)
    assert (tmp_path / "lost+found" / place).read_text() == "what is this?"


@pytest.mark.parametrize("place", ["staging", "versions"])
def test_a_plain_file_among_directories(tmp_path: Path, kept: dict[str, list[str]], place: str) -> None:
    (tmp_path / "adapters" / place / "notes.txt").write_text("mine")
    with opened(tmp_path) as store:
        assert meaning(store) == kept
    assert set_aside(tmp_path) == (["notes.txt"] if place == "versions" else [])


def test_a_newer_layout_is_one_line(tmp_path: Path, kept: dict[str, list[str]]) -> None:
    with closing(sqlite3.connect(tmp_path / "adapters.db")) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(SettingError, match=r"--data-dir: adapters.db was written by a newer release \(layout 99\)"):
        data_dir.open_names(tmp_path, 0.5)
    assert len(list((tmp_path / "adapters" / "versions").iterdir())) == 3


def test_the_doctor_verifies_everything(tmp_path: Path, kept: dict[str, list[str]]) -> None:
    assert doctor(tmp_path, "--verify") == (0, "")
    a, b = (tmp_path / "adapters" / "versions" / kept[name][0].removeprefix("sha256:") for name in "ab")
    flip(a / packed_rows.ROWS_NAME)
    flip(b / WEIGHTS_NAME)
    code, said = doctor(tmp_path, "--verify")
    assert code == 1
    first, second = sorted(said.splitlines()[:2], key=lambda line: a.name not in line)
    assert "rows.bin: damaged; its weights are undamaged: the server mends it" in first
    assert "adapter_model.safetensors: damaged; upload it again" in second


def test_rows_are_made_anew_from_the_weights_and_no_more_than_that(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        version = put(store, "a", 1)
        rows = version.path / packed_rows.ROWS_NAME
        before = rows.read_bytes()
        flip(rows)
        store.mend(version)
        assert rows.read_bytes() == before
        flip(version.path / WEIGHTS_NAME)
        with pytest.raises(DamagedAdapter, match="their digest is"):
            store.mend(version)
        assert not store.has(version)
        assert put(store, "a", 1) == version
        assert store.has(version)


def flip(path: Path, place: int = -100) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# --- disks that cannot be written -----------------------------------------------------------------------


@contextmanager
def mounted(path: Path, size: str) -> Iterator[None]:
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs to mount a tmpfs, which only root may (and not in every container)")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(path: Path) -> None:
    """Fill the disk with one file."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_disk_that_takes_nothing_serves_what_it_has_and_takes_more_when_it_can(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "data"
    with mounted(root, "4m"):
        with opened(root) as store:
            put(store, "a", 1)
            before = meaning(store)
        if fault == "full":
            fill(root / "filler")
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        with data_dir.locked(root), opened(root) as store:
            assert meaning(store) == before
            with pytest.raises(OSError, match=r"full|read-only|No space"):
                put(store, "b", 2)
            with store.lease(store.get("", "a")) as version:
                assert (version.path / WEIGHTS_NAME).read_bytes()
            if fault == "full":
                (root / "filler").unlink()
            else:
                subprocess.run(["mount", "-o", "remount,rw", str(root)], check=True)
            put(store, "b", 2)
            after = meaning(store)
        with opened(root) as store:
            assert meaning(store) == after
            assert after.keys() == {"a", "b"}
    assert "read only, until it can be written" in caplog.text


# --- locked databases -----------------------------------------------------------------------


def test_a_database_that_another_process_holds_at_start_is_read_all_the_same(
    tmp_path: Path, kept: dict[str, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    with closing(sqlite3.connect(tmp_path / "adapters.db", isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        other.execute("DELETE FROM adapter_pins WHERE name = 'nobody'")
        with opened(tmp_path) as store:
            assert meaning(store) == kept
            other.execute("COMMIT")
            other.close()
            store.delete("", "a")
    with closing(LocalNames(tmp_path / "adapters.db")) as names:
        assert {pointer.current.name for pointer in names.load(Path)} == {"b", "c"}
    assert "another process holds adapters.db" in caplog.text
