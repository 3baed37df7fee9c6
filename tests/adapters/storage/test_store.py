"""What the store promises: nothing half-written is seen, nothing acknowledged is lost, no file in use goes away."""

import errno
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from adapters import disk
from adapters.disk import StorageFull
from adapters.peft_format.config import AdapterError
from adapters.peft_format.directory import CONFIG_NAME, WEIGHTS_NAME, AdapterSpec
from adapters.storage import files as files_module
from adapters.storage.store import AdapterStore, Moved
from adapters.storage.versions import AmbiguousDigest, UnknownAdapter, Version, check_name
from tests.support.publishing import Box, content_of, put, spec_of

ROOT = Path(__file__).parents[3]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def box(tmp_path: Path) -> Iterator[Box]:
    box = Box(tmp_path, retain=3)
    yield box
    box.names.close()


# --- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "0", "legal-v1.2_final", "A" * 128])
def test_names_that_are_allowed(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "-x",
        "_x",
        "a/b",
        "a\\b",
        "../x",
        "a b",
        "a\n",
        "a\0",
        "ü",
        "a@b",
        "a:b",
        "A" * 129,
        "ft:x:y:z",
    ],
)
def test_names_that_are_not(name: str, box: Box) -> None:
    with pytest.raises(AdapterError) as caught:
        put(box.store, name, "x")
    assert caught.value.param == "name"
    assert box.on_disk() == (0, [])


def test_names_of_fine_tunes_need_the_flag(box: Box) -> None:
    assert put(box.store, "ft:base:mine:ab12cd:ckpt-step-5", "x", fine_tuned=True)[1]
    for name in "mine", "ft:", "ft:base", "ft:base:a/b", "ft:base:..\n":
        with pytest.raises(AdapterError):
            put(box.store, name, "x", fine_tuned=True)


# --- publishing, asking, deleting ----------------------------------------------------------------


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


# --- what a name means ------------------------------------------------------------------------------


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
    assert put(box.store, "x", "one", promote=False)[0].staged is False  # a new name means its first content
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
    with pytest.raises(Moved) as caught:
        box.store.promote("t", "x", digest_of("one"), expected=[digest_of("one")])
    assert caught.value.etag == digest_of("two")
    split = box.store.divide("t", "x", {digest_of("one"): 0.5, digest_of("two"): 0.5}, expected=[digest_of("two")])
    assert split.etag.startswith("split:")
    with pytest.raises(Moved):
        box.store.roll_back("t", "x", expected=[digest_of("two")])
    assert box.store.roll_back("t", "x", expected=[split.etag]).etag == digest_of("two")


def test_a_split_survives_a_restart_and_keeps_its_versions(box: Box) -> None:
    for content in ("one", "two"):
        put(box.store, "x", content)
    box.store.divide("t", "x", {digest_of("one"): 0.9, digest_of("two"): 0.1})
    for content in ("three", "four", "five"):
        put(box.store, "x", content, promote=False)
    assert box.again().pointer("t", "x").shares == {digest_of("one"): 0.9, digest_of("two"): 0.1}
    assert contents(box.store) == ["two", "five", "one"]
    assert box.on_disk() == (0, ["five", "one", "two"])
    assert box.store.answers(digest_of("one"))
    put(box.store, "x", "six")  # an upload means what it says
    assert not box.store.answers(digest_of("one"))
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


# --- faults ----------------------------------------------------------------------------------------


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, number: int) -> None:
    """Let the `call`-th file operation of a publication raise `OSError(number)`."""
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


def test_what_a_dead_process_left_is_removed(box: Box) -> None:
    put(box.store, "x", "one")
    staging = box.store.stage()
    (staging.path / WEIGHTS_NAME).write_text("half")
    with box.store.stage() as placed:
        box.store._files.place(placed.path, digest_of("placed only"))
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
        # One change may have been under way: the next publication, or a deletion that was still to be acknowledged.
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
        assert not box.set_aside(), "what was never acknowledged is known as such"
        box.names.close()
        state = {name: content_of(found[name]) if name in found else "" for name in allowed}
        first = last + 2


# --- against a model -------------------------------------------------------------------------------


class StoreMachine(RuleBasedStateMachine):
    """The store equals a dictionary of lists, through restarts, with leases held."""

    names = st.sampled_from(["x", "y"])
    contents = st.sampled_from("abcdef")

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.box = Box(Path(self.directory.name), retain=2)
        self.model: dict[str, list[str]] = {}
        self.leases: list[tuple[Version, str, Any]] = []

    @rule(name=names, content=contents)
    def publish(self, name: str, content: str) -> None:
        before = self.model.get(name, [])
        _, changed = put(self.box.store, name, content)
        assert changed == (before[:1] != [content])
        self.model[name] = [content, *(old for old in before if old != content)][:2]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), back=st.booleans())
    def repoint(self, data: st.DataObject, back: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        before = self.model[name]
        content = before[-1] if back else data.draw(st.sampled_from(before))
        if not back:
            self.box.store.promote("t", name, digest_of(content)[:30])
        elif len(before) > 1:
            self.box.store.roll_back("t", name)
        self.model[name] = [content, *(old for old in before if old != content)]

    @rule(name=names)
    def delete(self, name: str) -> None:
        if name in self.model:
            self.box.store.delete("t", name)
            del self.model[name]
        else:
            with pytest.raises(UnknownAdapter):
                self.box.store.delete("t", name)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def take_lease(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model)))
        version = self.box.store.get("t", name)
        lease = self.box.store.lease(version)
        lease.__enter__()
        self.leases.append((version, self.model[name][0], lease))

    @precondition(lambda self: self.leases)
    @rule()
    def end_lease(self) -> None:
        self.leases.pop(0)[2].__exit__(None, None, None)

    @precondition(lambda self: not self.leases)
    @rule()
    def restart(self) -> None:
        self.box.again()

    @invariant()
    def agrees(self) -> None:
        found = {
            name: [content_of(version) for version in self.box.store.versions("t", name)] for name in sorted(self.model)
        }
        assert found == self.model
        assert [version.name for version in self.box.store.list("t")] == sorted(self.model)
        assert [content_of(version) for version, _, _ in self.leases] == [content for _, content, _ in self.leases]
        needed = {content for contents in self.model.values() for content in contents}
        needed |= {content for _, content, _ in self.leases}
        wait_for(lambda: self.box.on_disk() == (0, sorted(needed)))
        assert not self.box.set_aside()

    def teardown(self) -> None:
        for _, _, lease in self.leases:
            lease.__exit__(None, None, None)
        wait_for(lambda: not any(thread.name == "adapter-collector" for thread in threading.enumerate()))
        self.box.names.close()
        self.directory.cleanup()


def test_the_store_equals_its_model() -> None:
    run_state_machine_as_test(StoreMachine, settings=settings(max_examples=10, stateful_step_count=20, deadline=None))
