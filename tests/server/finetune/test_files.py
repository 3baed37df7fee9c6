"""Files: durable, listed in order, private to their tenant."""

from pathlib import Path

import pytest

from adapters.storage.database import Database, UnknownCursorError
from server.finetune import restore
from server.finetune.database import open_database
from server.finetune.files import FileStore, StoredFile, UnknownFileError


def _add(store: FileStore, content: bytes = b"x", tenant: str = "", purpose: str = "fine-tune") -> StoredFile:
    with store.staging() as directory:
        source = directory / "upload"
        source.write_bytes(content)
        return store.add(tenant, source, filename="data.jsonl", purpose=purpose, report={"examples": 1})


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "files", open_database(tmp_path / "db.sqlite3"))


def test_a_file_survives_the_process(tmp_path: Path) -> None:
    database = open_database(tmp_path / "db.sqlite3")
    added = _add(FileStore(tmp_path / "files", database), b"content")
    database.close()
    again = FileStore(tmp_path / "files", open_database(tmp_path / "db.sqlite3"))
    assert again.get("", added.id) == added
    assert again.get("", added.id).path.read_bytes() == b"content"


def test_unacknowledged_files_are_removed_at_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies before a row is written, and after one was deleted: in both cases the bytes are removed."""
    database = open_database(tmp_path / "db.sqlite3")
    store = FileStore(tmp_path / "files", database)
    kept, deleted = _add(store), _add(store)
    (tmp_path / "files" / "staging" / "half").write_bytes(b"hal")
    with monkeypatch.context() as patch:
        patch.setattr(FileStore, "_remove", lambda *_: None)
        store.delete("", deleted.id)
        patch.setattr(Database, "transaction", _killed)
        with pytest.raises(Killed):
            _add(store)
    assert len(list((tmp_path / "files").glob("file-*"))) == 3
    again = FileStore(tmp_path / "files", open_database(tmp_path / "db.sqlite3"))
    assert {path.name for path in (tmp_path / "files").rglob("file-*")} == {kept.id, f"{kept.id}.json"}
    assert not list((tmp_path / "files" / "staging").iterdir())
    assert not (tmp_path / "lost+found").exists()
    assert again.page("", limit=10)[0] == [kept]


class Killed(Exception):
    """The death of the process."""


def _killed(self: Database) -> None:
    raise Killed


@pytest.mark.parametrize("lost", ["missing", "empty"])
def test_a_lost_database_costs_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture, lost: str) -> None:
    database = open_database(tmp_path / "finetuning.db")
    added = _add(FileStore(tmp_path / "files", database), b"content")
    database.close()
    for path in tmp_path.glob("finetuning.db*"):
        path.unlink()
    if lost == "empty":
        (tmp_path / "finetuning.db").touch()
    assert FileStore(tmp_path / "files", open_database(tmp_path / "finetuning.db")).page("", limit=1)[0] == []
    assert (tmp_path / "lost+found" / "files" / added.id).read_bytes() == b"content"
    assert "lorakeet doctor" in caplog.text


def test_files_are_known_again_after_their_database_was_damaged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database = open_database(tmp_path / "finetuning.db")
    added = _add(FileStore(tmp_path / "files", database), b"content")
    database.close()
    (tmp_path / "finetuning.db").write_bytes(b"no database" * 1000)
    again = FileStore(tmp_path / "files", restore.open_or_rebuild(tmp_path, 5.0))
    assert again.page("", limit=9)[0] == [added]
    assert len(list(tmp_path.glob("finetuning.db.damaged-*"))) == 1
    assert "1 files and 0 jobs were restored" in caplog.text


def test_pages(store: FileStore) -> None:
    files = [_add(store) for _ in range(5)]
    results = _add(store, purpose="fine-tune-results")
    newest, more = store.page("", limit=2)
    assert ([f.id for f in newest], more) == ([results.id, files[4].id], True)
    rest, more = store.page("", limit=10, after=newest[-1].id)
    assert ([f.id for f in rest], more) == ([f.id for f in files[3::-1]], False)
    assert [f.id for f in store.page("", limit=9, newest_first=False)[0]] == [*(f.id for f in files), results.id]
    assert store.page("", limit=9, purpose="fine-tune-results") == ([results], False)
    with pytest.raises(UnknownCursorError):
        store.page("", limit=9, after="file-nope")


def test_delete(store: FileStore) -> None:
    added = _add(store)
    with added.path.open("rb") as reader:
        store.delete("", added.id)
        assert reader.read() == b"x"
    assert not added.path.exists()
    with pytest.raises(UnknownFileError):
        store.get("", added.id)
    with pytest.raises(UnknownFileError):
        store.delete("", added.id)


def test_tenants_do_not_see_each_other(store: FileStore) -> None:
    mine = _add(store, tenant="a")
    assert store.page("b", limit=9) == ([], False)
    with pytest.raises(UnknownFileError):
        store.get("b", mine.id)
    with pytest.raises(UnknownFileError):
        store.delete("b", mine.id)
    with pytest.raises(UnknownCursorError):
        store.page("b", limit=9, after=mine.id)
