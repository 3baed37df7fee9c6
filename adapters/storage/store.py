"""Names of adapters, their versions, and the versions' files.

`adapters.storage.names` holds each name's `Pointer` and replaces it atomically, after `adapters.storage.files` has made
the files durable, so that `kill -9` at any moment leaves the old state or the new one. Adapters are published once
`adapters.peft_format.inspection.inspect` has passed them.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.disk import raising_storage_full
from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.fields import AdapterError, shorten
from adapters.storage.files import VersionFiles
from adapters.storage.names import Apply, Names
from adapters.storage.receipt import receipt_of
from adapters.storage.versions import (
    Pointer,
    Pointers,
    RemotePointer,
    RemoteUnavailable,
    UnknownAdapter,
    Version,
    check_name,
)

if TYPE_CHECKING:
    from adapters.storage.remote import RemoteStore

RETAINED_VERSIONS = 5

Change = tuple[Pointer | None, Pointer | None]  # a name's pointers before and after

log = logging.getLogger(__name__)


class EtagMismatch(Exception):
    """The name's etag is none of the expected ones. `etag`: the current one."""

    def __init__(self, etag: str) -> None:
        super().__init__(f"the name's etag is {etag}")
        self.etag = etag


class AdapterStore:
    """Names, their versions, and the versions' directories.

    Reads (`get`, `versions`, `list`, `lease`) never wait for a disk. `publish` and the other changes wait for the disk
    or the network, and belong in a worker thread. Creating a store removes unfinished uploads of an earlier process.

    Args:
        root: directory of its own, made if missing, on one file system.
        names: the durable pointers of all names.
        remote: the object store of names and files, if there is one.
        disk_bytes: with `remote`, the bytes allowed on this disk; leased files may exceed them.
        retain: how many versions of a name are kept, the current one included.
        check_pins: called before a change with all versions that would answer for pinned names; raises to forbid it.
    """

    def __init__(
        self,
        root: Path,
        names: Names,
        *,
        remote: "RemoteStore | None" = None,
        disk_bytes: int | None = None,
        retain: int = RETAINED_VERSIONS,
        check_pins: Callable[[Collection[Version]], None] = lambda versions: None,
    ) -> None:
        if retain < 1:
            raise ValueError(f"retain must be at least 1, for the current version, not {retain}")
        self._files = VersionFiles(root, remote, disk_bytes)
        self._remote = remote
        self._names = names
        self._retain = retain
        self._change_lock = threading.RLock()  # held during the whole change of a name
        self._pointers = Pointers()
        self._check_pins = check_pins
        self._recover()

    def close(self) -> None:
        """Stop fetching, so that the process can exit."""
        self._files.close()

    # --- reading ---------------------------------------------------------------------------------

    def get(self, tenant: str, name: str, digest_prefix: str | None = None) -> Version:
        """The current version of a name, or the retained one whose digest begins with `digest_prefix` (hex digits).

        Raises:
            UnknownAdapter: no such name or version, or a prefix of fewer than 8 digits.
            AmbiguousDigest: several retained versions have this prefix.
        """
        pointer = self.pointer(tenant, name)
        return pointer.current if digest_prefix is None else pointer.find(digest_prefix)

    def pointer(self, tenant: str, name: str) -> Pointer:
        """The pointer of a name. Raises UnknownAdapter."""
        return _existing(name, self._pointers.get(tenant, name))

    def readable_pointer(self, tenant: str, name: str) -> Pointer:
        """The pointer of the tenant's own name, else of an OWNER/NAME shared with it. Raises UnknownAdapter."""
        return _existing(name, self._pointers.get(tenant, name) or self._pointers.shared(tenant, name))

    def shared_with(self, tenant: str) -> "list[Version]":
        """The current version of every name shared with the tenant."""
        return [pointer.current for pointer in self._pointers.all_shared(tenant)]

    def versions(self, tenant: str, name: str) -> list[Version]:
        """The retained versions of a name, the current one first. Raises UnknownAdapter."""
        return list(self.pointer(tenant, name).versions)

    def is_answering(self, digest: str) -> bool:
        """Whether the version of this digest may answer requests for any name."""
        return self._pointers.is_answering(digest)

    def is_pinned(self, tenant: str, name: str) -> bool:
        """Whether the name is pinned to the device."""
        return (tenant, name) in self._pointers.pins

    def pinned_versions(self) -> list[Version]:
        """The versions that answer for pinned names, each digest once."""
        return _answering_all(list(self._pointers.pins.values()))

    def lease(self, version: Version) -> AbstractContextManager[Version]:
        """Keep a version's files while the context is open, even if its name changes or is deleted.

        Raises UnknownAdapter when the version was removed after `get` returned it.
        """
        return self._files.lease(version)

    def has(self, version: Version) -> bool:
        """Whether a version's files are on this disk. A lease keeps them there."""
        return self._files.has(version.digest)

    async def wait_until_ready(self, version: Version) -> None:
        """Wait until the files of a leased version are on this disk.

        Raises:
            RemoteUnavailable: they cannot be fetched now.
            DamagedAdapter: the object store's files do not match the digest.
            StorageFull: there is no room for them.
        """
        await self._files.wait_until_ready(version.digest)

    def check_case(self, tenant: str, name: str) -> None:
        """Refuse a name that differs from another one of the tenant in letter case only. Raises AdapterError."""
        names = self._pointers.names(tenant)
        for other in [] if name in names else [other for other in names if other.casefold() == name.casefold()]:
            raise AdapterError(f"'{name}' differs from the adapter '{other}' in upper and lower case only", "name")

    def mend(self, version: Version) -> None:
        """Mend the damaged files of a leased version. Waits for the disk, and possibly for the object store.

        Raises DamagedAdapter when they cannot be mended, RemoteUnavailable, StorageFull.
        """
        self._files.mend(version.digest)

    def replace_damaged(self, staging: Path, spec: AdapterSpec) -> None:
        """Replace a damaged version's files by the staged ones, described by `spec`."""
        self._files.replace_damaged(staging, spec)

    def version_by_digest(self, digest: str) -> Version | None:
        """A version with this digest, under any name."""
        return next((version for version in self.all_versions() if version.digest == digest), None)

    def all_versions(self) -> Iterator[Version]:
        """Every version of every name."""
        return (version for pointer in self._pointers.all() for version in pointer.versions)

    # --- changing --------------------------------------------------------------------------------

    def stage(self) -> AbstractContextManager[Path]:
        """A private directory for an adapter's files, removed on exit unless published. Raises StorageFull."""
        return self._files.stage()

    def publish(
        self,
        tenant: str,
        name: str,
        staging: Path,
        spec: AdapterSpec,
        *,
        fine_tuned: bool = False,
        promote: bool = True,
    ) -> tuple[Version, bool]:
        """Publish the staged files, described by `spec`, as the current version of `name`.

        Durable on return. Content that is already stored is not stored twice. Without `promote`, an existing name keeps
        its current version and split; the new version is staged.

        Returns:
            The version, and whether the name's pointer changed.

        Raises:
            AdapterError: the name is not allowed.
            StorageFull: nothing was stored.
        """
        check_name(name, fine_tuned=fine_tuned)
        path, created = self._files.path(spec.digest), time.time()

        def change(before: Pointer | None) -> Pointer:
            self.check_case(tenant, name)
            staged = before is not None and not promote
            version = Version(tenant, name, spec.digest, path, created, receipt_of(spec), staged=staged)
            if before is None:
                return Pointer((version,))
            digests = {one.digest for one in before.versions}
            if spec.digest in digests and (staged or before.shares == {spec.digest: 1.0}):
                return before
            others = tuple(old for old in before.versions if old.digest != spec.digest)
            if staged:
                return replace(before, versions=(before.current, version, *others[1:]))
            return replace(before, versions=(version, *others), split=())

        with raising_storage_full(), self._files.persisting(staging, spec):
            self._files.place(staging, spec.digest)
            before, after = self._change(tenant, name, change, keep=spec.digest)
        assert after is not None
        return after.version(spec.digest), after != before

    def promote(self, tenant: str, name: str, digest: str, expected: Collection[str] | None = None) -> Pointer:
        """Make one of a name's versions current, given its digest or a prefix of it.

        Durable on return, as are `split` and `roll_back`. `expected`: the change is made only while the name's etag is
        one of these. Returns the new pointer.

        Raises:
            UnknownAdapter: no such name or version. AmbiguousDigest.
            EtagMismatch: the name's etag is another.
            StorageFull: nothing changed.
        """

        def change(pointer: Pointer) -> Pointer:
            return pointer.promoted(pointer.find(digest.removeprefix("sha256:")).digest)

        return self._update_pointer(tenant, name, change, expected)

    def split(
        self, tenant: str, name: str, shares: Mapping[str, float], expected: Collection[str] | None = None
    ) -> Pointer:
        """Split a name's requests among its versions: digest -> share. See `Pointer.with_split` and `promote`."""
        return self._update_pointer(tenant, name, lambda pointer: pointer.with_split(shares), expected)

    def roll_back(self, tenant: str, name: str, expected: Collection[str] | None = None) -> Pointer:
        """Undo the last change of a name's pointer: end its split, or else return to the previous version.

        Raises the errors of `promote`; UnknownAdapter when there is no previous version.
        """

        def change(pointer: Pointer) -> Pointer:
            if pointer.split:
                return replace(pointer, split=())
            if pointer.previous is None:
                raise UnknownAdapter(f"'{shorten(name)}' has no version before the current one")
            return pointer.promoted(pointer.previous.digest)

        return self._update_pointer(tenant, name, change, expected)

    def pin(self, tenant: str, name: str, pinned: bool) -> Pointer:
        """Pin the name's versions to the device, now and after later changes, or unpin them. Raises the errors of
        `promote`."""
        return self._update_pointer(tenant, name, lambda pointer: replace(pointer, pinned=pinned), None)

    def share(self, tenant: str, name: str, readers: Collection[str]) -> Pointer:
        """Share the name with exactly these tenants. Raises the errors of `promote`."""
        return self._update_pointer(
            tenant, name, lambda pointer: replace(pointer, readers=tuple(sorted(readers))), None
        )

    def delete(self, tenant: str, name: str) -> Version:
        """Remove a name with all its versions; leased files go with their last lease.

        Returns the version that was current. Raises UnknownAdapter.
        """

        def change(pointer: Pointer | None) -> None:
            _existing(name, pointer)

        before, _ = self._change(tenant, name, change)
        return _existing(name, before).current

    # --- changes of other servers ----------------------------------------------------------------------

    def import_changes(self) -> Sequence[Change]:
        """Import other servers' changes since the last call; waits for the network. Raises RemoteUnavailable."""
        changed = self._remote.fetch_changes(self._files.path) if self._remote else ()
        return tuple(change for remote in changed if (change := self._apply_remote(remote)) is not None)

    def import_change(self, tenant: str, name: str) -> Change | None:
        """Import another server's change of one name. See `import_changes`."""
        remote = self._remote.fetch_pointer(tenant, name, self._files.path) if self._remote else None
        return None if remote is None else self._apply_remote(remote)

    def _apply_remote(self, remote: RemotePointer) -> Change | None:
        assert self._remote is not None
        with self._change_lock:
            if not self._remote.remember(remote):
                return None
            before = self._pointers.get(remote.tenant, remote.name)
            if before == remote.pointer:
                return None
            self._set_pointer(remote.tenant, remote.name, remote.pointer)
        for version in before.versions if before else ():
            self._files.remove_unused(version.digest)
        return before, remote.pointer

    async def remove_orphans(self, seconds: float) -> int:
        """Remove versions from the object store that have no name and no file written in the last `seconds`; return the
        count.

        Raises RemoteUnavailable.
        """
        return await self._files.remove_orphans(seconds)

    # --- names ----------------------------------------------------------------------------------------

    def _update_pointer(
        self, tenant: str, name: str, change: Callable[[Pointer], Pointer], expected: Collection[str] | None
    ) -> Pointer:
        def change_if_expected(pointer: Pointer | None) -> Pointer:
            before = _existing(name, pointer)
            if expected is not None and before.etag not in expected:
                raise EtagMismatch(before.etag)
            return change(before)

        return _existing(name, self._change(tenant, name, change_if_expected)[1])

    def _change(self, tenant: str, name: str, change: Apply, keep: str | None = None) -> Change:
        """Replace a name's pointer by `change` of it, less versions beyond retention; return both pointers.

        `keep`: the digest of a version to retain, beside the current one.
        """
        with raising_storage_full(), self._change_lock, ExitStack() as marks:
            last_seen = self._pointers.get(tenant, name)
            change_made: Change = (last_seen, last_seen)

            def apply(before: Pointer | None) -> Pointer | None:
                nonlocal change_made
                after = change(before)
                if after is not None and after != before:
                    after = replace(after, versions=after.retained(self._retain, keep or after.current.digest))
                    if after.pinned:
                        others = [pin for owner, pin in self._pointers.pins.items() if owner != (tenant, name)]
                        self._check_pins(_answering_all([*others, after]))
                if after != before:
                    marks.enter_context(self._files.changing_pointer(before, after))
                change_made = before, after
                return after

            try:
                after_change = self._names.change(tenant, name, last_seen, apply, self._files.path)
            except (UnknownAdapter, EtagMismatch):  # another server changed it, perhaps
                with suppress(RemoteUnavailable):
                    self.import_change(tenant, name)
                raise
            if after_change != last_seen:
                self._set_pointer(tenant, name, after_change)
        for version in last_seen.versions if last_seen else ():
            self._files.remove_unused(version.digest)
        return change_made

    def _set_pointer(self, tenant: str, name: str, pointer: Pointer | None) -> None:
        """Set a name's pointer in memory, and count its versions' files as wanted."""
        before = self._pointers.set(tenant, name, pointer)
        self._files.count_names(*({one.digest for one in of.versions} if of else () for of in (pointer, before)))

    def _recover(self) -> None:
        """Read the names, and remove the files of versions without a name."""
        named: set[str] = set()
        for pointer in self._names.load(self._files.path):
            current = pointer.current
            named.update(version.digest for version in pointer.versions)
            missing = {digest for digest in (current.digest, *pointer.shares) if not self._files.obtainable(digest)}
            if missing:  # not this server's doing; an older version would be a wrong answer
                log.error(
                    "the files of adapter %s (%s) are missing; it is not served", current.name, ", ".join(missing)
                )
                continue
            present = tuple(version for version in pointer.versions if self._files.obtainable(version.digest))
            self._set_pointer(current.tenant, current.name, replace(pointer, versions=present))
            self._files.write_missing_entries(pointer)
        self._files.remove_unknown(named | self._names.unreadable, self._names.title)

    # Last, because its name shadows the builtin type in the annotations below it.
    def list(self, tenant: str) -> list[Version]:
        """The current version of every name, by name."""
        current = [pointer.current for pointer in self._pointers.names(tenant).values()]
        return sorted(current, key=attrgetter("name"))


def _existing(name: str, pointer: Pointer | None) -> Pointer:
    if pointer is None:
        raise UnknownAdapter(f"there is no adapter '{shorten(name)}'")
    return pointer


def _answering_all(pointers: Collection[Pointer]) -> list[Version]:
    return list({version.digest: version for pointer in pointers for version in pointer.answering}.values())
