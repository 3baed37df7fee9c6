"""Construction of a server's parts from the settings: the engine's client, stores, services."""

import logging
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.peft_format.outline import Outline
from adapters.storage.database import Database
from adapters.storage.store import AdapterStore
from adapters.storage.versions import RemoteUnavailable
from server import data_dir
from server.admission import Admission, Drain, UploadSlots
from server.batches.metrics import BatchMetrics
from server.batches.rows import Limits
from server.batches.runner import Batches
from server.batches.store import BatchStore
from server.children.helper import WORK_PROGRAM, Helpers
from server.client.engine import EngineClient, LocalEngine
from server.finetune.service import FineTuning
from server.history import History
from server.messages.protocol import EngineConfig
from server.metrics import Metrics
from server.model_source import ModelError
from server.openai.sampling_defaults import sampling_defaults
from server.registry.capacity import PinLimit
from server.registry.open import Registry
from server.responses.store import ResponseStore
from server.services import Services
from server.settings import SettingError, Settings
from server.tenants.audit import AuditLog
from server.tenants.database import open_database as open_tenants
from server.tenants.database import server_id
from server.tenants.keys import Tenants
from server.text.grammar_checker import GrammarChecker
from server.text.processor import TextProcessor, TokenizerError
from server.text.sandbox import TemplateRenderer
from server.usage import Ledger

if TYPE_CHECKING:
    from adapters.storage.pages import Pages
    from adapters.storage.records import Records

_CHECKERS = 2  # processes for checking uploads

log = logging.getLogger(__name__)


def open_services(settings: Settings, model: Path) -> tuple[Services, LocalEngine]:
    """Make all parts of a server. `model`: the base's directory. Raises ModelError, SettingError."""
    try:
        text = TextProcessor.load(model, _template_renderer(settings), settings.tool_parser, settings.reasoning_parser)
    except TokenizerError as error:
        raise ModelError(str(error)) from None
    metrics = new_metrics(settings)
    engine = LocalEngine(
        _engine_config(settings, model),
        metrics.add_engine_stats,
        start_seconds=settings.engine_start_seconds,
        stall_seconds=settings.engine_stall_seconds,
    )
    store, outline = open_store(settings, PinLimit(settings, engine)), Outline.read(model)
    checker = Helpers(
        _CHECKERS, WORK_PROGRAM, priority=settings.background_priority, memory=settings.adapter_check_bytes
    )
    defaults = sampling_defaults(settings.generation_config, settings.model, model)
    with data_dir.as_setting_error():
        services = make_services(
            settings,
            engine,
            store,
            text,
            metrics=metrics,
            outline=outline,
            checker=checker,
            sampling_defaults=defaults,
        )
    engine.mend = services.registry.mend
    return services, engine


def _engine_config(settings: Settings, model: Path) -> EngineConfig:
    """Make an engine's configuration, mostly from settings of the same names."""
    same = {name: getattr(settings, name) for name in EngineConfig.__struct_fields__ if hasattr(settings, name)}
    return EngineConfig(**same | {"address": "", "model": str(model), "cache_dir": str(settings.cache_dir)})


def _template_renderer(settings: Settings) -> TemplateRenderer | None:
    if not settings.allow_adapter_chat_templates:
        return None
    return TemplateRenderer(
        settings.adapter_template_seconds, settings.adapter_template_cpu_seconds, settings.adapter_template_bytes
    )


