"""Several servers' stores over one bucket: concurrent changes of names, and removal of files."""

import asyncio
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from adapters.storage.bucket import Bucket
from adapters.storage.remote import RemoteStore
from adapters.storage.store import AdapterStore, EtagMismatch
from adapters.storage.versions import EVERYBODY, DamagedAdapter, RemoteUnavailable, UnknownAdapter, Version
from tests.support.buckets import S3Server
from tests.support.publishing import put, spec_of
from tests.support.threads import together


class Servers:
    """Stores over one bucket, each with its own disk."""

    def __init__(self, root: Path, url: str) -> None:
        self.url = url
        self._root = root
        self._count = 0

    def open(self, **options: Any) -> AdapterStore:
        self._count += 1
        remote = RemoteStore(self.url)
        return AdapterStore(self._root / f"disk{self._count}", remote, remote=remote, **options)

    def several(self, count: int, **options: Any) -> list[AdapterStore]:
        return [self.open(**options) for _ in range(count)]

    def age(self) -> None:
        """Make all files of versions two hours old."""
        then = time.time() - 7200
        for path in (self._root / "bucket" / "versions").rglob("*"):
            os.utime(path, (then, then))

    def versions(self) -> set[str]:
        """Contents with files in the bucket."""
        digests = {entry.path.split("/")[1] for entry in Bucket(self.url).list("versions")}
        return {bytes.fromhex(digest).rstrip(b"\0").decode() for digest in digests}


@pytest.fixture
def servers(tmp_path: Path) -> Servers:
    return Servers(tmp_path, f"file://{tmp_path}/bucket")


def meanings(store: AdapterStore, tenant: str = "t") -> dict[str, Any]:
    """The targets of all names, as text."""
    found = {}
    for version in store.list(tenant):
        pointer = store.pointer(tenant, version.name)
        digests = [one.digest for one in pointer.versions]
        found[version.name] = (digests, pointer.split, pointer.pinned, pointer.readers)
    return found


def test_what_one_changes_the_others_see(servers: Servers) -> None:
    one, two = servers.several(2)
    first, _ = put(one, "x", "1")
    second, _ = put(one, "x", "2")
    assert meanings(two) == {}
    [(before, after)] = two.import_changes()
    assert before is None
    assert after is not None
    assert after.current.digest == second.digest
    assert after.current.path.parent != one.get("t", "x").path.parent
    assert two.import_changes() == ()

    two.promote("t", "x", first.digest)
    two.pin("t", "x", True)
    two.share("t", "x", ["u"])
    one.import_changes()
    assert one.get("t", "x").digest == first.digest
    assert one.is_pinned("t", "x")
    assert [version.name for version in one.shared_with("u")] == ["x"]
    one.share("t", "x", [EVERYBODY])
    one.pin("t", "x", False)
    one.split("t", "x", {first.digest: 0.5, second.digest: 0.5})
    two.import_changes()
    assert meanings(two) == meanings(one)
    assert not two.pinned_versions()

    one.delete("t", "x")
    [(before, after)] = two.import_changes()
    assert after is None
    assert meanings(two) == {}
    assert two.shared_with("v") == []


def test_a_change_applies_to_the_current_pointer(servers: Servers) -> None:
    """Not to the one that this server saw last."""
    one, two = servers.several(2)
    put(one, "x", "1")
    two.import_changes()
    put(one, "x", "2")
    one.pin("t", "x", True)
    put(two, "x", "3", promote=False)
    assert [version.digest for version in two.versions("t", "x")] == [spec_of(content).digest for content in "231"]
    assert two.is_pinned("t", "x")


@pytest.mark.parametrize("change", ["promote", "split", "roll_back"])
def test_an_etag_holds_across_servers(servers: Servers, change: str) -> None:
    one, two = servers.several(2)
    first, _ = put(one, "x", "1")
    put(one, "x", "2")
    two.import_changes()
    seen = two.pointer("t", "x").etag
    one.promote("t", "x", first.digest)
    arguments = {"promote": (first.digest,), "split": ({first.digest: 1.0},), "roll_back": ()}[change]
    with pytest.raises(EtagMismatch) as moved:
        getattr(two, change)("t", "x", *arguments, expected=[seen])
    assert moved.value.etag == first.digest
    assert two.pointer("t", "x").etag == first.digest  # this server knows it from now on
    getattr(two, change)("t", "x", *arguments, expected=[first.digest])


def test_only_one_of_those_that_expect_the_same_wins(servers: Servers) -> None:
    stores = servers.several(4)
    digests = [put(stores[0], "x", content)[0].digest for content in "01234"]
    for store in stores:
        store.import_changes()
    promotions = [partial(store.promote, "t", "x", digests[i], [digests[4]]) for i, store in enumerate(stores)]
    results = together(*promotions)
    (won,) = [result for result in results if not isinstance(result, EtagMismatch)]
    stores[0].import_changes()
    assert stores[0].pointer("t", "x").etag == won.etag


