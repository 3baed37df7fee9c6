"""Everything about fine-tuning that handlers use, in one object made once at start."""

from dataclasses import dataclass
from pathlib import Path

from server.client.engine import EngineClient
from server.finetune.database import Database
from server.finetune.evaluations import Evaluations
from server.finetune.files import FileStore
from server.finetune.jobs import JobStore
from server.finetune.manager import JobManager
from server.finetune.metrics import TrainingMetrics
from server.metrics import Metrics
from server.registry.open import Registry
from server.text.processor import TextProcessor


@dataclass(frozen=True)
class FineTuning:
    """Files, jobs, evaluations, and who runs them."""

    files: FileStore
    jobs: JobStore
    manager: JobManager
    evaluations: Evaluations

    async def start(self) -> None:
        """Go on with what was under way."""
        await self.manager.start()
        self.evaluations.start()

    async def stop(self) -> None:
        """Let go of everything; the next `start` goes on with it."""
        await self.manager.stop()
        await self.evaluations.stop()

    @classmethod
    def open(
        cls,
        data_dir: Path,
        *,
        engine: EngineClient,
        registry: Registry,
        text: TextProcessor,
        metrics: Metrics,
        max_running: int,
    ) -> "FineTuning":
        """Open what lies in `data_dir`, or begin there."""
        database = Database(data_dir / "finetuning.db")
        files = FileStore(data_dir / "files", database)
        jobs = JobStore(database)
        manager = JobManager(
            directory=data_dir / "jobs",
            database=database,
            files=files,
            jobs=jobs,
            engine=engine,
            publisher=registry.publisher,
            text=text,
            metrics=TrainingMetrics(metrics.registry, jobs.counts),
            max_running=max_running,
        )
        return cls(files, jobs, manager, Evaluations(database, files, registry, engine, text))
