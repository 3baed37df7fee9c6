"""An object store: S3, Google Cloud Storage, Azure, or a directory, through obstore.

Objects appear whole or not at all. `put_if` replaces an object only if it is unchanged since it was read: the store
compares its ETag. For a directory, a lock on one of its files serves instead (`flock`, also available on NFS).
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

from adapters.storage.silence import REQUEST_LIMITS, RequestLimits, Requests, shared_requests
from adapters.storage.versions import RemoteUnavailable

if TYPE_CHECKING:
    from obstore import PutMode, UpdateVersion
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_CHUNK_BYTES = 1 << 20
_RETRIES = 3
_LOCK = ".lock"  # in a directory; not the name of any object


class Conflict(Exception):
    """The object has changed since it was read."""


class Entry(NamedTuple):
    """An object in a list."""

    path: str
    etag: str | None
    age: float  # seconds since it was written
    size: int


class Object(NamedTuple):
    """An object as it was read. `version` is the argument of `Bucket.put_if`."""

    content: bytes
    etag: str | None
    version: "UpdateVersion"
    age: float  # seconds since it was written


class Bucket:
    """One prefix of a bucket. All methods wait for a network, and raise RemoteUnavailable.

    Args:
        url: s3://bucket/prefix, gs://..., az://..., file:///...; credentials, region and endpoint come from the
            environment, as that provider's own tools read them (AWS_ENDPOINT_URL, ...).
        limits: time limits and concurrency for a network store.

    Raises:
        ValueError: no such kind of store, or an incomplete configuration.
    """

    def __init__(self, url: str, limits: RequestLimits = REQUEST_LIMITS) -> None:
        self._directory: Path | None = None
        self._requests: Requests | None = None  # None for a directory
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
                client, retry = _options(limits)
                self._store = from_url(url, client_options=client, retry_config=retry)
                self._requests = shared_requests(url, limits)
        except (BaseError, OSError) as fault:
            raise ValueError(_message(fault)) from None

    def list(self, prefix: str) -> list[Entry]:
        """The objects below a prefix. A store's list may lag behind its writes."""
        found: list[Entry] = []
        with self._requesting():
            now = datetime.now(UTC)
            for chunk in obstore.list(self._store, prefix):
                if self._requests is not None:
                    self._requests.note_answer()
                ages = [(now - entry["last_modified"]).total_seconds() for entry in chunk]
                found += [
                    Entry(one["path"], one["e_tag"], age, one["size"]) for one, age in zip(chunk, ages, strict=True)
                ]
        return found

    def read(self, path: str) -> Object | None:
        """A small object; None if there is none."""
        try:
            with self._requesting(missing_is_unavailable=False):
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
        """Replace an object if it still has this version, or create one for None; return its new ETag.

        Raises Conflict otherwise; after any other fault it may or may not have been replaced.
        """
        if self._directory is not None:
            return self._put_in_directory(self._directory / path, content, version)
        mode: PutMode = "create" if version is None else version
        with self._requesting():
            try:
                return obstore.put(self._store, path, content, mode=mode)["e_tag"]
            except (AlreadyExistsError, PreconditionError) as fault:
                raise Conflict(_message(fault)) from None

    def _put_in_directory(self, file: Path, content: bytes, version: "UpdateVersion | None") -> str | None:
        assert self._directory is not None
        path = file.relative_to(self._directory).as_posix()
        try:
            with self._changing():
                found = self.read(path)
                if (found and found.version) != version:
                    raise Conflict(path)
                # Not through obstore, since a file's ETag is made of its inode, time and size: inodes are reused and
                # the kernel's own times are milliseconds apart, so that one ETag could mean two contents.
                file.parent.mkdir(parents=True, exist_ok=True)
                new = self._directory / f".new-{os.getpid()}-{threading.get_ident()}"
                new.write_bytes(content)
                now = time.time_ns()
                os.utime(new, ns=(now, now))
                with new.open("rb") as written:
                    os.fsync(written.fileno())
                new.rename(file)
                after = self.read(path)
                return after.etag if after else None
        except OSError as fault:
            raise RemoteUnavailable(_message(fault)) from None

    def put_file(self, path: str, file: Path) -> None:
        """Create or replace an object of any size."""
        with self._requesting(large=True):
            obstore.put(self._store, path, file)

    def get_file(self, path: str, file: Path, *, missing_is_unavailable: bool = True) -> None:
        """Copy an object to a new file; faults of the disk stay OSError.

        Without `missing_is_unavailable`, a missing object raises FileNotFoundError.
        """
        with self._requesting(large=True, missing_is_unavailable=missing_is_unavailable):
            stream = obstore.get(self._store, path).stream(min_chunk_size=_CHUNK_BYTES)
            with file.open("xb") as copy:
                for chunk in stream:
                    copy.write(chunk)

    def delete(self, paths: Sequence[str]) -> None:
        """Remove these objects, ignoring missing ones."""
        with (
            self._requesting(),
            self._changing(),
            contextlib.suppress(FileNotFoundError),
        ):  # of a directory
            if paths:
                obstore.delete(self._store, paths)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Keep other processes from replacing or removing objects of a directory meanwhile."""
        if self._directory is None:
            yield
            return
        try:
            lock = (self._directory / _LOCK).open("wb")
        except OSError as fault:
            raise RemoteUnavailable(_message(fault)) from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def _requesting(self, *, large: bool = False, missing_is_unavailable: bool = True) -> Iterator[None]:
        """Turn every fault into RemoteUnavailable, which is raised at once while the store is silent.

        Args:
            large: the transfer may take long, so it does not count as silence.
            missing_is_unavailable: a missing object is such a fault, too.
        """
        with contextlib.ExitStack() as contexts:
            if self._requests is not None and not large:
                contexts.enter_context(self._requests.track())
            elif self._requests is not None:
                self._requests.check()
            contexts.enter_context(_translated_faults(missing_is_unavailable=missing_is_unavailable))
            yield


def _options(limits: RequestLimits) -> "tuple[ClientConfig, RetryConfig]":
    seconds = limits.answer_seconds
    client: ClientConfig = {
        "connect_timeout": timedelta(seconds=seconds / 3),
        "read_timeout": timedelta(seconds=seconds),
        "timeout": timedelta(hours=1),
        "allow_http": True,  # an endpoint with http:// is deliberate
    }
    return client, {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=seconds * 2 / 3)}


@contextlib.contextmanager
def _translated_faults(*, missing_is_unavailable: bool = True) -> Iterator[None]:
    """Turn the store client's faults into RemoteUnavailable; with `missing_is_unavailable`, also a missing object or
    bucket."""
    try:
        yield
    except FileNotFoundError as fault:
        if not missing_is_unavailable:
            raise
        raise RemoteUnavailable(_message(fault)) from None
    except BaseError as fault:
        raise RemoteUnavailable(_message(fault)) from None


def _message(fault: Exception) -> str:
    """The message of a fault, without the client's debugging notes."""
    return " ".join(str(fault).partition("Debug source")[0].split())[:300]
