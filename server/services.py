"""The services for all handlers, in one frozen object, made once at start (`server.startup`)."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.requests import Request

from adapters.storage.store import AdapterStore
from server.admission import Admission, Drain, UploadSlots
from server.batches.runner import Batches
from server.client.engine import EngineClient, engine_info
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
    """The services of one application, in `app.state.services`; see `services_of`."""

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
    checkpoint_lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while a merged checkpoint is made
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)  # the model's, by request field

    @property
    def engine_info(self) -> Ready:
        """The served base. Raises `EngineUnavailable` before the first engine is up."""
        return engine_info(self.engine)


def services_of(request: Request) -> Services:
    """Return the services of the request's application."""
    services: Services = request.app.state.services
    return services


def caller_of(request: Request) -> Caller:
    """Return the request's caller."""
    caller: Caller = request.scope["caller"]
    return caller


def check_bound(caller: Caller, name: str) -> None:
    """Raise NotFound, as for an unknown name, when the caller's key is bound to other adapters."""
    if caller.adapters is not None and name not in caller.adapters:
        raise unknown_adapter(name)
