"""Everything about fine-tuning that handlers use, in one object made once at start."""

from dataclasses import dataclass
from pathlib import Path

from server.engine.client import EngineClient
from server.finetune.database import Database
from server.finetune.files import FileStore
from server.finetune.jobs import JobStore
from server.finetune.manager import JobManager
from server.finetune.metrics import TrainingMetrics
from server.intake import AdapterIntake
from server.metrics import Metrics
from server.text import TextProcessor


@dataclass(frozen=True)
class FineTuning:
    """Files, jobs, and who runs them."""

    files: FileStore
    jobs: JobStore
    manager: JobManager

    @classmethod
    def open(
        cls,
        data_dir: Path,
        *,
        engine: EngineClient,
        intake: AdapterIntake,
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
            intake=intake,
            text=text,
            metrics=TrainingMetrics(metrics.registry, jobs.counts),
            max_running=max_running,
        )
        return cls(files, jobs, manager)
