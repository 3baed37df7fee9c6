"""The parts of fine-tuning that handlers use, in one object created at start."""

import asyncio
from dataclasses import dataclass

from adapters.storage.database import Database
from server.client.engine import EngineClient
from server.finetune import restore
from server.finetune.evaluation_store import EvaluationStore
from server.finetune.evaluations import Evaluations
from server.finetune.files import FileStore
from server.finetune.jobs import JobStore
from server.finetune.manager import JobManager
from server.finetune.metrics import TrainingMetrics
from server.metrics import Metrics
from server.registry.open import Registry
from server.settings import Settings
from server.text.processor import TextProcessor
from server.usage import Ledger


@dataclass(frozen=True)
class FineTuning:
    """Files, jobs and evaluations, with their workers."""

    files: FileStore
    jobs: JobStore
    manager: JobManager
    evaluations: Evaluations
    metrics: TrainingMetrics
    database: Database

    async def start(self) -> None:
        """Resume unfinished work."""
        await self.manager.start()
        await self.evaluations.start()

    async def stop(self) -> None:
        """Stop all work; the next `start` resumes it."""
        await self.manager.stop()
        await self.evaluations.stop()

    async def count_jobs(self) -> None:
        """Update the metric of jobs by status."""
        self.metrics.jobs(await asyncio.to_thread(self.jobs.counts))

    @classmethod
    def open(
        cls,
        settings: Settings,
        *,
        engine: EngineClient,
        registry: Registry,
        text: TextProcessor,
        metrics: Metrics,
        ledger: Ledger,
    ) -> "FineTuning":
        """Open the files, jobs and evaluations of a data directory. Raises the errors of `Database`."""
        root = settings.data_dir
        database = restore.open_or_rebuild(root, settings.database_seconds)
        counted, shared = TrainingMetrics(metrics.registry), None
        if settings.adapter_store is not None:
            shared = _Shared(settings, settings.adapter_store, database, ledger)
        files: FileStore = shared.files if shared else FileStore(root / "files", database)
        jobs: JobStore = shared.jobs if shared else JobStore(database, ledger)
        manager = JobManager(
            directory=root / "jobs",
            database=database,
            files=files,
            jobs=jobs,
            engine=engine,
            publisher=registry.publisher,
            text=text,
            metrics=counted,
            max_running=settings.max_training_jobs,
        )
        evaluated = shared.evaluations if shared else EvaluationStore(database)
        most = settings.evaluation_requests
        evaluations = Evaluations(evaluated, files, registry, engine, text, max_concurrent=most)
        if shared is not None:
            shared.attach(settings, manager, evaluations)
        return cls(files, jobs, manager, evaluations, counted, database)


class _Shared:
    """Files, jobs and evaluations shared by several servers. Raises ValueError for an invalid URL."""

    def __init__(self, settings: Settings, url: str, database: Database, ledger: Ledger) -> None:
        from adapters.storage.bucket import Bucket  # its library is needed only with an object store
        from adapters.storage.records import Records
        from server.finetune.shared_evaluations import SharedEvaluations
        from server.finetune.shared_files import SharedFiles
        from server.finetune.shared_jobs import SharedJobs

        bucket, seconds = Bucket(url, settings.store_request_limits), settings.job_lease_seconds
        self.files = SharedFiles(settings.data_dir / "files", database, Records(bucket, "files"), bucket)
        self.jobs, self.evaluations = SharedJobs(database, ledger), SharedEvaluations(database)
        self.jobs.connect(bucket, seconds, settings.max_training_jobs)
        self.evaluations.connect(bucket, seconds, settings.evaluation_requests)

    def attach(self, settings: Settings, manager: JobManager, evaluations: Evaluations) -> None:
        """Synchronise the workers with other servers."""
        from server.finetune.sharing import Sharing

        seconds = settings.store_poll_seconds / 2

        def share_all() -> None:
            self.files.share_all()
            self.jobs.share_all(settings.data_dir / "jobs")

        def remove_orphans(age: float) -> int:
            return sum(table.remove_orphans(age) for table in (self.files, self.jobs, self.evaluations))

        evaluations.sharing = Sharing(self.evaluations, evaluations, seconds, after_import=self.evaluations.share_all)
        steps = self.files.follow, share_all, remove_orphans
        manager.sharing = Sharing(self.jobs, manager, seconds, *steps, settings.orphan_seconds)
