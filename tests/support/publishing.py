"""A store for publishing, without the cost of real adapters.

As a program (`python -m tests.support.publishing ROOT FIRST`) it publishes until it is killed.
"""

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from adapters.peft_format.directory import CONFIG_NAME, WEIGHTS_NAME, AdapterSpec
from adapters.peft_format.modules import LoraModule
from adapters.storage.names import LocalNames
from adapters.storage.store import AdapterStore
from adapters.storage.versions import Version


@contextmanager
def held(database: Path) -> Iterator[None]:
    """Hold an uncommitted change, as another process would."""
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


class Box:
    """A store over `root` that can be reopened, as after a restart."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.root = root
        self._options = options
        self._open()

    def _open(self) -> None:
        self.names = LocalNames(self.root / "test.db")
        self.store = AdapterStore(self.root / "adapters", self.names, **self._options)

    def again(self) -> AdapterStore:
        self.names.close()
        self._open()
        return self.store

    def set_aside(self) -> list[str]:
        """The names of the entries of `lost+found`."""
        return sorted(path.name for path in (self.root / "lost+found").glob("*/*"))

    def on_disk(self) -> tuple[int, list[str]]:
        """The number of staged directories, and the contents in `versions`."""
        staged = list((self.root / "adapters" / "staging").iterdir())
        versions = (self.root / "adapters" / "versions").iterdir()
        return len(staged), sorted(bytes.fromhex(path.name).rstrip(b"\0").decode() for path in versions)


def spec_of(content: str) -> AdapterSpec:
    """A spec as `inspect` would make it, with `content` in hex for a digest."""
    modules = {f"layers.{i}.q_proj": LoraModule(4, 2.0, "a", "b") for i in range(2)}
    digest = f"sha256:{content.encode().hex().ljust(64, '0')}"
    return AdapterSpec(digest, {"base_model_name_or_path": "base"}, modules, "float32", 4, 1024, 4096)


def put(store: AdapterStore, name: str, content: str, tenant: str = "t", **options: Any) -> tuple[Version, bool]:
    """Publish an adapter whose weights are the text `content`."""
    with store.stage() as staging:
        (staging / CONFIG_NAME).write_text("{}")
        (staging / WEIGHTS_NAME).write_text(content)
        return store.publish(tenant, name, staging, spec_of(content), **options)


def content_of(version: Version) -> str:
    return (version.path / WEIGHTS_NAME).read_text()


def main(root: Path, first: int) -> None:
    """Publish c<i> as n<i mod 5> forever, deleting the name again after each seventh; print each finished change."""
    store = Box(root, retain=2).store
    print("ready", flush=True)
    i = first
    while True:
        name = f"n{i % 5}"
        put(store, name, f"c{i}")
        print(f"put {i}", flush=True)
        if i % 7 == 0:
            store.delete("t", name)
            print(f"delete {i}", flush=True)
        i += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
