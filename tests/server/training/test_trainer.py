"""Whole jobs of the trainer, compared with PEFT and with themselves: beside other jobs and requests, after kills."""

import contextlib
import random
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from adapters.peft_format import directory as adapter_format
from adapters.peft_format.inspection import inspect
from server.engine.engine import Engine
from server.messages.protocol import Done
from server.messages.training import Checkpoint, JobEnded, PlanMemory, StartJob, StopJob, TrainingStep
from server.model.base import Base
from server.training import checkpoint
from server.training.plan import Steps
from server.training.trainer import Trainer
from tests.support import offline as engines
from tests.support.peft_side import initial_adapter, peft_loss, peft_model
from tests.support.training import dataset, ended, final, job, losses, run, run_until

DATA = dataset(12)


def test_the_scale_vector_is_trained_and_folded_into_b(base: Base, trainer: Trainer, tmp_path: Path) -> None:
    start = job(base, tmp_path / "job", DATA, n_epochs=3, learning_rate=1e-2, scale_vector=True)
    trainer.start(start)
    (task,) = trainer.tasks.values()
    vectors = task.adapter.values[task.adapter.decayed :]
    assert len(vectors) == sum(linear.out_features for linear in base.linears)
    replies = run(trainer)
    assert (vectors != 1).all()
    saved = adapter_format.load(final(replies), inspect(final(replies), *shape_of(base)))
    for name, (a, b) in task.adapter.tensors().items():
        assert torch.equal(saved[name][0], a)
        assert torch.equal(saved[name][1], b)


def shape_of(base: Base) -> tuple[dict[str, Any], str]:
    return {linear.name: linear for linear in base.linears}, base.architecture


# --- whole jobs -----------------------------------------------------------------------------------------


def test_a_loss_curve_of_30_steps_equals_peft_with_torch_adamw(
    engine: Engine, trainer: Trainer, model_dir: Path, tmp_path: Path
) -> None:
    adapter = initial_adapter(engine, tmp_path / "initial", model_dir, b_std=1e-3)
    start = job(
        engine.base, tmp_path / "job", DATA, initial=adapter,
        n_epochs=10, learning_rate=5e-3, lr_scheduler="linear", warmup_steps=3, weight_decay=0.01,
    )  # fmt: skip
    ours = losses(run(trainer, start))
    steps = Steps(start.plan, DATA.lengths.tolist())
    model = peft_model(model_dir, "nf4", adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=0.01)
    theirs = []
    for step in range(steps.total):
        group = steps.batch(step)
        loss = peft_loss(model, DATA, group) / sum(DATA.sequence(index)[1].sum() for index in group)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for setting in optimizer.param_groups:
            setting["lr"] = steps.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())
    assert len(ours) == 30
    assert theirs[-1] < 0.7 * theirs[0], "the job must have learned something, or this test shows nothing"
    assert ours == pytest.approx(theirs, rel=0.01)


def test_the_classic_configuration_trains(base: Base, trainer: Trainer, tmp_path: Path) -> None:
    lora = {
        "r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1,
        "bias": "none", "task_type": "CAUSAL_LM",
    }  # fmt: skip
    replies = run(
        trainer,
        job(base, tmp_path / "job", DATA, lora=lora, lora_dropout=0.1, n_epochs=12, learning_rate=1e-2),
    )
    curve = losses(replies)
    assert ended(replies).outcome == "succeeded"
    assert sum(curve[-3:]) < 0.9 * sum(curve[:3])
    spec = inspect(final(replies), *shape_of(base))
    assert {name.rsplit(".", 1)[-1] for name in spec.modules} == {"q_proj", "v_proj"}
    assert {(module.rank, module.scaling) for module in spec.modules.values()} == {(8, 4.0)}


