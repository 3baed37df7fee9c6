"""Guarantees of the store: published versions stay, and no file in use is removed."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapters.peft_format.directory import AdapterSpec
from adapters.storage.store import AdapterStore, EtagMismatch
from adapters.storage.versions import AmbiguousDigest, UnknownAdapter
from tests.support.publishing import Box, content_of, put, spec_of


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path, retain=3)
    yield box
    box.names.close()


# --- publishing, reading, deleting ---------------------------------------------------------------


def test_a_published_adapter_is_there_now_and_after_a_restart(box: Box) -> None:
    version, changed = put(box.store, "x", "one")
    assert changed
    assert (version.tenant, version.name, version.digest) == ("t", "x", spec_of("one").digest)
    assert content_of(version) == "one"
    assert AdapterSpec.read(version.path) == spec_of("one")
    assert abs(version.created - time.time()) < 60
    assert version.receipt == {
        "rank": 4,
        "scaling": 2.0,
        "modules_matched": 2,
        "variants": [],
        "parameters": 1024,
        "bytes": 4096,
        "dtype": "float32",
        "rows": {"q_proj": 8},
        "base_model_name_or_path": "base",
        "warnings": [],
    }
    assert box.store.get("t", "x") == version
    assert box.again().get("t", "x") == version
    assert box.on_disk() == (0, ["one"])


def test_changed_says_whether_the_current_content_is_another(box: Box) -> None:
    assert [put(box.store, "x", content)[1] for content in ("one", "one", "two", "one", "one")] == [
        True,
        False,
        True,
        True,
        False,
    ]
    assert content_of(box.store.get("t", "x")) == "one"
    assert [content_of(version) for version in box.store.versions("t", "x")] == ["one", "two"]
    assert [content_of(version) for version in box.again().versions("t", "x")] == ["one", "two"]


def test_versions_beyond_retention_go(box: Box) -> None:
    for content in "abcde":
        put(box.store, "x", content)
    put(box.store, "y", "b")
    assert [content_of(version) for version in box.store.versions("t", "x")] == ["e", "d", "c"]
    assert box.on_disk() == (0, ["b", "c", "d", "e"])
    assert [content_of(version) for version in box.again().versions("t", "x")] == ["e", "d", "c"]


def test_content_is_stored_once_and_goes_with_its_last_name(box: Box) -> None:
    for tenant, name in ("t", "x"), ("t", "y"), ("u", "x"):
        assert put(box.store, name, "one", tenant)[1]
    assert box.on_disk() == (0, ["one"])
    box.store.delete("t", "x")
    box.store.delete("u", "x")
    assert content_of(box.store.get("t", "y")) == "one"
    assert box.store.delete("t", "y").digest == spec_of("one").digest
    assert box.on_disk() == (0, [])
    assert box.again().list("t") == []


def test_tenants_do_not_see_each_other(box: Box) -> None:
    put(box.store, "x", "one", "t")
    put(box.store, "x", "two", "u")
    assert content_of(box.store.get("t", "x")) == "one"
    assert [content_of(version) for version in box.store.list("u")] == ["two"]
    box.store.delete("t", "x")
    assert content_of(box.store.get("u", "x")) == "two"
    for ask in (lambda: box.store.get("v", "x"), lambda: box.store.get("t", "x"), lambda: box.store.delete("t", "x")):
        with pytest.raises(UnknownAdapter):
            ask()
    assert box.store.list("v") == []


def test_a_version_is_found_by_its_digests_beginning(box: Box) -> None:
    for content in ("same-one", "same-two", "other"):
        put(box.store, "x", content)
    digest = spec_of("same-two").digest.removeprefix("sha256:")
    assert content_of(box.store.get("t", "x", digest)) == "same-two"
    assert content_of(box.store.get("t", "x", digest[:12].upper())) == "same-two"
    with pytest.raises(AmbiguousDigest):
        box.store.get("t", "x", digest[:8])
    for prefix in ("", digest[:7], "00000000", "%" * 8, digest + "0"):
        with pytest.raises(UnknownAdapter):
            box.store.get("t", "x", prefix)


# --- pointers ---------------------------------------------------------------------------------------


def digest_of(content: str) -> str:
    return spec_of(content).digest


def test_promotion_and_rollback_survive_a_restart(box: Box) -> None:
    for content in ("one", "two"):
        put(box.store, "x", content)
    box.store.promote("t", "x", digest_of("one"))
    assert contents(box.store) == contents(box.again()) == ["one", "two"]
    box.store.roll_back("t", "x")
    assert contents(box.store) == contents(box.again()) == ["two", "one"]


def test_a_staged_version_waits_and_is_no_place_to_go_back_to(box: Box) -> None:
    assert put(box.store, "x", "one", promote=False)[0].staged is False  # a new name points at its first content
    assert put(box.store, "x", "two", promote=False)[1]
    assert not put(box.store, "x", "two", promote=False)[1]
    assert contents(box.store) == contents(box.again()) == ["one", "two"]
    with pytest.raises(UnknownAdapter, match="before"):
        box.store.roll_back("t", "x")
    box.store.promote("t", "x", digest_of("two"))
    assert contents(box.again()) == ["two", "one"]
    assert box.store.roll_back("t", "x").current.digest == digest_of("one")


def test_a_change_is_made_only_from_the_expected_state(box: Box) -> None:
    for content in ("one", "two"):
        put(box.store, "x", content)
    with pytest.raises(EtagMismatch) as caught:
        box.store.promote("t", "x", digest_of("one"), expected=[digest_of("one")])
    assert caught.value.etag == digest_of("two")
    split = box.store.split("t", "x", {digest_of("one"): 0.5, digest_of("two"): 0.5}, expected=[digest_of("two")])
    assert split.etag.startswith("split:")
    with pytest.raises(EtagMismatch):
        box.store.roll_back("t", "x", expected=[digest_of("two")])
    assert box.store.roll_back("t", "x", expected=[split.etag]).etag == digest_of("two")


def test_a_split_survives_a_restart_and_keeps_its_versions(box: Box) -> None:
    for content in ("one", "two"):
        put(box.store, "x", content)
    box.store.split("t", "x", {digest_of("one"): 0.9, digest_of("two"): 0.1})
    for content in ("three", "four", "five"):
        put(box.store, "x", content, promote=False)
    assert box.again().pointer("t", "x").shares == {digest_of("one"): 0.9, digest_of("two"): 0.1}
    assert contents(box.store) == ["two", "five", "one"]
    assert box.on_disk() == (0, ["five", "one", "two"])
    assert box.store.is_answering(digest_of("one"))
    put(box.store, "x", "six")  # an upload replaces a split
    assert not box.store.is_answering(digest_of("one"))
    assert box.again().pointer("t", "x").shares == {digest_of("six"): 1.0}


def test_a_store_from_before_splits_is_read(box: Box) -> None:
    put(box.store, "x", "one")
    with box.names.database.transaction() as connection:
        connection.execute("ALTER TABLE adapter_versions DROP COLUMN staged")
        connection.execute("DROP TABLE adapter_splits")
        connection.execute("PRAGMA user_version = 0")
    assert contents(box.again()) == ["one"]
    put(box.store, "x", "two", promote=False)
    assert contents(box.again()) == ["one", "two"]


def contents(store: AdapterStore, name: str = "x") -> list[str]:
    return [content_of(version) for version in store.versions("t", name)]


def test_listing_is_by_name(box: Box) -> None:
    for name in "cab":
        put(box.store, name, name)
    assert [version.name for version in box.store.list("t")] == ["a", "b", "c"]


# --- leases ----------------------------------------------------------------------------------------


def test_leased_files_outlive_their_name(box: Box) -> None:
    version, _ = put(box.store, "x", "one")
    with box.store.lease(version), box.store.lease(version):
        box.store.delete("t", "x")
        assert content_of(version) == "one"
        put(box.store, "x", "two")
    wait_for(lambda: box.on_disk() == (0, ["two"]))
    with pytest.raises(UnknownAdapter), box.store.lease(version):
        pass


def test_a_version_that_comes_back_while_leased_stays(box: Box) -> None:
    version, _ = put(box.store, "x", "one")
    with box.store.lease(version):
        box.store.delete("t", "x")
        put(box.store, "y", "one")
    assert content_of(box.store.get("t", "y")) == "one"


def test_readers_under_replacement_always_find_their_files(box: Box) -> None:
    put(box.store, "x", "0")
    stop = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        while not stop.is_set():
            try:
                with box.store.lease(box.store.get("t", "x")) as version:
                    assert version.digest == spec_of(content_of(version)).digest
            except UnknownAdapter:
                pass  # removed between get and lease
            except BaseException as fault:
                failures.append(fault)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for i in range(1, 30):
        put(box.store, "x", str(i % 7))
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures
    wait_for(lambda: len(box.on_disk()[1]) == 3)
