"""Names of adapters and the versions that they mean, files included.

What a name means is its `Pointer`, kept by `adapters.storage.names` and changed at once, after the files are safe with
`adapters.storage.files`, so that `kill -9` at any moment leaves the old state or the new one. It publishes what
`adapters.peft_format.directory.inspect` has passed.
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

from adapters.disk import full_disk_named
from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.fields import AdapterError, shorten
from adapters.storage.files import VersionFiles
from adapters.storage.names import Apply, Names
from adapters.storage.receipt import receipt_of
from adapters.storage.versions import Known, Meaning, Pointer, RemoteUnavailable, UnknownAdapter, Version, check_name

if TYPE_CHECKING:
    from adapters.storage.remote import RemoteStore

RETAINED_VERSIONS = 5

Change = tuple[Pointer | None, Pointer | None]  # what a name meant, and what it means

log = logging.getLogger(__name__)


class Moved(Exception):
    """The name means something else than the caller expected. `etag`: what it means."""

    def __init__(self, etag: str) -> None:
        super().__init__(f"the name means {etag} by now")
        self.etag = etag


class AdapterStore:
    """Names, their versions, and the directories of these.

    Reading (`get`, `versions`, `list`, `lease`) never waits for a disk; `publish` and whatever else changes something
    does, or for the network, and belongs in a worker thread. Creating a store removes what an earlier process left
    unfinished.

    Args:
        root: directory of its own, made if missing, on one file system.
        names: what every name means, durably.
        remote: where names and files are kept, if not here.
        disk_bytes: with `remote`, how much of it may be here; what is leased stays beyond that.
        retain: how many versions of a name are kept, the current one included.
        check_pins: called before these become all versions that answer for pinned names; raises to forbid the change.
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
        self._kept = names
        self._retain = retain
        self._changing = threading.RLock()  # held through all of a name's change
        self._known = Known()
        self._check_pins = check_pins
        self._recover()

    def close(self) -> None:
        """Fetch nothing more, so that the process can end."""
        self._files.close()

    # --- reading ---------------------------------------------------------------------------------

    def get(self, tenant: str, name: str, digest_prefix: str | None = None) -> Version:
        """The current version of a name, or the retained one whose digest begins with `digest_prefix` (hex digits).

        Raises:
            UnknownAdapter: no such name or version, or a prefix of fewer than 8 digits.
            AmbiguousDigest: several retained versions begin so.
        """
        pointer = self.pointer(tenant, name)
        return pointer.current if digest_prefix is None else pointer.find(digest_prefix)

    def pointer(self, tenant: str, name: str) -> Pointer:
        """What a name means. Raises UnknownAdapter."""
        return _there(name, self._known.get(tenant, name))

    def readable(self, tenant: str, name: str) -> Pointer:
        """What a name of the tenant's own means, or else OWNER/NAME that is shared with it. Raises UnknownAdapter."""
        return _there(name, self._known.get(tenant, name) or self._known.shared(tenant, name))

    def shared_with(self, tenant: str) -> "list[Version]":
        """The current version of every name that others share with the tenant."""
        return [pointer.current for pointer in self._known.all_shared(tenant)]

    def versions(self, tenant: str, name: str) -> list[Version]:
        """The retained versions of a name, the current one first. Raises UnknownAdapter."""
        return list(self.pointer(tenant, name).versions)

    def answers(self, digest: str) -> bool:
        """Whether requests for any name may get this content."""
        return self._known.answers(digest)

    def pinned(self, tenant: str, name: str) -> bool:
        """Whether what the name means shall stay on the device."""
        return (tenant, name) in self._known.pins

    def pinned_versions(self) -> list[Version]:
        """Every content that answers for a pinned name, once."""
        return _answering_all(list(self._known.pins.values()))

    def lease(self, version: Version) -> AbstractContextManager[Version]:
        """Keep a version's files while this is open, whatever becomes of its name.

        Raises UnknownAdapter when the version was removed since `get` answered it.
        """
        return self._files.lease(version)

    def has(self, version: Version) -> bool:
        """Whether a version's files are here; as long as it is leased, that lasts."""
        return self._files.has(version.digest)

    async def ready(self, version: Version) -> None:
        """Wait until the files of a leased version are here. Only who needs them waits.

        Raises:
            RemoteUnavailable: they cannot be had now.
            DamagedAdapter: what the remote has is not this version.
            StorageFull: there is no room for them.
        """
        await self._files.ready(version.digest)

    def check_case(self, tenant: str, name: str) -> None:
        """Raises AdapterError when another name differs from this one in the case of letters only."""
        names = self._known.names(tenant)
        for other in [] if name in names else [other for other in names if other.casefold() == name.casefold()]:
            raise AdapterError(f"'{name}' differs from the adapter '{other}' in upper and lower case only", "name")

    def mend(self, version: Version) -> None:
        """Make anew what is damaged of a leased version's files. Waits for the disk, and perhaps for the remote.

        Raises DamagedAdapter when it cannot be mended, RemoteUnavailable, StorageFull.
        """
        self._files.mend(version.digest)

    def repair(self, staging: Path, spec: AdapterSpec) -> None:
        """Put staged files, which `inspect` described by `spec`, in place of a damaged version's."""
        self._files.repair(staging, spec)

    def named(self, digest: str) -> Version | None:
        """A version with this content, under any name."""
        return next((version for version in self.all_versions() if version.digest == digest), None)

    def all_versions(self) -> Iterator[Version]:
        """Every version of every name."""
        return (version for pointer in self._known.all() for version in pointer.versions)

    # --- changing --------------------------------------------------------------------------------

    def stage(self) -> AbstractContextManager[Path]:
        """A private directory for an adapter's files, gone afterwards unless published. Raises StorageFull."""
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
        """Make the staged files, which `inspect` described by `spec`, the current content of `name`.

        Durable when it returns. Content that is stored already is not stored twice. Without `promote` a name that
        exists goes on meaning what it means, and the content waits among its versions.

        Returns:
            The version, and whether the name changed.

        Raises:
            AdapterError: the name is not allowed.
            StorageFull: nothing was kept.
        """
        check_name(name, fine_tuned=fine_tuned)
        path, created = self._files.path(spec.digest), time.time()

        def change(before: Pointer | None) -> Pointer:
            self.check_case(tenant, name)
            staged = before is not None and not promote
            version = Version(tenant, name, spec.digest, path, created, receipt_of(spec), staged=staged)
            if before is None:
                return Pointer((version,))
            known = {one.digest for one in before.versions}
            if spec.digest in known and (staged or before.shares == {spec.digest: 1.0}):
                return before
            others = tuple(old for old in before.versions if old.digest != spec.digest)
            if staged:
                return replace(before, versions=(before.current, version, *others[1:]))
            return replace(before, versions=(version, *others), split=())

        with full_disk_named(), self._files.coming(staging, spec):
            self._files.place(staging, spec.digest)
            before, after = self._change(tenant, name, change, keep=spec.digest)
        assert after is not None
        return after.version(spec.digest), after != before

    def promote(self, tenant: str, name: str, digest: str, expected: Collection[str] | None = None) -> Pointer:
        """Let a name mean one of its versions, named by its digest or enough of its digits.

        Durable when it returns, as are `divide` and `roll_back`. `expected`: the change is made only while the name's
        etag is one of these. Returns what the name means now.

        Raises:
            UnknownAdapter: no such name or version. AmbiguousDigest.
            Moved: the name's etag is another.
            StorageFull: nothing changed.
        """

        def change(pointer: Pointer) -> Pointer:
            return pointer.promoted(pointer.find(digest.removeprefix("sha256:")).digest)

        return self._repoint(tenant, name, change, expected)

    def divide(
        self, tenant: str, name: str, shares: Mapping[str, float], expected: Collection[str] | None = None
    ) -> Pointer:
        """Split a name's requests between its versions: digest -> share. See `Pointer.divided` and `promote`."""
        return self._repoint(tenant, name, lambda pointer: pointer.divided(shares), expected)

    def roll_back(self, tenant: str, name: str, expected: Collection[str] | None = None) -> Pointer:
        """Undo the last change of what a name means: end its split, or else go back to the version before.

        Raises what `promote` does; UnknownAdapter when there is no version before.
        """

        def change(pointer: Pointer) -> Pointer:
            if pointer.split:
                return replace(pointer, split=())
            if pointer.previous is None:
                raise UnknownAdapter(f"'{shorten(name)}' has no version before the current one")
            return pointer.promoted(pointer.previous.digest)

        return self._repoint(tenant, name, change, expected)

    def pin(self, tenant: str, name: str, pinned: bool) -> Pointer:
        """Say whether what the name means, now and later, shall stay on the device. Raises as `promote` does."""
        return self._repoint(tenant, name, lambda pointer: replace(pointer, pinned=pinned), None)

    def share(self, tenant: str, name: str, readers: Collection[str]) -> Pointer:
        """Let these tenants use the name, and no others. Raises as `promote` does."""
        return self._repoint(tenant, name, lambda pointer: replace(pointer, readers=tuple(sorted(readers))), None)

    def delete(self, tenant: str, name: str) -> Version:
        """Take a name away with all its versions; files that are leased go with their last lease.

        Returns the version that was current. Raises UnknownAdapter.
        """

        def change(pointer: Pointer | None) -> None:
            _there(name, pointer)

        before, _ = self._change(tenant, name, change)
        return _there(name, before).current

    # --- changes of other servers ----------------------------------------------------------------------

    def refresh(self) -> Sequence[Change]:
        """Take over what other servers changed since; waits for the remote. Raises RemoteUnavailable."""
        news = self._remote.news(self._files.path) if self._remote else ()
        return tuple(change for meaning in news if (change := self._follow(meaning)) is not None)

    def look(self, tenant: str, name: str) -> Change | None:
        """Take over what one name means to other servers. See `refresh`."""
        meaning = self._remote.look(tenant, name, self._files.path) if self._remote else None
        return None if meaning is None else self._follow(meaning)

    def _follow(self, meaning: Meaning) -> Change | None:
        assert self._remote is not None
        with self._changing:
            if not self._remote.note(meaning):
                return None
            before = self._known.get(meaning.tenant, meaning.name)
            if before == meaning.pointer:
                return None
            self._point(meaning.tenant, meaning.name, meaning.pointer)
        for version in before.versions if before else ():
            self._files.remove_unused(version.digest)
        return before, meaning.pointer

    async def remove_orphans(self, seconds: float) -> int:
        """Remove versions from the remote that no name has and nobody wrote in the last so many seconds; how many.

        Raises RemoteUnavailable.
        """
        return await self._files.remove_orphans(seconds)

    # --- names ----------------------------------------------------------------------------------------

    def _repoint(
        self, tenant: str, name: str, change: Callable[[Pointer], Pointer], expected: Collection[str] | None
    ) -> Pointer:
        def checked(pointer: Pointer | None) -> Pointer:
            before = _there(name, pointer)
            if expected is not None and before.etag not in expected:
                raise Moved(before.etag)
            return change(before)

        return _there(name, self._change(tenant, name, checked)[1])

    def _change(self, tenant: str, name: str, change: Apply, keep: str | None = None) -> Change:
        """Let a name mean what `change` makes of what it means, less what is beyond retention; before and after.

        `keep`: the digest of a version that stays, beside the current one.
        """
        with full_disk_named(), self._changing, ExitStack() as marked:
            known = self._known.get(tenant, name)
            made: Change = (known, known)

            def apply(before: Pointer | None) -> Pointer | None:
                nonlocal made
                after = change(before)
                if after is not None and after != before:
                    after = replace(after, versions=after.retained(self._retain, keep or after.current.digest))
                    if after.pinned:
                        others = [pin for owner, pin in self._known.pins.items() if owner != (tenant, name)]
                        self._check_pins(_answering_all([*others, after]))
                if after != before:
                    marked.enter_context(self._files.renaming(before, after))
                made = before, after
                return after

            try:
                now = self._kept.change(tenant, name, known, apply, self._files.path)
            except (UnknownAdapter, Moved):  # another server changed it, perhaps
                with suppress(RemoteUnavailable):
                    self.look(tenant, name)
                raise
            if now != known:
                self._point(tenant, name, now)
        for version in known.versions if known else ():
            self._files.remove_unused(version.digest)
        return made

    def _point(self, tenant: str, name: str, pointer: Pointer | None) -> None:
        """Let a name mean this from now on, and want its files."""
        before = self._known.point(tenant, name, pointer)
        self._files.want(*({one.digest for one in of.versions} if of else () for of in (pointer, before)))

    def _recover(self) -> None:
        """Read the names, and take away the files that no name has."""
        known: set[str] = set()
        for pointer in self._kept.load(self._files.path):
            owner = pointer.current
            known.update(version.digest for version in pointer.versions)
            missing = {digest for digest in (owner.digest, *pointer.shares) if not self._files.obtainable(digest)}
            if missing:  # nothing here does that; an older version would be a lie
                log.error("the files of adapter %s (%s) are missing; it is not served", owner.name, ", ".join(missing))
                continue
            present = tuple(version for version in pointer.versions if self._files.obtainable(version.digest))
            self._point(owner.tenant, owner.name, replace(pointer, versions=present))
            self._files.complete(pointer)
        self._files.settle(known | self._kept.unreadable, self._kept.title)

    # Last, because its name hides the type of that name from what follows.
    def list(self, tenant: str) -> list[Version]:
        """The current version of every name, by name."""
        current = [pointer.current for pointer in self._known.names(tenant).values()]
        return sorted(current, key=attrgetter("name"))


def _there(name: str, pointer: Pointer | None) -> Pointer:
    if pointer is None:
        raise UnknownAdapter(f"there is no adapter '{shorten(name)}'")
    return pointer


def _answering_all(pointers: Collection[Pointer]) -> list[Version]:
    return list({version.digest: version for pointer in pointers for version in pointer.answering}.values())
