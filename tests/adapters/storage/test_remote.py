"""Adapters in a bucket: found by a new server, cached on a bounded disk, and robust against the bucket's failures."""

import asyncio
import http.server
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from adapters.peft_format import packed_rows
from adapters.peft_format.directory import WEIGHTS_NAME
from adapters.peft_format.inspection import inspect
from adapters.storage.remote import REQUIRED, RemoteStore
from adapters.storage.store import AdapterStore
from adapters.storage.versions import DamagedAdapter, RemoteUnavailable, UnknownAdapter, Version
from tests.support.buckets import BUCKET, S3Server
from tests.support.harness import base_info, write_adapter
from tests.support.publishing import Box

BASE = base_info()


class Depot:
    """Stores over one prefix of the bucket, each with its own disk."""

    def __init__(self, server: S3Server, root: Path) -> None:
        self.server = server
        self.prefix = root.name
        self.url = f"s3://{BUCKET}/{self.prefix}"
        self._root = root
        self._count = 0

    def open(self, directory: str | None = None, **options: Any) -> AdapterStore:
        """A store on an empty disk, unless an earlier `directory` is named."""
        self._count += 1
        root = self._root / (directory or f"disk{self._count}")
        remote = RemoteStore(self.url)
        return AdapterStore(root, remote, remote=remote, **options)

    def put(self, store: AdapterStore, name: str, seed: int, **options: Any) -> Version:
        with store.stage() as staging:
            write_adapter(staging, seed)
            spec = inspect(staging, BASE.linears, BASE.architecture)
            packed_rows.write(staging, spec)
            return store.publish("t", name, staging, spec, **options)[0]

    def objects(self) -> dict[str, bytes]:
        """All objects but tombstones of names."""
        found = self.server.objects(self.prefix)
        return {path: content for path, content in found.items() if b'"_removed": true' not in content}

    def versions(self) -> set[str]:
        """Digests with files in the bucket."""
        return {f"sha256:{path.split('/')[1]}" for path in self.objects() if path.startswith("versions/")}

    def key(self, version: Version, file: str = WEIGHTS_NAME) -> str:
        return f"versions/{version.digest.removeprefix('sha256:')}/{file}"


@pytest.fixture
def depot(s3: S3Server, s3_url: str, tmp_path: Path) -> Depot:
    assert s3_url.endswith(f"/{tmp_path.name}")
    return Depot(s3, tmp_path)


async def read(store: AdapterStore, name: str, prefix: str | None = None) -> bytes:
    with store.lease(store.get("t", name, prefix)) as version:
        await store.wait_until_ready(version)
        return (version.path / WEIGHTS_NAME).read_bytes()


def here(store: AdapterStore, *versions: Version) -> list[bool]:
    return [store.has(version) and version.path.is_dir() for version in versions]


def store_at_rest(store: AdapterStore) -> None:
    """Wait until all due removals are done."""
    files = store._files
    with files._count_lock:
        assert files._count_lock.wait_for(lambda: files._excess <= 0 and not files._removing, 60)


def weights(seed: int, folder: Path) -> bytes:
    return (write_adapter(folder / str(seed), seed) / WEIGHTS_NAME).read_bytes()


async def test_a_new_server_on_an_empty_disk_serves_what_the_bucket_has(depot: Depot, tmp_path: Path) -> None:
    store = depot.open()
    first, second = (depot.put(store, "x", seed) for seed in (1, 2))
    depot.put(store, "y", 1)
    store.split("t", "x", {first.digest: 0.25, second.digest: 0.75})
    store.pin("t", "y", True)
    depot.put(store, "gone", 3)
    store.delete("t", "gone")
    depot.put(store, "ft:org/base:mine:ab12", 4, fine_tuned=True)

    other = depot.open()
    assert [version.name for version in other.list("t")] == ["ft:org/base:mine:ab12", "x", "y"]
    assert other.pointer("t", "x") == replaced_paths(store.pointer("t", "x"), other, "x")
    assert other.pointer("t", "x").shares == {first.digest: 0.25, second.digest: 0.75}
    assert (other.is_pinned("t", "x"), other.is_pinned("t", "y")) == (False, True)
    assert here(other, first, second) == [False, False]
    assert await read(other, "x", first.digest.removeprefix("sha256:")) == weights(1, tmp_path)
    assert await read(other, "x", second.digest.removeprefix("sha256:")) == weights(2, tmp_path)
    assert other.get("t", "x").receipt == store.get("t", "x").receipt