def open_store(settings: Settings, pin_limit: PinLimit) -> AdapterStore:
    """Open the names and files of adapters. Raises SettingError."""
    local = data_dir.open_names(settings.data_dir, settings.database_seconds)
    if settings.adapter_store is None:
        return AdapterStore(
            settings.data_dir / "adapters", local, retain=settings.keep_versions, check_pins=pin_limit.check
        )
    from adapters.storage.remote import RemoteStore  # its library is needed only with an object store

    if left := sum(1 for _ in local.load(Path)):
        log.warning(
            "%d adapters under %s are not served with --adapter-store: push them again", left, settings.data_dir
        )
    try:
        remote = RemoteStore(settings.adapter_store, settings.store_request_limits)
        return AdapterStore(
            settings.data_dir / "adapter-cache",
            remote,
            remote=remote,
            disk_bytes=settings.adapter_disk_bytes,
            retain=settings.keep_versions,
            check_pins=pin_limit.check,
        )
    except (ValueError, RemoteUnavailable) as fault:
        raise SettingError(f"--adapter-store: {fault}") from None


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
    """Make the services over an engine and a store.

    Args:
        metrics: the metrics to which the engine reports.
        outline, checker: see `Publisher`.
        sampling_defaults: the model's default sampling values, by request field.
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
        tenants=Tenants(database, settings.api_key, _shared_records(settings, "tenants"), settings.store_poll_seconds),
        ledger=ledger,
        audit=AuditLog(settings.data_dir / "audit.jsonl", settings.audit_bytes, _pages(settings, "audit", database)),
        sampling_defaults=sampling_defaults or {},
    )


def _batches(settings: Settings, tuning: FineTuning, metrics: Metrics) -> Batches:
    directory, max_concurrent = settings.data_dir / "batches", settings.batch_requests
    store, shared = BatchStore(tuning.database), None
    if settings.adapter_store is not None:
        from adapters.storage.bucket import Bucket
        from server.batches.shared import SharedBatches

        store = shared = SharedBatches(tuning.database, directory)
        shared.connect(
            Bucket(settings.adapter_store, settings.store_request_limits), settings.job_lease_seconds, max_concurrent
        )
    body_limits = settings.max_body_bytes, settings.max_body_items, settings.max_body_depth
    limits = Limits(settings.batch_file_requests, *body_limits)
    batch_metrics = BatchMetrics(metrics.registry)
    batches = Batches(directory, store, tuning.files, batch_metrics, max_concurrent=max_concurrent, limits=limits)
    if shared is not None:
        from server.finetune.sharing import Sharing

        batches.sharing = Sharing(
            shared,
            batches,
            settings.store_poll_seconds / 2,
            after_import=shared.share_all,
            remove_orphans=shared.remove_orphans,
            orphan_seconds=settings.orphan_seconds,
        )
    return batches


def _responses(settings: Settings, database: Database) -> ResponseStore:
    days, most = settings.response_days, settings.response_bytes
    if settings.adapter_store is None:
        return ResponseStore(database, days, most)
    from adapters.storage.bucket import Bucket
    from server.responses.shared import SharedResponses

    return SharedResponses(
        database,
        days,
        most,
        bucket=Bucket(settings.adapter_store, settings.store_request_limits),
        lease_seconds=settings.job_lease_seconds,
        poll_seconds=settings.store_poll_seconds,
        sweep_seconds=settings.response_sweep_seconds,
    )


def _shared_records(settings: Settings, prefix: str) -> "Records | None":
    """The records shared by all servers of one object store. Raises ValueError for an invalid URL."""
    if settings.adapter_store is None:
        return None
    from adapters.storage.bucket import Bucket  # its library is needed only with an object store
    from adapters.storage.records import Records

    return Records(Bucket(settings.adapter_store, settings.store_request_limits), prefix)


def _pages(settings: Settings, prefix: str, database: Database) -> "Pages | None":
    """The pages in the object store, written by each server for itself. Raises ValueError for an invalid URL."""
    if settings.adapter_store is None:
        return None
    from adapters.storage.bucket import Bucket
    from adapters.storage.pages import Pages

    return Pages(
        Bucket(settings.adapter_store, settings.store_request_limits), prefix, cache(partial(server_id, database))
    )


def new_metrics(settings: Settings) -> Metrics:
    """Make empty metrics."""
    return Metrics(settings.metrics_adapters, settings.metrics_prefix, top_tenants=settings.metrics_tenants)