def test_a_name_that_another_server_deleted_is_unknown(servers: Servers) -> None:
    one, two = servers.several(2)
    version, _ = put(one, "x", "1")
    two.import_changes()
    one.delete("t", "x")
    for change in (
        lambda: two.promote("t", "x", version.digest),
        lambda: two.pin("t", "x", True),
        lambda: two.delete("t", "x"),
    ):
        with pytest.raises(UnknownAdapter):
            change()
    assert meanings(two) == {}
    assert put(two, "x", "1")[1]
    one.import_changes()
    assert one.get("t", "x").digest == version.digest


def test_a_name_is_looked_for_by_itself(servers: Servers) -> None:
    one, two = servers.several(2)
    version, _ = put(one, "x", "1")
    assert two.import_change("t", "y") is None
    change = two.import_change("t", "x")
    assert change is not None
    assert two.get("t", "x").digest == version.digest
    assert two.import_change("t", "x") is None
    assert two.import_changes() == ()


@contextmanager
def polling(stores: list[AdapterStore]) -> Iterator[None]:
    """While the context lasts, each store reads the changes of others as often as servers do."""
    ended = threading.Event()

    def poll(store: AdapterStore) -> None:
        while not ended.wait(1.0):
            store.import_changes()

    threads = [threading.Thread(target=poll, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


async def changed_by_several(servers: Servers, count: int, changes: int, names: int, uploads: float = 0.5) -> float:
    """Change a few names at random on several servers; every published version exists at the end.

    Returns the seconds from the last change until all servers agree.
    """
    stores = servers.several(count, retain=1000)
    for name in range(names):
        put(stores[0], f"n{name}", "0")
    for store in stores:
        store.import_changes()

    def work(store: AdapterStore, server: int) -> list[tuple[str, str]]:
        draw, made = random.Random(server), []
        for i in range(changes):
            name = f"n{draw.randrange(names)}"
            kind = draw.random()
            if kind < uploads:
                version, changed = put(store, name, f"{server}-{i}", promote=draw.random() < 0.5)
                assert changed
                made.append((name, version.digest))
            elif kind < uploads + 0.1:
                store.share("t", name, [f"r{draw.randrange(9)}"])
            elif kind < uploads + 0.2:
                store.pin("t", name, draw.random() < 0.5)
            else:
                known = store.versions("t", name)
                store.promote("t", name, draw.choice(known).digest)
        return made

    works = [partial(work, store, i) for i, store in enumerate(stores)]
    with polling(stores):
        results = await asyncio.to_thread(together, *works)
        last = time.monotonic()
        while not all(meanings(store) == meanings(stores[0]) for store in stores):
            assert time.monotonic() - last < 60
            await asyncio.sleep(0.05)
        agreed = time.monotonic() - last
    assert not [result for result in results if isinstance(result, Exception)]
    assert [store.import_changes() for store in stores] == [()] * count
    assert meanings(servers.open()) == meanings(stores[0])
    for made in results:
        for name, digest in made:
            assert digest in meanings(stores[0])[name][0]
    for store in stores[:2]:  # named versions have their files
        for version in store.list("t"):
            with store.lease(version):
                await store.wait_until_ready(version)
    return agreed


@pytest.fixture(autouse=True)
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapters of these tests are words; fetching them finds no spec to check."""
    monkeypatch.setattr("adapters.storage.mending.verified_spec", lambda directory, digest: None)
    monkeypatch.setattr("adapters.storage.mending.write_rows_and_record", lambda directory, spec: None)


@pytest.mark.parametrize("count", [2, 4])
async def test_no_change_is_lost_and_all_agree(servers: Servers, count: int) -> None:
    await changed_by_several(servers, count, 120 // count, names=5)


async def test_no_change_is_lost_on_s3_with_faults(s3: S3Server, s3_url: str, tmp_path: Path) -> None:
    s3.suffer(("lost", "PUT", "names/", 5), ("busy", "PUT", "names/", 7), ("late", "LIST", "", 3))
    try:
        servers = Servers(tmp_path, s3_url)
        stores = servers.several(2, retain=1000)
        put(stores[0], "x", "0")

        def work(i: int) -> None:
            for number in range(15):
                assert put(stores[i], "x", f"{i}-{number}")[1]

        assert together(lambda: work(0), lambda: work(1)) == [None, None]
    finally:
        s3.suffer()
    for store in stores:
        store.import_changes()
    assert meanings(stores[0]) == meanings(stores[1])
    assert len(stores[0].versions("t", "x")) == 31


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
async def test_ten_thousand_changes_of_names(servers: Servers, count: int) -> None:
    agreed = await changed_by_several(servers, count, 10_000 // count, names=200, uploads=0.1)
    print(f"10,000 changes by {count} servers; all agreed {agreed:.2f} s after the last")
    assert agreed < 2


def test_known_names_are_served_while_the_store_fails(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = servers.several(2)
    put(one, "x", "1")
    two.import_changes()
    put(one, "y", "2")

    def fail(*_: object) -> None:
        raise RemoteUnavailable("down")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "list", fail)
        patch.setattr(Bucket, "read", fail)
        with pytest.raises(RemoteUnavailable):
            two.import_changes()
        with pytest.raises(RemoteUnavailable):
            two.promote("t", "x", "1" * 64)
        assert list(meanings(two)) == ["x"]
    two.import_changes()
    assert list(meanings(two)) == ["x", "y"]


def test_an_upload_whose_naming_got_no_answer_keeps_its_files(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name may have been written and be visible to others."""
    one, two = servers.several(2)
    put_if, read = Bucket.put_if, Bucket.read

    def lose(*args: Any) -> None:
        put_if(*args)
        monkeypatch.setattr(Bucket, "read", fail)
        raise RemoteUnavailable("no answer")

    def fail(*_: object) -> None:
        raise RemoteUnavailable("down")

    monkeypatch.setattr(Bucket, "put_if", lose)
    with pytest.raises(RemoteUnavailable):
        put(one, "x", "1")
    monkeypatch.setattr(Bucket, "read", read)
    for store in (one, two):
        store.import_changes()
        assert list(meanings(store)) == ["x"]
    assert servers.versions() == {"1"}


async def test_files_that_another_server_named_meanwhile_stay(servers: Servers) -> None:
    one, two = servers.several(2)
    put(one, "x", "1")
    two.import_changes()
    one.delete("t", "x")
    put(two, "y", "1")
    assert await one.remove_orphans(0) == 0  # it does not know of y
    assert servers.versions() == {"1"}


@pytest.mark.parametrize("moment", ["list", "read", "put_if", "delete"])
@pytest.mark.parametrize("known", [False, True])
def test_files_named_while_they_are_being_removed_are_there_in_the_end(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, moment: str, known: bool
) -> None:
    """An upload of the same version arrives at any step of a removal."""
    one, two = servers.several(2)
    version, _ = put(one, "x", "1")
    if known:
        two.import_changes()
    one.delete("t", "x")
    servers.age()
    remover, method = threading.get_ident(), getattr(Bucket, moment)
    uploads: list[threading.Thread] = []

    def meanwhile(self: Bucket, *args: Any) -> Any:
        if threading.get_ident() == remover:
            uploads.append(threading.Thread(target=put, args=(two, f"y{len(uploads)}", "1")))
            uploads[-1].start()
            uploads[-1].join(0.3)  # it may wait for the removal
        return method(self, *args)

    monkeypatch.setattr(Bucket, moment, meanwhile)
    RemoteStore(servers.url).remove_orphans(3600, lambda digest: False)
    for upload in uploads:
        upload.join()
    assert uploads
    assert two.get("t", "y0").digest == version.digest
    assert servers.versions() == {"1"}


async def test_a_removal_that_was_cut_short_is_taken_up(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    one = servers.open()
    put(one, "x", "1")
    one.delete("t", "x")
    servers.age()

    def fail(*_: object) -> None:
        raise RemoteUnavailable("down")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "delete", fail)
        with pytest.raises(RemoteUnavailable):
            await one.remove_orphans(3600)
    monkeypatch.setattr("adapters.storage.remote._CONDEMNED_WAIT", 0.1)
    with pytest.raises(RemoteUnavailable, match="being removed"):
        put(one, "y", "1")
    servers.age()
    assert await one.remove_orphans(3600) == 0  # another server is doing it
    monkeypatch.setattr("adapters.storage.remote._CONDEMNED_SECONDS", 0.0)
    put(one, "y", "1")
    one.delete("t", "y")
    servers.age()
    monkeypatch.setattr("adapters.storage.remote._CONDEMNED_SECONDS", 10.0)
    Bucket(servers.url).delete([entry.path for entry in Bucket(servers.url).list("condemned")])
    assert await one.remove_orphans(3600) == 1
    assert servers.versions() == set()


async def test_a_lease_of_a_version_that_others_deleted_still_fetches_it(servers: Servers) -> None:
    one, two = servers.several(2)
    put(one, "x", "1")
    two.import_changes()
    version: Version = two.get("t", "x")
    with two.lease(version):
        one.delete("t", "x")
        two.import_changes()
        await two.wait_until_ready(version)
        assert two.has(version)
    with pytest.raises(UnknownAdapter), two.lease(version):
        pass


async def test_a_version_whose_files_are_gone_is_damaged(servers: Servers) -> None:
    one, two = servers.several(2)
    version, _ = put(one, "x", "1")
    two.import_changes()
    bucket = Bucket(servers.url)
    bucket.delete([entry.path for entry in bucket.list("versions")])
    with two.lease(two.get("t", "x")), pytest.raises(DamagedAdapter):
        await two.wait_until_ready(version)
    put(one, "y", "1")  # it assumes that the files exist
    assert servers.versions() == {"1"}
