"""The collaborators of all handlers, in one frozen object, made once at start."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING

from starlette.requests import Request

from adapters.peft_format.outline import Outline
from adapters.storage.database import Database
from adapters.storage.store import AdapterStore
from server.admission import Admission, Drain, UploadSlots
from server.batches.metrics import BatchMetrics
from server.batches.runner import Batches
from server.batches.store import BatchStore
from server.children.helper import Helpers
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
from server.tenants.database import open_database as open_tenants
from server.tenants.database import server_id
from server.tenants.keys import Tenants
from server.text.grammar_checker import GrammarChecker
from server.text.processor import TextProcessor
from server.usage import Ledger

if TYPE_CHECKING:
    from adapters.storage.pages import Pages
    from adapters.storage.records import Records

log = logging.getLogger(__name__)


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


def make_services(
    settings: Settings,
    engine: EngineClient,
    store: AdapterStore,
    text: TextProcessor,
    *,
    metrics: Metrics | None = None,
    outline: Outline | None = None,
    checker: Helpers | None = None,
    sampling_defaults: Mapping[str, float] | None = None,
) -> Services:
    """The collaborators over an engine and a store.

    Args:
        metrics: those that the engine reports to.
        outline, checker: see `Publisher`.
        sampling_defaults: the model's.
    """
    for name in {version.name for version in store.all_versions()} & settings.base_aliases:
        log.warning("adapter %s is hidden by the base of that name (--served-model-name)", name)
    metrics = metrics or new_metrics(settings)
    registry = Registry.make(settings, engine, store, metrics, outline, text, checker)
    database = open_tenants(settings.data_dir / "tenants.db", settings.database_seconds)
    ledger = Ledger(database, _pages(settings, "usage", database))
    tuning = FineTuning.open(settings, engine=engine, registry=registry, text=text, metrics=metrics, ledger=ledger)
    return Services(
        settings=settings,
        engine=engine,
        text=text,
        store=store,
        metrics=metrics,
        admission=Admission(settings.max_queued_requests, settings.max_queued_tokens),
        drain=Drain(),
        registry=registry,
        uploads=UploadSlots(settings.max_uploads),
        grammars=GrammarChecker(settings.grammar_seconds, settings.grammar_bytes),
        tuning=tuning,
        batches=_batches(settings, tuning, metrics),
        responses=_responses(settings, tuning.database),
        history=History(metrics, engine, store),
        tenants=Tenants(database, settings.api_key, _shared(settings, "tenants"), settings.store_poll_seconds),
        ledger=ledger,
        audit=AuditLog(settings.data_dir / "audit.jsonl", settings.audit_bytes, _pages(settings, "audit", database)),
        sampling_defaults=sampling_defaults or {},
    )


def _batches(settings: Settings, tuning: FineTuning, metrics: Metrics) -> Batches:
    directory, at_once = settings.data_dir / "batches", settings.batch_requests
    store, shared = BatchStore(tuning.database), None
    if settings.adapter_store is not None:
        from adapters.storage.bucket import Bucket
        from adapters.storage.leases import Leases
        from adapters.storage.records import Records
        from server.batches.shared import SharedBatches

        bucket = Bucket(settings.adapter_store)
        records = Records(bucket, "batches")
        store = shared = SharedBatches(tuning.database, directory)
        shared.join(records, bucket, Leases(records, settings.job_lease_seconds), at_once)
    counted, most = BatchMetrics(metrics.registry), settings.batch_file_requests
    batches = Batches(directory, store, tuning.files, counted, at_once=at_once, max_rows=most)
    if shared is not None:
        from server.finetune.sharing import Sharing

        batches.sharing = Sharing(shared, batches, settings.store_poll_seconds / 2, before=shared.share_all)
    return batches


def _responses(settings: Settings, database: Database) -> ResponseStore:
    days, most = settings.response_days, settings.response_bytes
    if settings.adapter_store is None:
        return ResponseStore(database, days, most)
    from adapters.storage.bucket import Bucket
    from adapters.storage.leases import Leases
    from adapters.storage.records import Records
    from server.responses.shared import PREFIX, SharedResponses

    bucket = Bucket(settings.adapter_store)
    records = Records(bucket, PREFIX)
    return SharedResponses(
        database,
        days,
        most,
        bucket=bucket,
        records=records,
        leases=Leases(records, settings.job_lease_seconds),
        poll_seconds=settings.store_poll_seconds,
        sweep_seconds=settings.response_sweep_seconds,
    )


def _shared(settings: Settings, prefix: str) -> "Records | None":
    """Records that all servers of one object store have in common. Raises ValueError for a URL that is none."""
    if settings.adapter_store is None:
        return None
    from adapters.storage.bucket import Bucket  # its library is needed only with an object store
    from adapters.storage.records import Records

    return Records(Bucket(settings.adapter_store), prefix)


def _pages(settings: Settings, prefix: str, database: Database) -> "Pages | None":
    """What all servers of one object store write down, each by itself. Raises ValueError for a URL that is none."""
    if settings.adapter_store is None:
        return None
    from adapters.storage.bucket import Bucket
    from adapters.storage.pages import Pages

    return Pages(Bucket(settings.adapter_store), prefix, cache(partial(server_id, database)))


def new_metrics(settings: Settings) -> Metrics:
    """None counted yet."""
    return Metrics(settings.metrics_adapters, settings.metrics_prefix, top_tenants=settings.metrics_tenants)


def services_of(request: Request) -> Services:
    """The services of the application that received this request."""
    services: Services = request.app.state.services
    return services


def caller_of(request: Request) -> Caller:
    """The one who sent it."""
    caller: Caller = request.scope["caller"]
    return caller


def check_bound(caller: Caller, name: str) -> None:
    """Raises NotFound, as for a name that nobody has, when the caller's key is bound to other adapters."""
    if caller.adapters is not None and name not in caller.adapters:
        raise unknown_adapter(name)
