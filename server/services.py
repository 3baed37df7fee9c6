"""The collaborators that handlers use, in one frozen object, made once at start."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.requests import Request

from adapters.storage.store import AdapterStore
from server.admission import Admission, Drain, UploadSlots
from server.client.engine import EngineClient, served_base
from server.finetune.service import FineTuning
from server.messages.protocol import Ready
from server.metrics import Metrics
from server.registry.open import Registry
from server.settings import Settings
from server.text.grammar import GrammarChecker
from server.text.processor import TextProcessor

TENANT = ""  # every stored row has a tenant; there is one so far


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
