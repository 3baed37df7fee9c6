"""Everything about fine-tuning that handlers use, in one object made once at start."""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from adapters.storage.database import BUSY_SECONDS, Database
from server.client.engine import EngineClient
from server.finetune import restore
from server.finetune.evaluations import Evaluations
from server.finetune.files import FileStore
from server.finetune.jobs import JobStore
from server.finetune.manager import JobManager
from server.finetune.metrics import TrainingMetrics
from server.metrics import Metrics
from server.registry.open import Registry
from server.text.processor import TextProcessor
from server.usage import Ledger


@dataclass(frozen=True)
class FineTuning:
    """Files, jobs, evaluations, and who runs them."""

    files: FileStore
    jobs: JobStore
    manager: JobManager
    evaluations: Evaluations
    metrics: TrainingMetrics
    database: Database

    async def start(self) -> None:
        """Go on with what was under way."""
        await self.manager.start()
        await self.evaluations.start()

    async def stop(self) -> None:
        """Let go of everything; the next `start` goes on with it."""
        await self.manager.stop()
        await self.evaluations.stop()

    async def count_jobs(self) -> None:
        """Bring the metrics of jobs by status up to date."""
        self.metrics.jobs(await asyncio.to_thread(self.jobs.counts))

    @classmethod
    def open(
        cls,
        data_dir: Path,
        *,
        engine: EngineClient,
        registry: Registry,
        text: TextProcessor,
        metrics: Metrics,
        ledger: Ledger,
        max_running: int,
        busy_seconds: float = BUSY_SECONDS,
    ) -> "FineTuning":
        """Open what lies in `data_dir`, or begin there. Raises what `Database` does."""
        database = restore.opened(data_dir, busy_seconds)
        files = FileStore(data_dir / "files", database)
        jobs = JobStore(database, ledger)
        counted = TrainingMetrics(metrics.registry)
        manager = JobManager(
            directory=data_dir / "jobs",
            database=database,
            files=files,
            jobs=jobs,
            engine=engine,
            publisher=registry.publisher,
            text=text,
            metrics=counted,
            max_running=max_running,
        )
        return cls(files, jobs, manager, Evaluations(database, files, registry, engine, text), counted, database)
