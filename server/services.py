"""The collaborators of all handlers, in one frozen object, made once at start (`server.startup`)."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.requests import Request

from adapters.storage.store import AdapterStore
from server.admission import Admission, Drain, UploadSlots
from server.batches.runner import Batches
from server.client.engine import EngineClient, served_base
from server.errors import unknown_adapter
from server.finetune.service import FineTuning
from server.history import History
from server.messages.protocol import Ready
from server.metrics import Metrics
from server.registry.open import Registry
from server.responses.store import ResponseStore
from server.settings import Settings
from server.tenants.audit import AuditLog
from server.tenants.caller import TENANT as TENANT
from server.tenants.caller import Caller
from server.tenants.keys import Tenants
from server.text.grammar_checker import GrammarChecker
from server.text.processor import TextProcessor
from server.usage import Ledger


@dataclass(frozen=True, kw_only=True)
class Services:
    """The collaborators. `app.state.services` holds them; `services_of` finds them."""

    settings: Settings
    engine: EngineClient
    text: TextProcessor
    store: AdapterStore
    metrics: Metrics
    admission: Admission
    drain: Drain
    registry: Registry
    uploads: UploadSlots
    grammars: GrammarChecker
    tuning: FineTuning
    batches: Batches
    responses: ResponseStore
    history: History
    tenants: Tenants
    ledger: Ledger
    audit: AuditLog
    checkpointing: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while a merged checkpoint is made
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)  # the model's, by request field

    @property
    def engine_info(self) -> Ready:
        """What the engine serves. Raises `EngineUnavailable` before the first engine has come up."""
        return served_base(self.engine)


def services_of(request: Request) -> Services:
    """The services of the application that received this request."""
    services: Services = request.app.state.services
    return services


def caller_of(request: Request) -> Caller:
    """The caller who sent this request."""
    caller: Caller = request.scope["caller"]
    return caller


def check_bound(caller: Caller, name: str) -> None:
    """Raises NotFound, as for a name that nobody has, when the caller's key is bound to other adapters."""
    if caller.adapters is not None and name not in caller.adapters:
        raise unknown_adapter(name)
