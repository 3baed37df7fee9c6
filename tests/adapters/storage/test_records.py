"""Records in a bucket under concurrent changes: none is lost, none is made twice, and all servers see the same."""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from adapters.storage import records as module
from adapters.storage.bucket import Bucket, Conflict
from adapters.storage.records import Content, Record, Records
from adapters.storage.versions import RemoteUnavailable
from tests.support.buckets import S3Server
from tests.support.threads import together


def opened(store_url: str) -> Records:
    return Records(Bucket(store_url), "records")


def adding(number: int) -> Callable[[Content | None], Content]:
    return lambda content: {"all": [*(content or {"all": []})["all"], number]}


def known(records: Records, kept: dict[str, Any]) -> dict[str, Any]:
    """The knowledge of a server that keeps `kept` in memory, after reading the changes."""
    for record in records.fetch_changes():
        if records.remember(record):
            if record.content is None:
                kept.pop(record.key, None)
            else:
                kept[record.key] = record.content
    return kept


def test_a_record_is_made_changed_and_removed(store_url: str) -> None:
    first, second = opened(store_url), opened(store_url)
    mine: dict[str, Any] = {}
    assert first.change("a/b", adding(1)).content == {"all": [1]}
    assert known(second, mine) == {"a/b": {"all": [1]}}
    second.change("a/b", adding(2))
    assert list(second.fetch_changes()) == []  # its own change
    assert known(first, {}) == {"a/b": {"all": [1, 2]}}
    first.change("a/b", lambda content: None)
    assert known(second, mine) == {}
    assert first.change("a/b", adding(3)).content == {"all": [3]}
    assert known(second, mine) == {"a/b": {"all": [3]}}


def test_a_change_without_effect_is_not_written(store_url: str) -> None:
    records = opened(store_url)
    records.change("a", adding(1))
    before = records.fetch("a")
    records.change("a", lambda content: content)
    assert records.fetch("a").revision == before.revision
    records.change("b", lambda content: None)
    assert records.fetch("b").version is None


def test_a_change_that_raises_changes_nothing(store_url: str) -> None:
    records = opened(store_url)
    records.change("a", adding(1))

    def refuse(content: Content | None) -> Content:
        raise KeyError("no")

    with pytest.raises(KeyError):
        records.change("a", refuse)
    assert records.fetch("a").content == {"all": [1]}


