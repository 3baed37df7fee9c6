"""Live metrics of jobs with the Weights & Biases integration. A fault there never affects the job.

The package is optional: a job that names it is refused where it is not installed.
"""

import importlib
import logging
from typing import Any

from msgspec import to_builtins

from server.finetune.jobs import Job
from server.messages.training import TrainingStep

log = logging.getLogger("lorakeet.finetune")


class WandbRuns:
    """The open runs by job. Every call may wait for the network: for worker threads only."""

    def __init__(self) -> None:
        self._runs: dict[str, Any] = {}

    def step(self, job: Job, step: TrainingStep) -> None:
        """Log a step; the first step opens the run, or resumes the run opened by an earlier process."""
        if job.spec.integrations is None:
            return
        try:
            run = self._runs.get(job.id) or self._open(job)
            more = {"learning_rate": step.learning_rate, "grad_norm": step.grad_norm}
            run.log(
                {k: v for k, v in (to_builtins(step.metrics) | more).items() if k != "step"}, step=step.metrics.step
            )
        except Exception:  # any fault of the library or its network
            log.warning("could not log a step of %s to wandb", job.id, exc_info=True)

    def _open(self, job: Job) -> Any:
        wandb = importlib.import_module("wandb")
        assert job.spec.integrations is not None
        settings = job.spec.integrations[0]["wandb"]
        run = wandb.init(
            project=settings["project"],
            entity=settings["entity"],
            name=settings["name"] or job.id,
            tags=[*settings["tags"], "lorakeet/finetune", job.id],
            config={} if job.start is None else to_builtins(job.start.plan) | {"lora": job.start.config},
            id=job.id,
            resume="allow",
            reinit="create_new",
        )
        self._runs[job.id] = run
        return run

    def ended(self, job: Job) -> None:
        """Close the job's run, if there is one; a resumed job opens it again."""
        run = self._runs.pop(job.id, None)
        if run is None:
            return
        try:
            run.finish(exit_code=0 if job.status == "succeeded" else 1)
        except Exception:
            log.warning("could not close the wandb run of %s", job.id, exc_info=True)
