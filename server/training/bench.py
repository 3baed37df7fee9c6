"""A benchmark of the trainer alone: `python -m server.training.bench`, JSON lines in, JSON lines out.

The first line has the settings of the base and default settings of training; it is answered once the base is loaded.
Each further line is `{"steps": n}` with any settings to change: it runs n optimiser steps of every job, and is answered
with the seconds of each step, the tokens of one, and the memory peak above the loaded base's (device memory on a GPU,
else resident bytes).
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
from server.messages.dataset import Dataset
from server.messages.training import JobEnded, ModuleShape, StartJob, TrainingPlan, TrainingStep
from server.model import base as model
from server.training.trainer import Trainer

FOREVER = 1_000_000  # epochs
DATA = "data.safetensors"


def main() -> None:
    """Answer lines until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print to stdout, which is the protocol's channel
    settings: dict[str, Any] = json.loads(sys.stdin.readline())
    torch.set_num_threads(settings["threads"])
    kernels.set_threads(settings["threads"])
    base = model.load(
        Path(settings["model"]), "nf4", "auto", settings.get("device", "cpu"), Path(settings["cache_dir"])
    )
    kernels.prepare([linear.weight for linear in base.linears], base.dtype)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    resident = reset_peak(base.device)
    trainer = Trainer(base)
    training: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            options = settings | json.loads(line)
            steps = options.pop("steps")
            if options != training:
                trainer.close()
                del trainer  # frees its jobs' memory
                trainer, training = Trainer(base), options
                reset_peak(base.device)
                random_data(options, base.vocab_size).save(Path(folder) / DATA)
                for number in range(options["jobs"]):
                    trainer.start(endless_job(str(number), Path(folder), base, options))
            seconds = [_step(trainer, base.device) for _ in range(steps)]
            tokens = options["jobs"] * options["batch_size"] * options["length"]
            answer = {"seconds": seconds, "tokens": tokens, "peak": peak(base.device) - resident}
            print(json.dumps(answer), file=answers, flush=True)
        trainer.close()


def random_data(settings: dict[str, Any], vocabulary: int) -> Dataset:
    """Return one step's sequences (`batch_size` of `length`), half of each trained on."""
    size, length = settings["batch_size"], settings["length"]
    random = np.random.default_rng(0)
    tokens = random.integers(3, vocabulary, size * length).astype(np.int32)
    trained = np.tile(np.arange(length) >= length // 2, size)
    return Dataset(tokens, trained, np.arange(size + 1, dtype=np.int64) * length)


def endless_job(name: str, folder: Path, base: model.Base, settings: dict[str, Any]) -> StartJob:
    """Return a job over `folder / DATA` on all linears, with `rank`, `batch_size`, `micro_batch_tokens`, `memory`.

    `name` is a number, used as the job's seed.
    """
    rank = settings["rank"]
    return StartJob(
        id=name,
        directory=str(folder / name),
        train_data=str(folder / DATA),
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


def _step(trainer: Trainer, device: torch.device) -> float:
    """Run one step of every job; return its seconds. Raises RuntimeError when a job ends."""
    began = time.perf_counter()
    waiting = set(trainer.tasks)
    while waiting:
        trainer.run_piece()
        for reply in trainer.take_replies():
            if isinstance(reply, TrainingStep):
                waiting.discard(reply.id)
            elif isinstance(reply, JobEnded):
                raise RuntimeError(reply.message)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def reset_peak(device: torch.device) -> int:
    """Reset the memory peak; return the bytes in use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the process's peak (Linux)
    return peak(device)


def peak(device: torch.device) -> int:
    """Return the most bytes in use since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main()