def replaced_paths(pointer: Any, store: AdapterStore, name: str) -> Any:
    """The same pointer with the paths of a store on another disk."""
    paths = {version.digest: version.path for version in store.versions("t", name)}
    versions = tuple(Version(**{**vars(one), "path": paths[one.digest]}) for one in pointer.versions)
    return type(pointer)(versions, pointer.split, pointer.pinned)


async def test_other_files_of_a_version_come_along(depot: Depot) -> None:
    store = depot.open()
    with store.stage() as staging:
        write_adapter(staging, 1)
        (staging / "notes.txt").write_text("more")
        spec = inspect(staging, BASE.linears, BASE.architecture)
        store.publish("t", "x", staging, spec)
    other = depot.open()
    await read(other, "x")
    assert (other.get("t", "x").path / "notes.txt").read_text() == "more"
    other.delete("t", "x")
    assert await store.remove_orphans(0) == 0  # it does not know the version yet
    assert await other.remove_orphans(0) == 1
    assert depot.objects() == {}


async def test_files_are_kept_once_and_go_once_their_last_name_has_gone(depot: Depot) -> None:
    store = depot.open()
    version = depot.put(store, "x", 1)
    depot.put(store, "y", 1)
    store.delete("t", "x")
    assert await store.remove_orphans(0) == 0
    assert len([key for key in depot.objects() if key.startswith("versions/")]) == 3
    other = depot.open()
    other.delete("t", "y")  # it never had the files
    assert await other.remove_orphans(0) == 1
    assert depot.objects() == {}
    with pytest.raises(UnknownAdapter), other.lease(version):
        pass


async def test_versions_beyond_retention_go(depot: Depot) -> None:
    store = depot.open(retain=2)
    versions = [depot.put(store, "x", seed) for seed in (1, 2, 3)]
    assert await store.remove_orphans(0) == 1
    assert depot.versions() == {version.digest for version in versions[1:]}


async def test_the_disk_is_bounded_and_what_is_in_use_stays(depot: Depot, tmp_path: Path) -> None:
    store = depot.open()
    versions = [depot.put(store, name, seed) for seed, name in enumerate("abc")]
    size = sum(path.stat().st_size for path in versions[0].path.iterdir())

    small = depot.open("small", disk_bytes=int(2.5 * size))
    with small.lease(small.get("t", "a")) as held:
        await small.wait_until_ready(held)
        for name in "bcb":
            await read(small, name)
            assert (held.path / WEIGHTS_NAME).exists()
        assert here(small, *(small.get("t", name) for name in "abc")) == [True, True, False]
    assert await read(small, "c") == weights(2, tmp_path)
    await asyncio.to_thread(store_at_rest, small)
    assert here(small, *(small.get("t", name) for name in "abc")) == [False, True, True]
    depot.put(small, "d", 4)  # an upload counts as use
    assert here(small, *(small.get("t", name) for name in "abcd")) == [False, False, True, True]

    again = depot.open("small", disk_bytes=int(2.5 * size))
    assert here(again, *(again.get("t", name) for name in "abcd")) == [False, False, True, True]
    nothing = depot.open("nothing", disk_bytes=0)
    assert await read(nothing, "a") == weights(0, tmp_path)
    while nothing.get("t", "a").path.exists():  # noqa: ASYNC110 - removed by a thread
        await asyncio.sleep(0.01)
    assert here(nothing, nothing.get("t", "a")) == [False]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "spec.json"])
