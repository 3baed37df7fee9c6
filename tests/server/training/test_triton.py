"""Training with the GPU's kernels: on a GPU if there is one, else in Triton's interpreter."""

from pathlib import Path

import pytest
import torch

from server.training.trainer import Trainer
from tests.support import offline as engines
from tests.support.interpreter import DEVICE
from tests.support.training import dataset, ended, job, losses, run

pytestmark = pytest.mark.usefixtures("triton_kernels")

DATA = dataset(4, low=6, high=12)


def test_losses_are_those_of_the_cpu(
    model_dir: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = []
    for device, triton in ((DEVICE, True), ("cpu", False)):
        if not triton:
            monkeypatch.delenv("LORAKEET_TRITON", raising=False)
        engine = engines.load_engine(model_dir, cache_dir, device=device, dtype="float32")
        trainer = Trainer(engine.base)
        start = job(engine.base, tmp_path / f"{device}-{triton}", DATA, n_epochs=2, learning_rate=5e-3)
        curves.append(losses(run(trainer, start)))
        trainer.close()
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_every_optimizer_learns_on_the_gpu_in_bf16(
    optimizer: str, model_dir: Path, cache_dir: Path, tmp_path: Path
) -> None:
    engine = engines.load_engine(model_dir, cache_dir, device="cuda")
    assert engine.base.dtype == torch.bfloat16
    digest = engine.base.digest()
    trainer = Trainer(engine.base)
    start = job(
        engine.base,
        tmp_path / "job",
        dataset(12),
        n_epochs=8,
        learning_rate=5e-3,
        optimizer=optimizer,
        lora_dropout=0.1,
    )
    replies = run(trainer, start)
    assert ended(replies).outcome == "succeeded"
    assert losses(replies)[-1] < 0.9 * losses(replies)[0]
    assert engine.base.digest() == digest
    trainer.close()
