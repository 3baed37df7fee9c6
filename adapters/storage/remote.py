"""Names and files of adapters in an object store: S3, Google Cloud Storage, Azure, or a directory, through obstore.

`versions/<digest>/<file>` holds what a version's directory holds, `names/<tenant>/<name>.json` what a name means, one
small object each, replaced whole. An object appears whole or not at all, and a name is written after its files: who
reads finds the old state or the new one. One server at a time should change names; others see that when they start.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from adapters.peft_format.directory import CONFIG_NAME, SPEC_NAME, WEIGHTS_NAME
from adapters.peft_format.packed_rows import ROWS_NAME
from adapters.peft_format.record import RECORD_NAME
from adapters.storage.names import Locate
from adapters.storage.versions import DamagedAdapter, Pointer, RemoteUnavailable, Version

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

REQUIRED = (CONFIG_NAME, SPEC_NAME, WEIGHTS_NAME)
_READERS = 32  # names read at once when a server starts
_CHUNK_BYTES = 1 << 20
_DAMAGE = (ValueError, LookupError, TypeError)  # what reading a name raises when it is none
# A server that is silent for so long is down; whole transfers may take longer.
_CLIENT: "ClientConfig" = {
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=15),
    "timeout": timedelta(hours=1),
    "allow_http": True,  # whoever writes http:// into an endpoint means it
}
_RETRY: "RetryConfig" = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}

log = logging.getLogger(__name__)


class RemoteStore:
    """`Names` and `Remote` in one bucket.

    Args:
        url: s3://bucket/prefix, gs://..., az://..., file:///...; credentials, region and endpoint come from the
            environment, as that provider's own tools read them (AWS_ENDPOINT_URL, ...).

    Raises:
        ValueError: no such kind of store, or its configuration is not complete.
    """

    title = "the object store"

    def __init__(self, url: str) -> None:
        self.unreadable: set[str] = set()
        try:
            if url.startswith("file:"):
                self._store: ObjectStore = from_url(url, mkdir=True)
            else:
                self._store = from_url(url, client_options=_CLIENT, retry_config=_RETRY)
        except (BaseError, OSError) as fault:
            raise ValueError(_line(fault)) from None

    # --- names -----------------------------------------------------------------------------------------

    def load(self, locate: Locate) -> Iterator[Pointer]:
        for path, document in self._documents():
            try:
                yield _pointer(json.loads(document), locate)
            except _DAMAGE as fault:
                log.error("%s in the object store is damaged; that adapter is not served: %r", path, fault)

    def save(self, tenant: str, name: str, pointer: Pointer | None) -> None:
        # No name has a "+", and a tenant is no path.
        path = f"names/tenant-{tenant.encode().hex()}/{name.replace('/', '+')}.json"
        with _faults():
            if pointer is None:
                self._delete([path])
            else:
                obstore.put(self._store, path, _document(pointer))

    def _documents(self) -> Iterator[tuple[str, bytes]]:
        """Every name's path and content."""
        with _faults(), ThreadPoolExecutor(_READERS, thread_name_prefix="adapter-names") as readers:
            paths = [entry["path"] for chunk in obstore.list(self._store, "names") for entry in chunk]
            for path, document in zip(paths, readers.map(self._read, paths), strict=True):
                if document is not None:  # else it was deleted this very moment
                    yield path, document

    def _read(self, path: str) -> bytes | None:
        try:
            return obstore.get(self._store, path).bytes().to_bytes()
        except FileNotFoundError:
            return None

    # --- files -----------------------------------------------------------------------------------------

    def put(self, digest: str, directory: Path) -> None:
        with _faults():
            for path in directory.iterdir():
                if path.name not in (ROWS_NAME, RECORD_NAME):  # whoever gets the others makes them
                    obstore.put(self._store, _path(digest, path.name), path)

    def get(self, digest: str, directory: Path) -> None:
        with _faults():
            names = self._files(digest)
            if missing := set(REQUIRED) - set(names):
                raise DamagedAdapter(f"the object store has no {', '.join(sorted(missing))} of {digest}")
            for name in names:
                stream = obstore.get(self._store, _path(digest, name)).stream(min_chunk_size=_CHUNK_BYTES)
                with (directory / name).open("xb") as file:
                    for chunk in stream:
                        file.write(chunk)

    def remove(self, digest: str) -> None:
        with _faults():
            self._delete([_path(digest, name) for name in self._files(digest)])

    def unnamed(self, seconds: float) -> Iterator[str]:
        # Files are listed before names: whatever is named meanwhile has a name by then, or its files are new.
        with _faults():
            listed = obstore.list(self._store, "versions")
            digests = {f"sha256:{entry['path'].split('/')[1]}" for chunk in listed for entry in chunk}
        for path, document in self._documents():
            try:
                digests -= {version.digest for version in _pointer(json.loads(document), Path).versions}
            except _DAMAGE as fault:
                log.warning("%s in the object store is damaged; files that no name has are left there: %r", path, fault)
                return
        for digest in sorted(digests):
            with _faults():
                ages = [datetime.now(UTC) - entry["last_modified"] for entry in self._entries(digest)]
            if ages and min(ages).total_seconds() > seconds:
                yield digest

    def _files(self, digest: str) -> list[str]:
        return [entry["path"].rpartition("/")[2] for entry in self._entries(digest)]

    def _entries(self, digest: str) -> "list[ObjectMeta]":
        listed = obstore.list(self._store, _path(digest, "").rstrip("/"))
        return [entry for chunk in listed for entry in chunk]

    def _delete(self, paths: list[str]) -> None:
        if not paths:
            return
        with contextlib.suppress(FileNotFoundError):  # a directory says so; buckets do not
            obstore.delete(self._store, paths)


def _path(digest: str, name: str) -> str:
    return f"versions/{digest.removeprefix('sha256:')}/{name}"


def _document(pointer: Pointer) -> bytes:
    owner = pointer.current
    versions = [
        {"digest": one.digest, "created": one.created, "receipt": one.receipt, "staged": one.staged}
        for one in pointer.versions
    ]
    document = {"tenant": owner.tenant, "name": owner.name, "versions": versions}
    return json.dumps(
        document | {"split": pointer.split, "pinned": pointer.pinned, "readers": pointer.readers}
    ).encode()


def _pointer(document: dict[str, Any], locate: Locate) -> Pointer:
    tenant, name = document["tenant"], document["name"]
    versions = tuple(Version(tenant, name, path=locate(one["digest"]), **one) for one in document["versions"])
    split = tuple((digest, share) for digest, share in document["split"])
    pointer = Pointer(versions, split, document["pinned"], tuple(document.get("readers", ())))
    _ = pointer.answering  # raises when a version is missing
    return pointer


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    """Whatever the store's client raises becomes RemoteUnavailable; faults of our own disk stay what they are."""
    try:
        yield
    except (BaseError, FileNotFoundError) as fault:  # not found: there is no such bucket
        raise RemoteUnavailable(_line(fault)) from None


def _line(fault: Exception) -> str:
    """What happened, without the client's own debugging notes."""
    return " ".join(str(fault).partition("Debug source")[0].split())[:300]
