"""The names that a process knows, in memory: by tenant, by who may read them, and those that are pinned."""

from collections import Counter
from collections.abc import Iterator

from adapters.storage.versions import EVERYBODY, Pointer


class Known:
    """Read by any thread; one at a time changes it.

    Attributes:
        pins: what those names mean that are pinned, by tenant and name.
    """

    def __init__(self) -> None:
        self.pins: dict[tuple[str, str], Pointer] = {}
        self._names: dict[str, dict[str, Pointer]] = {}  # tenant -> name -> what it means
        self._shared: dict[str, dict[str, Pointer]] = {}  # reader -> OWNER/NAME -> what it means
        self._answering: Counter[str] = Counter()  # digest -> names whose requests it may get

    def get(self, tenant: str, name: str) -> Pointer | None:
        """What a tenant's name means."""
        return self._names.get(tenant, {}).get(name)

    def names(self, tenant: str) -> dict[str, Pointer]:
        """All of a tenant's names."""
        return dict(self._names.get(tenant, {}))

    def all(self) -> Iterator[Pointer]:
        """What every name means."""
        return (pointer for names in list(self._names.values()) for pointer in list(names.values()))

    def shared(self, tenant: str, name: str) -> Pointer | None:
        """What OWNER/NAME means that is shared with a tenant."""
        own, everybody = self._shared.get(tenant, {}), self._shared.get(EVERYBODY, {})
        return own.get(name) or everybody.get(name)

    def all_shared(self, tenant: str) -> list[Pointer]:
        """What others share with a tenant."""
        own = self._names.get(tenant, {})
        names = self._shared.get(EVERYBODY, {}) | self._shared.get(tenant, {})
        return [pointer for name, pointer in names.items() if name not in own and pointer.current.tenant != tenant]

    def answers(self, digest: str) -> bool:
        """Whether requests for any name may get this content."""
        return digest in self._answering

    def point(self, tenant: str, name: str, pointer: Pointer | None) -> Pointer | None:
        """Let a name mean this from now on; what it meant."""
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