@pytest.mark.parametrize(
    "optimizer",
    ["paged_adamw_8bit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "paged_adamw_32bit"))],
)
def test_every_optimizer_learns_and_resumes_bit_for_bit(
    optimizer: str, base: Base, trainer: Trainer, tmp_path: Path
) -> None:
    def start(name: str) -> StartJob:
        return job(
            base, tmp_path / name, DATA, n_epochs=8, learning_rate=5e-3,
            optimizer=optimizer, checkpoint_every=2, lora_dropout=0.1, scale_vector=True,
        )  # fmt: skip

    replies = run(trainer, start("whole"))
    curve = losses(replies)
    assert curve[-1] < 0.9 * curve[0]
    assert same_weights(final(replies), interrupted(base, start("killed"), kills=3, seed=1))


def interrupted(base: Base, start: StartJob, *, kills: int, seed: int) -> Path:
    """Run a job with trainers killed at random moments; each next one resumes from the last checkpoint."""
    choose = random.Random(seed)
    resume: str | None = None
    for round_ in range(kills + 1):
        trainer = Trainer(base)
        trainer.start(msgspec.structs.replace(start, resume=resume))
        left = choose.randrange(40, 160) if round_ < kills else 10**9
        while not trainer.idle and left:
            left -= 1
            if trainer.ready:
                trainer.run_piece()
            for reply in trainer.take_replies():
                if isinstance(reply, Checkpoint):
                    resume = reply.directory
                    if reply.kind == "final":
                        trainer.close()
                        return Path(reply.directory)
        trainer.close()
    raise AssertionError("the job did not end")


def same_weights(left: Path, right: Path) -> bool:
    name = adapter_format.WEIGHTS_NAME
    return (left / name).read_bytes() == (right / name).read_bytes()


@pytest.mark.slow  # the test of every optimizer, with three kills, covers the same
def test_ten_kills_change_no_bit(base: Base, trainer: Trainer, tmp_path: Path) -> None:
    def start(name: str) -> StartJob:
        return job(
            base, tmp_path / name, dataset(20), valid=dataset(3, seed=5), n_epochs=6, checkpoint_every=1,
            lora_dropout=0.2, lr_scheduler="cosine", warmup_steps=4, memory="keep",
        )  # fmt: skip

    assert same_weights(final(run(trainer, start("whole"))), interrupted(base, start("killed"), kills=10, seed=2))


def test_other_jobs_change_no_bit(base: Base, trainer: Trainer, tmp_path: Path) -> None:
    def start(name: str, n: int) -> StartJob:
        shapes: list[dict[str, Any]] = [{"r": 8}, {"r": 3, "target_modules": ["v_proj", "down_proj"]}]
        return job(
            base, tmp_path / name / str(n), dataset(9 + n, seed=n), id=str(n), lora=shapes[n], seed=n,
            n_epochs=2, lora_dropout=0.1 * n, micro_batch_tokens=40, valid=dataset(3, seed=9) if n else None,
        )  # fmt: skip

    together = run(trainer, start("together", 0), start("together", 1))
    for n in range(2):
        alone = run(trainer, start("alone", n))
        assert losses(together, str(n)) == losses(alone, str(n))
        assert same_weights(final(together, str(n)), final(alone, str(n)))


def test_micro_batches_only_split_the_step(base: Base, trainer: Trainer, tmp_path: Path) -> None:
    curves = [
        losses(
            run(trainer, job(base, tmp_path / f"{tokens}-{packing}", DATA, micro_batch_tokens=tokens, packing=packing))
        )
        for tokens, packing in ((1, True), (50, True), (1000, True), (1000, False))
    ]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


def test_pause_saves_and_resume_goes_on_bit_for_bit(base: Base, trainer: Trainer, tmp_path: Path) -> None:
    whole = run(trainer, job(base, tmp_path / "whole", DATA, n_epochs=3))
    start = job(base, tmp_path / "paused", DATA, n_epochs=3)
    trainer.start(start)
    run_until(trainer, "update")
    trainer.stop(StopJob(start.id, save=True))
    replies = run(trainer)
    assert ended(replies).outcome == "paused"
    (saved,) = [reply for reply in replies if isinstance(reply, Checkpoint)]
    assert (saved.kind, saved.metrics.step) == ("state", 1)
    resumed = run(trainer, msgspec.structs.replace(start, resume=saved.directory))
    assert losses(replies) + losses(resumed) == losses(whole)
    assert same_weights(final(whole), final(resumed))


def test_cancel_keeps_nothing(base: Base, trainer: Trainer, tmp_path: Path) -> None:
    trainer.start(job(base, tmp_path / "job", DATA, n_epochs=50))
    run_until(trainer, "backward")
    trainer.stop(StopJob("job", save=False))
    replies = run(trainer)
    assert ended(replies).outcome == "cancelled"
    assert not any(isinstance(reply, Checkpoint) for reply in replies)


def test_a_job_has_ended_when_its_checkpoint_is_written(
    base: Base, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its directory may be removed afterwards."""
    go_on, write = threading.Event(), checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *args: go_on.wait(60) and write(*args))
    trainer.start(job(base, tmp_path / "job", DATA, n_epochs=50, checkpoint_every=1))
    run_until(trainer, "save")
    trainer.run_piece()
    trainer.stop(StopJob("job", save=False))
    for _ in range(20):
        if trainer.ready:
            trainer.run_piece()
        assert not any(isinstance(reply, JobEnded) for reply in trainer.take_replies())
    assert not trainer.ready
    assert not trainer.idle
    go_on.set()
    saved, last = run(trainer)
    assert isinstance(saved, Checkpoint)
    assert (Path(saved.directory) / checkpoint.STATE).exists()
    assert isinstance(last, JobEnded)
    assert last.outcome == "cancelled"


def test_validation_checkpoints_and_counts(base: Base, trainer: Trainer, tmp_path: Path) -> None:
    replies = run(trainer, job(base, tmp_path / "job", DATA, valid=dataset(5, seed=3), n_epochs=2, eval_every=2))
    steps = [reply for reply in replies if isinstance(reply, TrainingStep)]
    assert [step.metrics.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.metrics.step for step in steps if step.metrics.full_valid_loss] == [2, 3, 4, 6]
    assert steps[-1].trained_tokens == 2 * len(DATA.tokens)
    kept = [(reply.kind, reply.metrics.step) for reply in replies if isinstance(reply, Checkpoint)]
    assert kept == [("checkpoint", 3), ("final", 6)]
    assert all(step.busy_seconds > 0 for step in steps)


def test_the_validation_loss_is_the_mean_over_trained_tokens(
    engine: Engine, trainer: Trainer, model_dir: Path, tmp_path: Path
) -> None:
    adapter = initial_adapter(engine, tmp_path / "initial", model_dir)
    valid = dataset(5, seed=3)
    replies = run(
        trainer,
        job(engine.base, tmp_path / "job", DATA, valid=valid, initial=adapter, batch_size=12, learning_rate=1e-12),
    )
    (step,) = [reply for reply in replies if isinstance(reply, TrainingStep)]
    with torch.no_grad():
        expected = peft_loss(peft_model(model_dir, "nf4", adapter), valid, list(range(5))) / valid.trained.sum()
    assert step.metrics.full_valid_loss == pytest.approx(float(expected), rel=1e-5)


def test_early_stopping(base: Base, trainer: Trainer, tmp_path: Path) -> None:
    """Random data cannot generalise: the validation loss soon rises."""
    start = job(
        base, tmp_path / "job", DATA, valid=dataset(5, seed=3), n_epochs=40, learning_rate=2e-2, early_stopping=2
    )
    replies = run(trainer, start)
    assert ended(replies).outcome == "succeeded"
    assert len(losses(replies)) < 120
    assert any("Stopped early" in getattr(reply, "message", "") for reply in replies if reply.id == "job")


# --- faults and other jobs --------------------------------------------------------------------------------


def test_steps_that_are_not_finite_are_skipped_then_the_job_fails(base: Base, trainer: Trainer, tmp_path: Path) -> None:
    trainer.start(job(base, tmp_path / "job", DATA, n_epochs=5))
    (task,) = trainer.tasks.values()
    task.adapter.values[: task.adapter.decayed // 2] = float("inf")
    before = task.adapter.values.clone()
    replies = run(trainer)
    end = ended(replies)
    assert (end.outcome, end.code) == ("failed", "non_finite_loss")
    assert len([reply for reply in replies if "skipped" in (getattr(reply, "message", None) or "")]) == 5
    assert torch.equal(task.adapter.values, before)


def test_a_fault_ends_its_job_and_its_neighbour_goes_on_unchanged(
    base: Base, trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = run(trainer, job(base, tmp_path / "alone", DATA, n_epochs=2))
    trainer.start(job(base, tmp_path / "0", DATA, n_epochs=2))
    run_until(trainer, "update")
    trainer.start(job(base, tmp_path / "1", DATA, id="greedy", n_epochs=2))
    run_until(trainer, "backward")

    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(trainer._model, "run", no_memory)
        trainer.run_piece()
    replies = run(trainer)
    assert (ended(replies, "greedy").outcome, ended(replies, "greedy").code) == ("failed", "out_of_memory")
    assert ended(replies).outcome == "succeeded"
    assert same_weights(final(alone), final(replies))
    assert base.slot.deltas is None


@pytest.mark.parametrize(
    ("fault", "codes"),
    [
        (RuntimeError("no such kernel"), ("training_failed", "start_failed")),
        (MemoryError(), ("out_of_memory", "out_of_memory")),
    ],
    ids=str,
)
def test_a_base_that_cannot_be_planned_for_fails_its_jobs_with_a_reason(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, codes: tuple[str, str]
) -> None:
    def broken(*_: object) -> None:
        raise fault

    monkeypatch.setattr("server.training.trainer.LayeredModel", broken)
    start = job(base, tmp_path / "job", DATA)
    with contextlib.closing(Trainer(base)) as trainer:
        asked = PlanMemory(id="plan", modules=start.modules, optimizer="adamw", scale_vector=False, tokens=64)
        trainer.handle(asked)
        (answer,) = trainer.take_replies()
        assert isinstance(answer, Done)
        assert (answer.id, answer.code, bool(answer.error)) == ("plan", codes[0], True)
        end = ended(run(trainer, start))
        assert (end.outcome, end.code, bool(end.message)) == ("failed", codes[1], True)
        assert trainer.idle


def test_files_that_cannot_be_read_end_the_job(base: Base, trainer: Trainer, tmp_path: Path) -> None:
    start = job(base, tmp_path / "job", DATA)
    (tmp_path / "job" / "train.safetensors").write_bytes(b"")
    assert ended(run(trainer, start)).code == "start_failed"


def test_serving_beside_training_is_bit_equal_and_the_base_unchanged(
    engine: Engine, trainer: Trainer, tmp_path: Path
) -> None:
    prompt = list(range(5, 60))

    def answer() -> Any:
        return engines.run(engine, [engines.request("a", prompt, max_tokens=4, prompt_logprobs=0)])["a"]

    digest, before = engine.base.digest(), answer()
    trainer.start(job(engine.base, tmp_path / "job", DATA, n_epochs=2))
    while not trainer.idle:
        if trainer.ready:
            for _ in range(7):
                trainer.run_piece()
        trainer.take_replies()
        with contextlib.suppress(KeyError):
            engine.blocks.reset_cache()
        assert answer() == before
    assert answer() == before
    assert engine.base.digest() == digest
