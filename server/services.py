"""The collaborators that handlers use, in one frozen object, made once at start."""

from dataclasses import dataclass

from starlette.requests import Request

from adapters.storage.store import AdapterStore
from server.admission import Admission, Drain
from server.client.engine import EngineClient
from server.finetune.service import FineTuning
from server.messages.protocol import Ready
from server.metrics import Metrics
from server.registry.intake import AdapterIntake
from server.settings import Settings
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
    intake: AdapterIntake
    tuning: FineTuning

    @property
    def engine_info(self) -> Ready:
        """The engine's base and limits. Raises `EngineUnavailable` before the first engine has come up."""
        return self.intake.base


def services_of(request: Request) -> Services:
    """The services of the application that received this request."""
    services: Services = request.app.state.services
    return services