async def test_a_missing_object(depot: Depot, file: str) -> None:
    store = depot.open()
    version = depot.put(store, "x", 1)
    depot.put(store, "y", 2)
    depot.server.put(depot.prefix, depot.key(version, file), None)
    await refused_as_damaged(depot)


def flipped(content: bytes) -> bytes:
    return content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("adapter_model.safetensors", flipped),
        ("adapter_model.safetensors", lambda content: content[:-8]),
        ("adapter_model.safetensors", lambda content: b""),
        ("spec.json", lambda content: content[:-8]),
        ("spec.json", lambda content: content.replace(b'"scaling": 2.0', b'"scaling": 3.0')),
        ("spec.json", lambda content: b"[]"),
        ("spec.json", lambda content: b"\xff"),
    ],
)
async def test_a_damaged_object(depot: Depot, file: str, damage: Any) -> None:
    store = depot.open()
    version = depot.put(store, "x", 1)
    depot.put(store, "y", 2)
    key = depot.key(version, file)
    depot.server.put(depot.prefix, key, damage(depot.objects()[key]))
    await refused_as_damaged(depot)


async def refused_as_damaged(depot: Depot) -> None:
    """Check that fetching `x` fails, leaves nothing behind, affects no other name, and works after a new upload."""
    store = depot.open()
    with pytest.raises(DamagedAdapter):
        await read(store, "x")
    assert here(store, store.get("t", "x")) == [False]
    assert await read(store, "y")
    version = store.get("t", "x")
    store.delete("t", "x")
    assert depot.put(store, "x", 1).digest == version.digest
    assert await read(depot.open(), "x")


async def test_a_damaged_name_is_left_out(depot: Depot, caplog: pytest.LogCaptureFixture) -> None:
    store = depot.open()
    depot.put(store, "x", 1)
    depot.put(store, "y", 2)
    (key,) = [key for key in depot.objects() if key.startswith("names/") and key.endswith("/x.json")]
    document = json.loads(depot.objects()[key])
    for damaged in (b"{", b"[]", json.dumps(document | {"versions": []}).encode()):
        depot.server.put(depot.prefix, key, damaged)
        caplog.clear()
        assert [version.name for version in depot.open().list("t")] == ["y"]
        assert "x.json" in caplog.text


