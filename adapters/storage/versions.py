"""Names of adapters and their pointers: one of a name's versions, or shares of several.

A `Pointer` is an immutable value, so every holder sees one consistent state of the name. The store decides when it is
replaced.
"""

import hashlib
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.peft_format.fields import AdapterError, shorten

_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
NAME = re.compile(rf"{_WORD}([/:]{_WORD})*")
MAX_NAME = 128
# Path segments that URLs append to a name: no word after a slash in a name may be one of them.
RESERVED = frozenset(
    {"config", "weights", "versions", "promote", "rollback", "pin", "warm", "verify", "merge", "share"}
)
MAX_BASE_NAME = 256  # of the base's name within a fine-tune's
FINE_TUNED_NAME = re.compile(rf"ft:[A-Za-z0-9._/-]{{1,{MAX_BASE_NAME}}}(:[A-Za-z0-9._-]{{0,128}}){{1,4}}")
EVERYBODY = "*"  # not a valid tenant
DEFAULT_TENANT = "default"  # the written form of the tenant ""
SHORTEST_PREFIX = 8
MAX_SHARES = 16
_ROUNDING = 1e-6  # tolerance of the shares' sum, which is 1


class UnknownAdapter(LookupError):
    """No such name, or no such version of it."""


class AmbiguousDigest(LookupError):
    """Several versions of the name have digests with this prefix."""


class RemoteUnavailable(Exception):
    """The object store does not answer, or refuses us; worth a retry."""


class DamagedAdapter(Exception):
    """A version's files do not match its digest, here or in the object store, and cannot be mended."""


@dataclass(frozen=True)
class Version:
    """One content of one name.

    Attributes:
        digest: "sha256:" and 64 hex digits.
        path: directory with the adapter's files, there as long as the version is retained or leased.
        created: unix time at which the content was published under the name.
        receipt: the result of `receipt_of`.
        staged: it has never been current.
    """

    tenant: str
    name: str
    digest: str
    path: Path
    created: float
    receipt: dict[str, Any]
    staged: bool = False

    def name_for(self, tenant: str) -> str:
        """The name as this tenant writes it: other tenants' shared adapters are OWNER/NAME."""
        return self.name if tenant == self.tenant else f"{self.tenant or DEFAULT_TENANT}/{self.name}"

    @property
    def label(self) -> str:
        """The name, unique among all tenants: no name has two consecutive slashes."""
        return f"{self.tenant}//{self.name}" if self.tenant else self.name


