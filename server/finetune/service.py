"""Everything about fine-tuning that handlers use, in one object made once at start."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapters.storage.database import Database
from server.client.engine import EngineClient
from server.finetune import restore
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

if TYPE_CHECKING:
    from server.finetune.shared_files import SharedFiles
    from server.finetune.shared_jobs import SharedJobs
    from server.finetune.sharing import Sharing


@dataclass(frozen=True)
class FineTuning:
    """Files, jobs, evaluations, and who runs them."""

    files: FileStore
    jobs: JobStore
    manager: JobManager
    evaluations: Evaluations
    metrics: TrainingMetrics
    database: Database
    sharing: "Sharing | None"  # with other servers

    async def start(self) -> None:
        """Go on with what was under way."""
        if self.sharing is not None:
            await self.sharing.begin()
        await self.manager.start()
        await self.evaluations.start()
        if self.sharing is not None:
            self.sharing.start()

    async def stop(self) -> None:
        """Let go of everything; the next `start` goes on with it."""
        if self.sharing is not None:
            await self.sharing.stop()
        await self.manager.stop()
        if self.sharing is not None:
            await self.sharing.release()
        await self.evaluations.stop()

    async def count_jobs(self) -> None:
        """Bring the metrics of jobs by status up to date."""
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
        """Open what lies in the data directory, or begin there. Raises what `Database` does."""
        root, most = settings.data_dir, settings.max_training_jobs
        database = restore.opened(root, settings.database_seconds)
        counted, shared = TrainingMetrics(metrics.registry), None
        if settings.adapter_store is not None:
            shared = _shared(settings, settings.adapter_store, database, ledger)
        files, jobs = shared or (FileStore(root / "files", database), JobStore(database, ledger))
        manager = JobManager(
            directory=root / "jobs",
            database=database,
            files=files,
            jobs=jobs,
            engine=engine,
            publisher=registry.publisher,
            text=text,
            metrics=counted,
            max_running=most,
        )
        sharing = None
        if shared is not None:
            from server.finetune.sharing import Sharing

            files, jobs = shared

            def share_all() -> None:
                files.share_all()
                jobs.share_all(root / "jobs")

            sharing = Sharing(jobs, manager, settings.store_poll_seconds / 2, files.follow, share_all)
        evaluations = Evaluations(database, files, registry, engine, text)
        return cls(files, jobs, manager, evaluations, counted, database, sharing)


def _shared(settings: Settings, url: str, database: Database, ledger: Ledger) -> "tuple[SharedFiles, SharedJobs]":
    """Files and jobs that several servers have. Raises ValueError for a URL that is none."""
    from adapters.storage.bucket import Bucket  # its library is needed only with an object store
    from adapters.storage.leases import Leases
    from adapters.storage.records import Records
    from server.finetune.shared_files import SharedFiles
    from server.finetune.shared_jobs import SharedJobs

    bucket = Bucket(url)
    files = SharedFiles(settings.data_dir / "files", database, Records(bucket, "files"), bucket)
    records, jobs = Records(bucket, "jobs"), SharedJobs(database, ledger)
    jobs.join(records, bucket, Leases(records, settings.job_lease_seconds), settings.max_training_jobs)
    return files, jobs