async def test_several_wait_for_one_fetch_and_may_leave(depot: Depot, monkeypatch: pytest.MonkeyPatch) -> None:
    depot.put(depot.open(), "x", 1)
    store = depot.open()
    released, started = threading.Event(), []
    get = RemoteStore.get

    def slowly(self: RemoteStore, digest: str, directory: Path) -> None:
        started.append(digest)
        assert released.wait(60)
        get(self, digest, directory)

    monkeypatch.setattr(RemoteStore, "get", slowly)
    waiting = [asyncio.create_task(read(store, "x")) for _ in range(4)]
    while not started:  # noqa: ASYNC110 - set by a thread
        await asyncio.sleep(0.01)
    waiting[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting[0]
    released.set()
    assert len(set(await asyncio.gather(*waiting[1:]))) == 1
    assert len(started) == 1


async def test_a_name_deleted_while_it_is_fetched_leaves_nothing(depot: Depot, monkeypatch: pytest.MonkeyPatch) -> None:
    depot.put(depot.open(), "x", 1)
    store = depot.open()
    started, released = threading.Event(), threading.Event()
    get = RemoteStore.get

    def slowly(self: RemoteStore, digest: str, directory: Path) -> None:
        get(self, digest, directory)
        started.set()
        assert released.wait(60)

    monkeypatch.setattr(RemoteStore, "get", slowly)
    version = store.get("t", "x")
    waiting = asyncio.create_task(read(store, "x"))
    await asyncio.to_thread(started.wait, 60)
    await asyncio.to_thread(store.delete, "t", "x")
    released.set()
    assert await waiting  # the earlier caller still gets it
    while version.path.exists():  # noqa: ASYNC110 - removed by a thread
        await asyncio.sleep(0.01)
    await asyncio.to_thread(store_at_rest, store)
    assert depot.objects().keys() == {depot.key(version, file) for file in REQUIRED}
    assert await store.remove_orphans(0) == 1


async def test_local_versions_are_served_while_the_store_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = S3Server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.start()
    try:
        depot = Depot(server, tmp_path)
        depot.put(depot.open(), "cold", 1)
        store = depot.open()
        warm = depot.put(store, "warm", 2)
    finally:
        server.stop()
    with pytest.raises(RemoteUnavailable):
        await read(store, "cold")
    assert await read(store, "warm")
    with pytest.raises(RemoteUnavailable):
        depot.put(store, "warm", 3)
    with pytest.raises(RemoteUnavailable):
        store.delete("t", "warm")
    assert store.get("t", "warm") == warm
    assert sorted(path.name for path in warm.path.parent.iterdir()) == [warm.path.name]
    assert list((warm.path.parent.parent / "staging").iterdir()) == []
    with pytest.raises(RemoteUnavailable):
        depot.open()


async def test_refused_credentials_are_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{refusing.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
            monkeypatch.setenv(name, "us-east-1")
        with pytest.raises(RemoteUnavailable, match="403 Forbidden"):
            list(RemoteStore("s3://bucket").load(lambda _: tmp_path))
        refusing.shutdown()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "ftp://host/x",
        "s3://",
        "s3:/x",
        "s3://b/p?x",
        "file:///a#b",
        "file:///a?b",
        "file:a",
        "file://a",
    ],
)
def test_urls_that_name_no_store(url: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        RemoteStore(url)


async def test_a_directory_will_do(tmp_path: Path) -> None:
    first, second = (RemoteStore(f"file://{tmp_path / 'bucket'}") for _ in range(2))
    depot = Depot.__new__(Depot)
    store = AdapterStore(tmp_path / "one", first, remote=first)
    version = depot.put(store, "x", 1)
    other = AdapterStore(tmp_path / "two", second, remote=second)
    assert await read(other, "x") == weights(1, tmp_path / "made")
    other.delete("t", "x")
    assert await other.remove_orphans(0) == 1
    assert not [path for path in (tmp_path / "bucket").rglob("*.*") if path.is_file() and path.name != ".lock"]
    assert not other.has(version)


async def test_unreferenced_files_are_removed_once_they_are_old(depot: Depot) -> None:
    store = depot.open()
    kept, lost, leased = (depot.put(store, name, seed) for seed, name in enumerate(("kept", "lost", "leased")))
    other = depot.open()
    for name in ("lost", "leased"):
        other.delete("t", name)
    assert [version.name for version in other.list("t")] == ["kept"]
    assert await other.remove_orphans(3600) == 0
    assert lost.digest in depot.versions()
    with store.lease(leased):
        assert await store.remove_orphans(0) == 0  # in its view they are still referenced
    assert await other.remove_orphans(0) == 2
    assert depot.versions() == {kept.digest}
    assert await read(other, "kept")
    assert await depot.open().remove_orphans(0) == 0


async def test_nothing_is_removed_while_a_name_cannot_be_read(depot: Depot, caplog: pytest.LogCaptureFixture) -> None:
    store = depot.open()
    version = depot.put(store, "x", 1)
    name = next(path for path in depot.objects() if path.startswith("names/"))
    depot.server.put(depot.prefix, name, b"{")
    other = depot.open()
    assert await other.remove_orphans(0) == 0
    assert depot.key(version) in depot.objects()
    assert "damaged" in caplog.text


async def test_a_store_on_this_disk_has_no_orphans(tmp_path: Path) -> None:
    assert await Box(tmp_path).store.remove_orphans(0) == 0
