"""Which model a request means: the base, or one version of an adapter, held on disk while it is used.

`model` names either; with `adapter_id` (LoRAX) `model` is the base. `name@digest prefix` asks for one version.
"""

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass

from adapters.store import SHORTEST_PREFIX, AmbiguousDigest, UnknownAdapter, Version
from server.engine.protocol import AdapterRef
from server.errors import Conflict, InvalidRequest, ModelNotFound
from server.services import TENANT, Services

_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Target:
    """What serves a request."""

    asked: str  # the name as the client wrote it
    adapter: str | None  # the stored name; None: the base
    digest: str  # of the adapter, or of the base
    refs: list[AdapterRef]


@asynccontextmanager
async def open_target(services: Services, model: str, adapter_id: str | None = None) -> AsyncIterator[Target]:
    """The target, leased: its files stay until the end, whatever happens to the name meanwhile.

    Raises `ModelNotFound` (404), `Conflict` (409, an ambiguous digest prefix), `InvalidRequest`, `EngineUnavailable`.
    """
    base = services.settings.base_aliases
    asked, param = model, "model"
    if adapter_id is not None and adapter_id != model:
        if model not in base:
            with ExitStack() as held:
                await _hold(services, model, "model", held)  # an unknown model is the worse mistake
            raise InvalidRequest("`model` and `adapter_id` name two adapters; give one of them.", param="adapter_id")
        asked, param = adapter_id, "adapter_id"
    if asked in base:
        yield Target(asked, None, services.engine_info.base_digest, [])
        return
    with ExitStack() as held:
        version = await _hold(services, asked, param, held)
        ref = AdapterRef(digest=version.digest, path=str(version.path))
        yield Target(asked, version.name, version.digest, [ref])


async def _hold(services: Services, asked: str, param: str, held: ExitStack) -> Version:
    """Find a version and lease it until `held` closes."""
    name, at, prefix = asked.partition("@")
    prefix = prefix.removeprefix("sha256:").lower()
    if at and not (len(prefix) >= SHORTEST_PREFIX and set(prefix) <= _HEX):
        raise InvalidRequest(
            f"A version is asked for as NAME@ and at least {SHORTEST_PREFIX} hexadecimal digits of its digest.",
            param=param,
        )
    discovered = False
    while True:
        try:
            version = services.store.get(TENANT, name, prefix or None)
        except UnknownAdapter:
            if discovered or not await services.intake.discover(TENANT, name):
                raise ModelNotFound(asked, param=param) from None
            discovered = True
            continue
        except AmbiguousDigest:
            raise Conflict(f"Several versions of `{name}` start with {prefix}.", param=param) from None
        with suppress(UnknownAdapter):  # removed in this very moment: look again
            return held.enter_context(services.store.lease(version))