def changed_by_several(store_url: str, servers: int, changes: int, keys: int) -> None:
    """Append on several servers, each its own numbers, to a few records, and remove and recreate others."""
    barrier, faults = threading.Barrier(servers), []

    def work(server: int) -> None:
        records, draw = opened(store_url), random.Random(server)
        barrier.wait()
        try:
            for i in range(changes):
                records.change(f"kept{draw.randrange(keys)}", adding(server * changes + i))
                if i % 10 == 0:
                    records.change("flicker", lambda content: None if content else {"by": server})
        except Exception as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work, args=(server,)) for server in range(servers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    made = [
        number for key, content in known(opened(store_url), {}).items() if key != "flicker" for number in content["all"]
    ]
    assert sorted(made) == list(range(servers * changes))
    for server in range(servers):  # each record holds a server's changes in the order in which it made them
        for content in (content for key, content in known(opened(store_url), {}).items() if key != "flicker"):
            own = [number for number in content["all"] if number // changes == server]
            assert own == sorted(own)


@pytest.mark.parametrize("servers", [2, 4])
def test_no_change_is_lost(store_url: str, servers: int) -> None:
    changed_by_several(store_url, servers, 80 // servers if store_url.startswith("s3") else 200 // servers, keys=3)


def test_no_change_is_lost_or_made_twice_while_the_store_fails(store_url: str, s3: S3Server) -> None:
    if store_url.startswith("file"):
        pytest.skip("the faults are a network's")
    s3.suffer(("lost", "PUT", "records/", 3), ("busy", "PUT", "records/", 4), ("busy", "GET", "records/", 7))
    changed_by_several(store_url, 2, 20, keys=2)


def test_an_answer_that_was_lost_for_good_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = opened(f"file://{tmp_path}")
    put_if = Bucket.put_if

    def lose(*args: Any) -> None:
        put_if(*args)
        raise RemoteUnavailable("no answer")

    monkeypatch.setattr(Bucket, "put_if", lose)
    assert records.change("a", adding(1)).content == {"all": [1]}
    assert records.change("a", adding(2)).content == {"all": [1, 2]}


def test_a_second_try_that_meets_its_own_change_is_no_conflict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if others have changed the record since."""
    records, other = opened(f"file://{tmp_path}"), opened(f"file://{tmp_path}")
    put_if, tries = Bucket.put_if, []

    def twice(self: Bucket, *args: Any) -> str | None:
        tries.append(args)
        if len(tries) > 1:
            return put_if(self, *args)
        put_if(self, *args)
        for number in range(2, 10):
            other.change("a", adding(number))
        raise Conflict("it is there already")

    monkeypatch.setattr(Bucket, "put_if", twice)
    assert records.change("a", adding(1)).content == {"all": list(range(1, 10))}


def test_a_write_that_is_refused_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On top of the changes made by others in the meantime."""
    records, other = opened(f"file://{tmp_path}"), opened(f"file://{tmp_path}")
    put_if = Bucket.put_if
    refused: list[object] = []

    def busy(self: Bucket, *args: Any) -> str | None:
        if len(refused) == 2:
            return put_if(self, *args)
        refused.append(args)
        if len(refused) == 2:
            with monkeypatch.context() as patch:
                patch.setattr(Bucket, "put_if", put_if)
                other.change("a", adding(1))
        raise RemoteUnavailable("busy")

    monkeypatch.setattr(Bucket, "put_if", busy)
    assert records.change("a", adding(2)).content == {"all": [1, 2]}


def test_a_change_that_was_not_made_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = opened(f"file://{tmp_path}")

    def fail(*args: Any) -> None:
        raise RemoteUnavailable("busy")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "put_if", fail)
        with pytest.raises(RemoteUnavailable, match="busy"):
            records.change("a", adding(1))
    assert records.change("a", adding(2)).content == {"all": [2]}


def test_a_change_that_always_loses_the_race_fails_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def conflict(*args: Any) -> None:
        raise Conflict

    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.1)
    monkeypatch.setattr(Bucket, "put_if", conflict)
    with pytest.raises(RemoteUnavailable, match="too often by other servers"):
        opened(f"file://{tmp_path}").change("a", adding(1))


def test_lists_that_are_late_undo_nothing(store_url: str, s3: S3Server) -> None:
    if store_url.startswith("file"):
        pytest.skip("a directory's list is never late")
    first, second = opened(store_url), opened(store_url)
    first.change("old", adding(1))
    first.change("doomed", adding(1))
    mine = known(second, {})
    s3.suffer(("late", "LIST", "", 1))
    list(second.fetch_changes())  # the list that becomes stale
    first.change("new", adding(2))
    first.change("old", adding(2))
    first.change("doomed", lambda content: None)
    for key in ("new", "old", "doomed"):  # seen at a miss, or changed by this server
        record = second.fetch(key)
        second.remember(record)
        mine[key] = record.content
    mine.pop("doomed")
    assert known(second, mine) == {"old": {"all": [1, 2]}, "new": {"all": [2]}}
    s3.suffer()
    assert known(second, mine) == {"old": {"all": [1, 2]}, "new": {"all": [2]}}


def test_concurrent_misses_of_a_record_share_one_read(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(store_url).change("a", adding(1))
    second, looks = opened(store_url), []
    look, all_ask = second.fetch, threading.Barrier(4)

    def slow(key: str) -> Record:
        looks.append(key)
        all_ask.wait(60)
        return look(key)

    def ask() -> Content | None:
        if looks:
            all_ask.wait(60)
        record = second.find_unknown("a")
        return None if record is None else record.content

    monkeypatch.setattr(second, "fetch", slow)
    first = threading.Thread(target=ask)
    first.start()
    while not looks:
        pass
    assert together(ask, ask, ask) == [{"all": [1]}] * 3
    first.join()
    assert looks == ["a"]


def test_a_look_that_failed_is_tried_again_by_the_next(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(store_url).change("a", adding(1))
    records = opened(store_url)
    with monkeypatch.context() as patch:
        patch.setattr(records, "fetch", Mock(side_effect=RemoteUnavailable("away")))
        with pytest.raises(RemoteUnavailable):
            records.find_unknown("a")
    found = records.find_unknown("a")
    assert found is not None
    assert found.content == {"all": [1]}


def test_a_read_older_than_a_change_is_ignored(store_url: str) -> None:
    first, second = opened(store_url), opened(store_url)
    first.change("a", adding(1))
    (read,) = second.fetch_changes()
    second.change("a", adding(2))
    assert not second.remember(read)
    first.change("a", lambda content: None)
    (removed,) = second.fetch_changes()
    assert second.remember(removed)
    assert not second.remember(read)


def test_an_object_that_is_no_record_leaves_what_was_known(store_url: str, caplog: pytest.LogCaptureFixture) -> None:
    records, bucket = opened(store_url), Bucket(store_url)
    records.change("a", adding(1))
    for damaged in (b"{", b"[]", b'"x"', b'{"_revision": "x"}'):
        found = bucket.read("records/a.json")
        assert found is not None
        bucket.put_if("records/a.json", damaged, found.version)
        caplog.clear()
        assert list(records.fetch_changes()) == []
        assert list(records.fetch_changes()) == []
        assert len(records.damaged) == 1
    assert caplog.text.count("damaged") <= 1  # reported once
    assert records.change("a", adding(2)).content == {"all": [2]}  # a change repairs it
    assert known(opened(store_url), {}) == {"a": {"all": [2]}}


def test_tombstones_go_once_they_are_old(store_url: str) -> None:
    first, second = opened(store_url), opened(store_url)
    for key in ("a", "b"):
        first.change(key, adding(1))
    mine = known(second, {})
    first.change("a", lambda content: None)
    assert known(second, mine) == {"b": {"all": [1]}}
    assert first.remove_tombstones(3600) == 0
    assert first.remove_tombstones(-1) == 1
    assert [entry.path for entry in Bucket(store_url).list("records")] == ["records/b.json"]
    assert known(second, mine) == {"b": {"all": [1]}}
    first.change("a", adding(2))
    assert known(second, mine) == {"a": {"all": [2]}, "b": {"all": [1]}}


def test_a_record_is_not_created_while_its_tombstone_is_removed(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = opened(store_url), opened(store_url)
    first.change("a", adding(1))
    first.change("a", lambda content: None)
    delete, made = Bucket.delete, []

    def slowly(self: Bucket, paths: list[str]) -> None:
        maker = threading.Thread(target=lambda: made.append(second.change("a", adding(2)).content))
        maker.start()
        maker.join(0.2)
        assert made == []
        delete(self, paths)
        maker.join(60)

    monkeypatch.setattr(Bucket, "delete", slowly)
    assert first.remove_tombstones(-1) == 1
    assert made == [{"all": [2]}]
    assert known(first, {}) == {"a": {"all": [2]}}


def test_a_tombstone_that_was_to_go_and_stayed_is_used_again(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = opened(store_url)
    records.change("a", adding(1))
    records.change("a", lambda content: None)

    def fail(*_: object) -> None:
        raise RemoteUnavailable("down")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "delete", fail)
        with pytest.raises(RemoteUnavailable, match="down"):
            records.remove_tombstones(-1)
    monkeypatch.setattr(module, "_RETRY_SECONDS", 0.1)
    with pytest.raises(RemoteUnavailable):
        records.change("a", adding(2))
    monkeypatch.setattr(module, "_SEAL_SECONDS", -1.0)
    assert records.change("a", adding(2)).content == {"all": [2]}


def test_a_record_whose_object_was_deleted_is_gone(store_url: str) -> None:
    records, bucket = opened(store_url), Bucket(store_url)
    records.change("a", adding(1))
    mine = known(opened(store_url), {})
    bucket.delete(["records/a.json"])
    assert known(records, mine) == {}
    assert isinstance(records.fetch("a"), Record)


def test_quick_changes_of_one_size_have_etags_of_their_own(tmp_path: Path) -> None:
    """A directory's inodes are reused, within one tick of the kernel's clock."""
    bucket = Bucket(f"file://{tmp_path}")
    etags = [bucket.put_if("x", b"0", None)]
    for _ in range(100):
        found = bucket.read("x")
        assert found is not None
        etags.append(bucket.put_if("x", b"0", found.version))
    assert len(set(etags)) == len(etags)


@pytest.mark.slow
@pytest.mark.parametrize("servers", [2, 4])
def test_ten_thousand_changes(tmp_path: Path, servers: int) -> None:
    changed_by_several(f"file://{tmp_path}", servers, 10_000 // servers, keys=40)