@dataclass(frozen=True)
class Pointer:
    """A name's retained versions, and the ones that answer requests.

    Attributes:
        versions: the current one first, then from the newest to the oldest.
        split: (digest, share) pairs that add up to 1; empty: the current version answers everything.
        pinned: the versions that answer stay on the device.
        readers: other tenants that may use the name, or `EVERYBODY`.
    """

    versions: tuple[Version, ...]
    split: tuple[tuple[str, float], ...] = ()
    pinned: bool = False
    readers: tuple[str, ...] = ()

    @property
    def current(self) -> Version:
        return self.versions[0]

    @property
    def shares(self) -> dict[str, float]:
        """Digest -> share of the requests, for every version that answers any."""
        return dict(self.split) or {self.current.digest: 1.0}

    @property
    def answering(self) -> list[Version]:
        """The versions that answer any request."""
        return [self.version(digest) for digest in self.shares]

    @property
    def etag(self) -> str:
        """An identifier of the current version or split: equal exactly when the same requests get the same versions."""
        if not self.split:
            return self.current.digest
        return f"split:{hashlib.sha256(json.dumps(self.split).encode()).hexdigest()}"

    @property
    def previous(self) -> Version | None:
        """The version that was current before this one."""
        return next((version for version in self.versions[1:] if not version.staged), None)

    def choose(self, user: str | None = None) -> Version:
        """The version for one request. A user always gets the same one while the shares stay as they are, and keeps it
        when a share grows at its neighbour's expense."""
        if not self.split:
            return self.current
        if user is None:
            position = random.random()
        else:
            hashed = hashlib.blake2b(f"{self.current.name}\0{user}".encode(), digest_size=7).digest()
            position = int.from_bytes(hashed, "big") / 2**56
        ends = itertools.accumulate(share for _, share in self.split)
        chosen = next((i for i, end in enumerate(ends) if position < end), -1)  # rounding may leave the sum below 1
        return self.version(self.split[chosen][0])

    def version(self, digest: str) -> Version:
        """The version with this whole digest. Raises UnknownAdapter."""
        return self.find(digest.removeprefix("sha256:"))

    def find(self, prefix: str) -> Version:
        """The version whose digest begins with these hex digits. Raises UnknownAdapter, AmbiguousDigest."""
        if len(prefix) < SHORTEST_PREFIX:
            raise UnknownAdapter(f"a version is named by at least {SHORTEST_PREFIX} digits of its digest")
        matching = [version for version in self.versions if version.digest.startswith(f"sha256:{prefix.lower()}")]
        name = self.current.name
        if not matching:
            raise UnknownAdapter(f"'{shorten(name)}' has no version {shorten(prefix)}")
        if len(matching) > 1:
            raise AmbiguousDigest(f"'{name}' has {len(matching)} versions that begin with {prefix}")
        return matching[0]

    def retained(self, count: int, keep: str) -> tuple[Version, ...]:
        """The versions to keep, `count` at most unless more are needed: those that answer, `keep` (a digest), then the
        newest."""
        needed = {*self.shares, self.current.digest, keep}
        room = count - len(needed)
        kept = []
        for version in self.versions:
            if version.digest not in needed:
                room -= 1
            if version.digest in needed or room >= 0:
                kept.append(version)
        return tuple(kept)

    def with_split(self, shares: Mapping[str, float]) -> "Pointer":
        """This pointer with its requests split. `shares`: digest or a prefix of it -> share; zeros are left out.

        Raises:
            AdapterError: too few or too many shares, one version twice, or a sum other than 1.
            UnknownAdapter: a digest that is no version of the name. AmbiguousDigest: several have the prefix.
        """
        if not 1 <= len(shares) <= MAX_SHARES:
            raise AdapterError(f"a split has 1 to {MAX_SHARES} shares, not {len(shares)}", "split")
        if not all(0 <= share <= 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > _ROUNDING:
            raise AdapterError("shares are from 0 to 1 and add up to 1", "split")
        found: dict[str, float] = {}
        for prefix, share in shares.items():
            digest = self.find(prefix.removeprefix("sha256:")).digest
            if digest in found:
                raise AdapterError(f"a split names the version {digest} twice", "split")
            found[digest] = share
        split = tuple((digest, share) for digest, share in found.items() if share)
        if len(split) == 1:
            return self.promoted(split[0][0])
        return replace(self, split=split)

    def with_older_versions(self, versions: Iterable[Version]) -> "Pointer":
        """This pointer with further versions appended, as older ones."""
        digests = {version.digest for version in self.versions}
        return replace(self, versions=(*self.versions, *(one for one in versions if one.digest not in digests)))

    def promoted(self, digest: str) -> "Pointer":
        """This pointer with the version of this whole digest current, answering everything."""
        chosen = self.version(digest)
        others = (version for version in self.versions if version.digest != chosen.digest)
        return replace(self, versions=(replace(chosen, staged=False), *others), split=())


class Pointers:
    """The pointers that a process knows, in memory. Read by any thread; changed by one at a time.

    Attributes:
        pins: the pointers of pinned names, by tenant and name.
    """

    def __init__(self) -> None:
        self.pins: dict[tuple[str, str], Pointer] = {}
        self._names: dict[str, dict[str, Pointer]] = {}  # tenant -> name -> pointer
        self._shared: dict[str, dict[str, Pointer]] = {}  # reader -> OWNER/NAME -> pointer
        self._answering: Counter[str] = Counter()  # digest -> number of names it may answer for

    def get(self, tenant: str, name: str) -> Pointer | None:
        """The pointer of a tenant's name."""
        return self._names.get(tenant, {}).get(name)

    def names(self, tenant: str) -> dict[str, Pointer]:
        """All of a tenant's names."""
        return dict(self._names.get(tenant, {}))

    def all(self) -> Iterator[Pointer]:
        """The pointers of all names."""
        return (pointer for names in list(self._names.values()) for pointer in list(names.values()))

    def shared(self, tenant: str, name: str) -> Pointer | None:
        """The pointer of an OWNER/NAME shared with a tenant."""
        own, everybody = self._shared.get(tenant, {}), self._shared.get(EVERYBODY, {})
        return own.get(name) or everybody.get(name)

    def all_shared(self, tenant: str) -> list[Pointer]:
        """The pointers of the names that others share with a tenant."""
        own = self._names.get(tenant, {})
        names = self._shared.get(EVERYBODY, {}) | self._shared.get(tenant, {})
        return [pointer for name, pointer in names.items() if name not in own and pointer.current.tenant != tenant]

    def is_answering(self, digest: str) -> bool:
        """Whether the version of this digest may answer requests for any name."""
        return digest in self._answering

    def set(self, tenant: str, name: str, pointer: Pointer | None) -> Pointer | None:
        """Set a name's pointer; return the previous one."""
        names = self._names.setdefault(tenant, {})
        before = names.get(name)
        if pointer:
            names[name] = pointer
            for reader in pointer.readers:
                self._shared.setdefault(reader, {})[pointer.current.name_for(reader)] = pointer
        else:
            names.pop(name, None)
        if before:
            for reader in set(before.readers).difference(pointer.readers if pointer else ()):
                del self._shared[reader][before.current.name_for(reader)]
        self.pins.pop((tenant, name), None)
        if pointer and pointer.pinned:
            self.pins[tenant, name] = pointer
        self._answering.update(pointer.shares.keys() if pointer else ())
        for digest in before.shares if before else ():
            self._answering[digest] -= 1
            if not self._answering[digest]:
                del self._answering[digest]
        return before


Locate = Callable[[str], Path]  # digest -> the directory of its files, which may not exist


@dataclass(frozen=True)
class RemotePointer:
    """A name's pointer in the object store. `record`: the record that it was read from, for `RemoteStore.remember`."""

    tenant: str
    name: str
    pointer: Pointer | None
    record: Any


def split_reference(reference: str) -> tuple[str, str | None]:
    """Split `NAME` or `NAME@DIGEST` (a prefix of the digest, with or without "sha256:") into the name and the hex
    digits."""
    name, at, digits = reference.partition("@")
    return name, digits.removeprefix("sha256:") if at else None


def check_name(name: str, *, fine_tuned: bool = False) -> None:
    """Refuse a name that an adapter may not have; with `fine_tuned`, all but `ft:<base>:<suffix>:...`. Raises
    AdapterError."""
    if fine_tuned:
        if not FINE_TUNED_NAME.fullmatch(name):
            raise AdapterError(f"'{shorten(name)}' is not the name of a fine-tuned adapter", "name", "invalid_name")
    elif name.startswith("ft:"):
        raise AdapterError("names that begin with 'ft:' belong to fine-tunes", "name", "invalid_name")
    elif len(name) > MAX_NAME or not NAME.fullmatch(name):
        raise AdapterError(
            f"'{shorten(name)}' is not a valid name: 1 to {MAX_NAME} of A-Z a-z 0-9 . _ - in words joined by / or :, "
            "each of which begins with a letter or digit",
            "name",
            "invalid_name",
        )
    elif taken := RESERVED.intersection(name.split("/")[1:]):
        raise AdapterError(f"'{shorten(name)}' has '/{min(taken)}', which is reserved for URLs", "name", "invalid_name")
