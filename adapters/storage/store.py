"""Names of adapters and the versions that they mean, files included.

What a name means is its `Pointer`, kept by `adapters.storage.names` and changed at once, after the files are safe with
`adapters.storage.files`, so that `kill -9` at any moment leaves the old state or the new one. It publishes what
`adapters.peft_format.directory.inspect` has passed.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

from adapters.disk import full_disk_named
from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.fields import AdapterError, shorten
from adapters.storage.files import VersionFiles
from adapters.storage.names import Names
from adapters.storage.receipt import receipt_of
from adapters.storage.staging import Staging
from adapters.storage.versions import EVERYBODY, Pointer, Remote, UnknownAdapter, Version, check_name

RETAINED_VERSIONS = 5

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
        remote: where the files are kept, if not here.
        disk_bytes: with `remote`, how much of it may be here; what is leased stays beyond that.
        retain: how many versions of a name are kept, the current one included.
        check_pins: called before these become all versions that answer for pinned names; raises to forbid the change.
    """

    def __init__(
        self,
        root: Path,
        names: Names,
        *,
        remote: Remote | None = None,
        disk_bytes: int | None = None,
        retain: int = RETAINED_VERSIONS,
        check_pins: Callable[[Collection[Version]], None] = lambda versions: None,
    ) -> None:
        if retain < 1:
            raise ValueError(f"retain must be at least 1, for the current version, not {retain}")
        self._files = VersionFiles(root, remote, disk_bytes)
        self._kept = names
        self._retain = retain
        self._changing = threading.Lock()  # held through all of a name's change
        self._names: dict[str, dict[str, Pointer]] = {}  # tenant -> name -> what it means
        self._shared: dict[str, dict[str, Pointer]] = {}  # reader -> OWNER/NAME -> what it means
        self._pins: dict[tuple[str, str], Pointer] = {}  # those of the names that are pinned
        self._answering: Counter[str] = Counter()  # digest -> names whose requests it may get
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
        try:
            return self._names[tenant][name]
        except KeyError:
            raise UnknownAdapter(f"there is no adapter '{shorten(name)}'") from None

    def readable(self, tenant: str, name: str) -> Pointer:
        """What a name of the tenant's own means, or else OWNER/NAME that is shared with it. Raises UnknownAdapter."""
        for names in (self._names.get(tenant), self._shared.get(tenant), self._shared.get(EVERYBODY)):
            if names is not None and (pointer := names.get(name)) is not None:
                return pointer
        raise UnknownAdapter(f"there is no adapter '{shorten(name)}'")

    def shared_with(self, tenant: str) -> "list[Version]":
        """The current version of every name that others share with the tenant."""
        own = self._names.get(tenant, {})
        names = self._shared.get(EVERYBODY, {}) | self._shared.get(tenant, {})
        found = [pointer.current for name, pointer in names.items() if name not in own]
        return [version for version in found if version.tenant != tenant]

    def versions(self, tenant: str, name: str) -> list[Version]:
        """The retained versions of a name, the current one first. Raises UnknownAdapter."""
        return list(self.pointer(tenant, name).versions)

    def answers(self, digest: str) -> bool:
        """Whether requests for any name may get this content."""
        return digest in self._answering

    def pinned(self, tenant: str, name: str) -> bool:
        """Whether what the name means shall stay on the device."""
        return (tenant, name) in self._pins

    def pinned_versions(self) -> list[Version]:
        """Every content that answers for a pinned name, once."""
        return _answering_all(list(self._pins.values()))

    def lease(self, version: Version) -> AbstractContextManager[Version]:
        """Keep a version's files while this is open, whatever becomes of its name.

        Raises:
            UnknownAdapter: the version was removed since `get` answered it.
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
        names = self._names.get(tenant, {})
        twins = () if name in names else [other for other in list(names) if other.casefold() == name.casefold()]
        for other in twins:
            raise AdapterError(f"'{name}' differs from the adapter '{other}' in upper and lower case only", "name")

    def mend(self, version: Version) -> None:
        """Make anew what is damaged of a leased version's files. Waits for the disk, and perhaps for the remote.

        Raises DamagedAdapter when it cannot be mended, RemoteUnavailable, StorageFull.
        """
        self._files.mend(version.digest)

    def repair(self, staging: Staging, spec: AdapterSpec) -> None:
        """Put staged files, which `inspect` described by `spec`, in place of a damaged version's."""
        self._files.repair(staging, spec)

    def named(self, digest: str) -> Version | None:
        """A version with this content, under any name."""
        return next((version for version in self.all_versions() if version.digest == digest), None)

    def all_versions(self) -> Iterator[Version]:
        """Every version of every name."""
        return (one for names in self._names.values() for pointer in names.values() for one in pointer.versions)

    # --- changing --------------------------------------------------------------------------------

    def stage(self) -> Staging:
        """A new private directory, to be used as a context manager. Raises StorageFull."""
        return self._files.stage()

    def publish(
        self,
        tenant: str,
        name: str,
        staging: Staging,
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
        with full_disk_named(), self._files.coming(staging, spec), self._changing:
            return self._publish(tenant, name, staging, spec, promote)

    def _publish(
        self, tenant: str, name: str, staging: Staging, spec: AdapterSpec, promote: bool
    ) -> tuple[Version, bool]:
        self.check_case(tenant, name)
        before = self._names.get(tenant, {}).get(name)
        known = {version.digest: version for version in before.versions} if before else {}
        current = before is None or promote
        if before and spec.digest in known and (not current or before.shares == {spec.digest: 1.0}):
            return known[spec.digest], False
        path = self._files.path(spec.digest)
        version = Version(tenant, name, spec.digest, path, time.time(), receipt_of(spec), staged=not current)
        others = tuple(old for old in known.values() if old.digest != spec.digest)
        if before is None:
            after = Pointer((version,))
        elif promote:
            after = replace(before, versions=(version, *others), split=())
        else:
            after = replace(before, versions=(before.current, version, *others[1:]))
        self._files.place(staging.path, spec.digest)
        self._change(before, after, keep=version)
        return version, True

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
        with full_disk_named(), self._changing:
            pointer = self.pointer(tenant, name)
            self._change(pointer, None)
        return pointer.current

    async def remove_orphans(self, seconds: float) -> int:
        """Remove versions from the remote that no name has and nobody wrote in the last so many seconds; how many.

        Raises RemoteUnavailable.
        """
        return await self._files.remove_orphans(seconds)

    # --- names, with `_changing` held ------------------------------------------------------------------

    def _repoint(
        self, tenant: str, name: str, change: Callable[[Pointer], Pointer], expected: Collection[str] | None
    ) -> Pointer:
        with full_disk_named(), self._changing:
            before = self.pointer(tenant, name)
            if expected is not None and before.etag not in expected:
                raise Moved(before.etag)
            after = change(before)
            if after != before:
                self._change(before, after, keep=after.current)
            return after

    def _change(self, before: Pointer | None, after: Pointer | None, keep: Version | None = None) -> None:
        """Let a name mean `after`, less what is beyond retention; `keep` is not."""
        owner = (after or before).current  # type: ignore[union-attr]  # one of them is there
        if after is not None and keep is not None:
            after = replace(after, versions=after.retained(self._retain, keep.digest))
        if after is not None and after.pinned:
            others = [pin for name, pin in self._pins.items() if name != (owner.tenant, owner.name)]
            self._check_pins(_answering_all([*others, after]))
        with self._files.renaming(before, after):
            self._kept.save(owner.tenant, owner.name, after)
            self._point(owner.tenant, owner.name, after)
        for version in before.versions if before else ():
            self._files.remove_unused(version.digest)

    def _point(self, tenant: str, name: str, pointer: Pointer | None) -> None:
        """Let a name mean this from now on."""
        names = self._names.setdefault(tenant, {})
        before = names.get(name)
        if pointer:
            names[name] = pointer
        else:
            del names[name]
        if before:
            for reader in before.readers:
                self._shared[reader].pop(before.current.name_for(reader))
        if pointer:
            for reader in pointer.readers:
                self._shared.setdefault(reader, {})[pointer.current.name_for(reader)] = pointer
        self._pins.pop((tenant, name), None)
        if pointer and pointer.pinned:
            self._pins[tenant, name] = pointer
        now = {version.digest for version in pointer.versions} if pointer else ()
        self._files.want(now, {version.digest for version in before.versions} if before else ())
        self._answering.update(pointer.shares.keys() if pointer else ())
        for digest in before.shares if before else ():
            self._answering[digest] -= 1
            if not self._answering[digest]:
                del self._answering[digest]

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
        current = [pointer.current for pointer in list(self._names.get(tenant, {}).values())]
        return sorted(current, key=attrgetter("name"))


def _answering_all(pointers: Collection[Pointer]) -> list[Version]:
    return list({version.digest: version for pointer in pointers for version in pointer.answering}.values())
