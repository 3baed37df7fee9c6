"""The trainer alone, measured: `python -m server.finetune.training.bench`, JSON lines in, JSON lines out.

The first line says what to load; it is answered when the base is there. Each further one is `{"steps": n}`: so many
optimiser steps of every job, answered with the seconds each took, the tokens of one, and the peak of memory above
what the loaded base takes. Knows nothing of serving.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters import kernels
from server.engine import model
from server.finetune.dataset import Dataset
from server.finetune.messages import ModuleShape, StartJob, TrainingPlan, TrainingStep
from server.finetune.training.trainer import Trainer

FOREVER = 1_000_000  # epochs


def main() -> None:
    """Answer until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print; the protocol's channel stays clean
    settings: dict[str, Any] = json.loads(sys.stdin.readline())
    torch.set_num_threads(settings["threads"])
    kernels.set_threads(settings["threads"])
    base = model.load(Path(settings["model"]), "nf4", "auto", "cpu", Path(settings["cache_dir"]))
    kernels.probe_row_multiple([linear.weight.shape for linear in base.linears], base.dtype)
    trainer = Trainer(base)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = _data(settings["batch_size"], settings["length"], base.vocab_size)
        data.save(Path(folder) / "data.safetensors")
        resident = reset_peak()
        for number in range(settings["jobs"]):
            trainer.start(_job(str(number), Path(folder), base, settings))
        for line in sys.stdin:
            seconds = [_step(trainer) for _ in range(json.loads(line)["steps"])]
            tokens = settings["jobs"] * len(data.tokens)
            print(
                json.dumps({"seconds": seconds, "tokens": tokens, "peak": peak() - resident}), file=answers, flush=True
            )
        trainer.close()


def _data(batch_size: int, length: int, vocabulary: int) -> Dataset:
    """One step's sequences, half of each trained on."""
    random = np.random.default_rng(0)
    tokens = random.integers(3, vocabulary, batch_size * length).astype(np.int32)
    trained = np.tile(np.arange(length) >= length // 2, batch_size)
    return Dataset(tokens, trained, np.arange(batch_size + 1, dtype=np.int64) * length)


def _job(name: str, folder: Path, base: model.Base, settings: dict[str, Any]) -> StartJob:
    rank = settings["rank"]
    return StartJob(
        id=name,
        directory=str(folder / name),
        train_data=str(folder / "data.safetensors"),
        modules={linear.name: ModuleShape(rank, 2.0) for linear in base.linears},
        config={},
        plan=TrainingPlan(
            seed=int(name),
            n_epochs=FOREVER,
            batch_size=settings["batch_size"],
            micro_batch_tokens=settings["micro_batch_tokens"],
            learning_rate=1e-4,
            lr_scheduler="constant",
            memory=settings["memory"],
            checkpoint_every=FOREVER,
        ),
    )


def _step(trainer: Trainer) -> float:
    """Run until every job has made a step."""
    began = time.perf_counter()
    waiting = set(trainer.tasks)
    while waiting:
        trainer.run_piece()
        waiting -= {reply.id for reply in trainer.take_replies() if isinstance(reply, TrainingStep)}
    return time.perf_counter() - began


def reset_peak() -> int:
    """Forget this process's memory peak so far; the resident bytes now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """Most resident bytes since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main()
