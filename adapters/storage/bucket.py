"""An object store: S3, Google Cloud Storage, Azure, or a directory, through obstore.

Objects appear whole or not at all. `put_if` replaces one only if it is still the one that was read: the store compares
its ETag. A directory cannot, so there a lock on one file of it serves instead (`flock`, which NFS has, too).
"""

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import LocalStore, from_url

from adapters.storage.silence import PATIENCE, Line, Patience, line
from adapters.storage.versions import RemoteUnavailable

if TYPE_CHECKING:
    from obstore import PutMode, UpdateVersion
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_CHUNK_BYTES = 1 << 20
_RETRIES = 3
_LOCK = ".lock"  # in a directory; no object is called so


class Conflict(Exception):
    """The object is no longer the one that was read."""


class Entry(NamedTuple):
    """An object as a list has it."""

    path: str
    etag: str | None
    age: float  # seconds since it was written
    size: int


class Object(NamedTuple):
    """An object as it was read. `version` is for `Bucket.put_if`."""

    content: bytes
    etag: str | None
    version: "UpdateVersion"
    age: float  # seconds since it was written


class Bucket:
    """One prefix of a bucket. Everything waits for a network, and raises RemoteUnavailable.

    Args:
        url: s3://bucket/prefix, gs://..., az://..., file:///...; credentials, region and endpoint come from the
            environment, as that provider's own tools read them (AWS_ENDPOINT_URL, ...).
        patience: with a network's.

    Raises:
        ValueError: no such kind of store, or its configuration is not complete.
    """

    def __init__(self, url: str, patience: Patience = PATIENCE) -> None:
        self._directory: Path | None = None
        self._line: Line | None = None  # a directory has none
        if set(url) & set("?#"):
            raise ValueError("? and # would end its path; they are written %3F and %23")
        if url.startswith("file:") and not url.startswith("file:/"):
            raise ValueError("a directory is written with its whole path, file:///DIR")
        try:
            if url.startswith("file:"):
                self._store: ObjectStore = from_url(url, mkdir=True)
                assert isinstance(self._store, LocalStore)
                self._directory = Path(str(self._store.prefix))
            else:
                client, retry = _options(patience)
                self._store = from_url(url, client_options=client, retry_config=retry)
                self._line = line(url, patience)
        except (BaseError, OSError) as fault:
            raise ValueError(_line(fault)) from None

    def list(self, prefix: str) -> list[Entry]:
        """The objects below a prefix. A store may be late with it."""
        found: list[Entry] = []
        with self._asking():
            now = datetime.now(UTC)
            for chunk in obstore.list(self._store, prefix):
                if self._line is not None:
                    self._line.answered()
                ages = [(now - entry["last_modified"]).total_seconds() for entry in chunk]
                found += [
                    Entry(one["path"], one["e_tag"], age, one["size"]) for one, age in zip(chunk, ages, strict=True)
                ]
        return found

    def read(self, path: str) -> Object | None:
        """A small object; None when there is none."""
        try:
            with self._asking(missing=False):
                found = obstore.get(self._store, path)
                version: UpdateVersion = {}
                for key in ("e_tag", "version"):
                    if value := found.meta[key]:
                        version[key] = value
                age = (datetime.now(UTC) - found.meta["last_modified"]).total_seconds()
                return Object(found.bytes().to_bytes(), found.meta["e_tag"], version, age)
        except FileNotFoundError:
            return None

    def put_if(self, path: str, content: bytes, version: "UpdateVersion | None") -> str | None:
        """Replace an object that is still the one of this version, or with None make one that is new; its new ETag.

        Raises Conflict when it is not; after any other fault it may have been replaced, or not.
        """
        if self._directory is not None:
            return self._put_in_directory(self._directory / path, content, version)
        mode: PutMode = "create" if version is None else version
        with self._asking():
            try:
                return obstore.put(self._store, path, content, mode=mode)["e_tag"]
            except (AlreadyExistsError, PreconditionError) as fault:
                raise Conflict(_line(fault)) from None

    def _put_in_directory(self, file: Path, content: bytes, version: "UpdateVersion | None") -> str | None:
        assert self._directory is not None
        path = file.relative_to(self._directory).as_posix()
        try:
            with self._changing():
                found = self.read(path)
                if (found and found.version) != version:
                    raise Conflict(path)
                # Written by hand, since a file's ETag is made of its inode, time and size: inodes are used again and
                # the kernel's own times are milliseconds apart, so that one ETag could mean two contents.
                file.parent.mkdir(parents=True, exist_ok=True)
                fresh = self._directory / f".new-{os.getpid()}-{threading.get_ident()}"
                fresh.write_bytes(content)
                now = time.time_ns()
                os.utime(fresh, ns=(now, now))
                with fresh.open("rb") as written:
                    os.fsync(written.fileno())
                fresh.rename(file)
                after = self.read(path)
                return after.etag if after else None
        except OSError as fault:
            raise RemoteUnavailable(_line(fault)) from None

    def put_file(self, path: str, file: Path) -> None:
        """Make or replace an object of any size."""
        with self._asking(large=True):
            obstore.put(self._store, path, file)

    def get_file(self, path: str, file: Path, *, missing: bool = True) -> None:
        """Copy an object to a new file of this disk, whose faults stay OSError. Without `missing`, one that is not
        there is FileNotFoundError."""
        with self._asking(large=True, missing=missing):
            stream = obstore.get(self._store, path).stream(min_chunk_size=_CHUNK_BYTES)
            with file.open("xb") as copy:
                for chunk in stream:
                    copy.write(chunk)

    def delete(self, paths: Sequence[str]) -> None:
        """Remove these objects, as far as they are there."""
        with self._asking(), self._changing(), contextlib.suppress(FileNotFoundError):  # a directory says so
            if paths:
                obstore.delete(self._store, paths)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Nobody compares a directory's object with what it was, and then replaces it, meanwhile."""
        if self._directory is None:
            yield
            return
        try:
            lock = (self._directory / _LOCK).open("wb")
        except OSError as fault:
            raise RemoteUnavailable(_line(fault)) from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _asking(self, *, large: bool = False, missing: bool = True) -> Iterator[None]:
        """Raises RemoteUnavailable for every fault, and at once while the store is silent.

        Args:
            large: it may take long, whatever the store does.
            missing: so is it a fault that something is not there.
        """
        with contextlib.ExitStack() as asked:
            if self._line is not None and not large:
                asked.enter_context(self._line.asking())
            elif self._line is not None:
                self._line.check()
            asked.enter_context(_faults(missing=missing))
            yield


def _options(patience: Patience) -> "tuple[ClientConfig, RetryConfig]":
    seconds = patience.answer_seconds
    client: ClientConfig = {
        "connect_timeout": timedelta(seconds=seconds / 3),
        "read_timeout": timedelta(seconds=seconds),
        "timeout": timedelta(hours=1),
        "allow_http": True,  # whoever writes http:// into an endpoint means it
    }
    return client, {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=seconds * 2 / 3)}


@contextlib.contextmanager
def _faults(*, missing: bool = True) -> Iterator[None]:
    """Whatever the store's client raises becomes RemoteUnavailable; with `missing`, so does that there is no bucket."""
    try:
        yield
    except FileNotFoundError as fault:
        if not missing:
            raise
        raise RemoteUnavailable(_line(fault)) from None
    except BaseError as fault:
        raise RemoteUnavailable(_line(fault)) from None


def _line(fault: Exception) -> str:
    """What happened, without the client's own debugging notes."""
    return " ".join(str(fault).partition("Debug source")[0].split())[:300]
