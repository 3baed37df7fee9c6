"""Drive a `Trainer` without processes: jobs over random tokens, run to their end piece by piece."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from adapters.peft_format.config import parse_config
from server.messages.dataset import Dataset
from server.messages.protocol import Done
from server.messages.training import (
    Checkpoint,
    JobEnded,
    JobReply,
    MemoryPlan,
    ModuleShape,
    StartJob,
    TrainingPlan,
    TrainingStep,
)
from server.model.base import Base
from server.training.trainer import Trainer
from tests.support.tiny import ALL_LINEAR

PLAN: dict[str, Any] = {
    "seed": 1,
    "n_epochs": 1,
    "batch_size": 4,
    "micro_batch_tokens": 64,
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
}


def dataset(count: int, *, seed: int = 0, low: int = 6, high: int = 30, vocabulary: int = 500) -> Dataset:
    """Random sequences of random lengths; about half of each is trained on."""
    random = np.random.default_rng(seed)
    lengths = random.integers(low, high, count)
    tokens = random.integers(3, vocabulary, lengths.sum()).astype(np.int32)
    trained = random.random(lengths.sum()) < 0.5
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    trained[bounds[:-1]] = False
    trained[bounds[:-1] + 1] = True  # at least one each
    return Dataset(tokens, trained, bounds)


def job(
    base: Base,
    directory: Path,
    data: Dataset,
    *,
    id: str = "job",  # noqa: A002
    valid: Dataset | None = None,
    lora: dict[str, Any] | None = None,
    initial: Path | None = None,
    **plan: Any,
) -> StartJob:
    """A job as the API process would start it."""
    directory.mkdir(parents=True, exist_ok=True)
    data.save(directory / "train.safetensors")
    if valid is not None:
        valid.save(directory / "valid.safetensors")
    config = {"r": 8, "lora_alpha": 16, "target_modules": ALL_LINEAR} | (lora or {})
    shapes = parse_config(msgspec.json.encode({"peft_type": "LORA", **config})).resolve(
        base.linear_sizes, experts=base.expert_sizes
    )
    return StartJob(
        id=id,
        directory=str(directory),
        train_data=str(directory / "train.safetensors"),
        valid_data=None if valid is None else str(directory / "valid.safetensors"),
        modules={name: ModuleShape(*shape) for name, shape in shapes.items()},
        config=config,
        plan=TrainingPlan(**(PLAN | plan)),
        initial=None if initial is None else str(initial),
    )


def run(trainer: Trainer, *starts: StartJob) -> list[JobReply | MemoryPlan | Done]:
    """Start jobs and run until none is left; return all replies."""
    for start in starts:
        trainer.start(start)
    replies: list[JobReply | MemoryPlan | Done] = []
    while not trainer.idle:
        if trainer.ready:
            trainer.run_piece()
        replies += trainer.take_replies()
    return replies + trainer.take_replies()


def run_until(trainer: Trainer, kind: str) -> None:
    """Run pieces until the next one is of this kind."""
    while True:
        trainer.run_piece()
        if trainer.piece is not None and trainer.piece.kind == kind:
            return


def losses(replies: Sequence[JobReply | MemoryPlan | Done], id: str = "job") -> list[float]:  # noqa: A002
    """The training loss of every step."""
    steps = [reply for reply in replies if isinstance(reply, TrainingStep) and reply.id == id]
    return [step.metrics.train_loss for step in steps if step.metrics.train_loss is not None]


def ended(replies: Sequence[JobReply | MemoryPlan | Done], id: str = "job") -> JobEnded:  # noqa: A002
    (end,) = [reply for reply in replies if isinstance(reply, JobEnded) and reply.id == id]
    return end


def final(replies: Sequence[JobReply | MemoryPlan | Done], id: str = "job") -> Path:  # noqa: A002
    """The directory of the finished adapter."""
    (last,) = [r for r in replies if isinstance(r, Checkpoint) and r.id == id and r.kind == "final"]
    return Path(last.directory)
