"""Adapters from the Hugging Face Hub: allowed references, and fetching their files.

A client's reference is followed only to a repository on the operator's list (`--adapter-hub`), by default empty.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

from adapters.peft_format.fields import AdapterError
from adapters.storage.versions import Version
from server.children.helper import HelperFailed, HelperLimit, ask_once
from server.children.programs.hub import UNAVAILABLE, Order
from server.errors import PermissionDenied, Unavailable, disk_faults, printable
from server.hub import Reference
from server.registry.publish import FILES, Publisher
from server.settings import Settings

_PROGRAM = "server.children.programs.hub.fetch"

log = logging.getLogger(__name__)


class HubUnavailable(Unavailable):
    """503: the hub, or the network to it, is down or too slow."""

    default_code = UNAVAILABLE


class Hub:
    """Access to the hub, within the settings."""

    def __init__(self, settings: Settings, publisher: Publisher) -> None:
        self._allowed = frozenset(settings.adapter_hub)
        self._seconds = settings.adapter_hub_seconds
        self._max_bytes = settings.max_upload_bytes
        self._publisher = publisher

    def parse_reference(self, written: str, *, param: str) -> Reference:
        """Parse a client's reference. Raises AdapterError when it is malformed, PermissionDenied when not allowed."""
        try:
            reference = Reference.parse(written)
        except ValueError as fault:
            raise AdapterError(str(fault), param, "invalid_reference") from None
        if not reference.within(self._allowed):
            message = f"`{printable(reference.repository)}` is not among the repositories allowed by --adapter-hub."
            raise PermissionDenied(message, param=param, code="hub_not_allowed")
        return reference

    def reference_of(self, name: str) -> Reference | None:
        """Return the repository of this name on the operator's list."""
        return Reference(name) if name in self._allowed and not name.endswith("/*") else None

    @asynccontextmanager
    async def fetched(self, reference: Reference, *, param: str) -> AsyncIterator[Path]:
        """Fetch a reference's files into a private directory, removed afterwards unless they were published.

        Raises AdapterError of `param`, HubUnavailable, StorageFull. Cancelling ends the transfer.
        """
        async with self._publisher.staging_directory() as staging:
            with disk_faults():
                commit = await self._fetch(reference, staging, param)
            log.info("fetched %s, commit %s", reference, commit)
            yield staging

    async def fetch_and_publish(
        self, tenant: str, name: str, reference: Reference, *, republish: bool = True
    ) -> tuple[Version, bool]:
        """Fetch a reference and publish it under the name. Arguments, result and errors as `Publisher.publish`; raises
        the errors of `fetched`, too."""
        self._publisher.check_name(name)
        async with self.fetched(reference, param="weights") as staging:
            return await self._publisher.publish(tenant, name, staging, republish=republish, strict_text=False)

    async def _fetch(self, reference: Reference, target: Path, param: str) -> str:
        where = reference.repository, reference.revision, reference.folder
        order = Order(*where, FILES, str(target), self._max_bytes)
        try:
            commit: str = await ask_once(_PROGRAM, asdict(order), self._seconds)
        except AdapterError as fault:
            if fault.code == UNAVAILABLE:
                raise HubUnavailable(f"{reference}: {fault}.", retry_after=30) from None
            raise AdapterError(f"{reference}: {fault}", param, fault.code) from None
        except HelperLimit as limit:
            raise HubUnavailable(f"{reference}: fetching it {limit} (--adapter-hub-seconds).", retry_after=60) from None
        except HelperFailed:
            raise HubUnavailable(f"{reference} cannot be fetched.", retry_after=30) from None
        return commit
