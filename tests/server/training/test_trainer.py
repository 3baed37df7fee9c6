"""The trainer against PEFT on the same quantised base, and against itself in company, after kills, beside requests."""

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

from adapters.peft_format import directory as adapter_format
from server.engine.engine import Engine
from server.messages.dataset import Dataset
from server.messages.training import Checkpoint, StartJob, StopJob, TrainingStep
from server.model.base import Base
from server.training.plan import Steps
from server.training.task import Task
from server.training.trainable import Dropout
from server.training.trainer import Trainer
from tests.server.engine.test_parity import dequantised, quantisation
from tests.support import offline as engines
from tests.support.tiny import ALL_LINEAR, tiny_adapter, tiny_model
from tests.support.training import dataset, ended, final, job, losses, run, run_until

DATA = dataset(12)


@pytest.fixture(scope="module")
def engine(model_dir: Path, cache_dir: Path) -> Engine:
    return engines.load_engine(model_dir, cache_dir)


@pytest.fixture
def base(engine: Engine) -> Base:
    return engine.base


@pytest.fixture
def trainer(base: Base) -> Iterator[Trainer]:
    trainer = Trainer(base)
    yield trainer
    trainer.close()


def initial_adapter(engine: Engine, directory: Path, model: Path, **config: Any) -> Path:
    """A random adapter with B != 0, so that A has a gradient."""
    tiny_adapter(directory, model, **config)
    engines.publish(engine, directory)
    return directory


# --- PEFT's side -------------------------------------------------------------------------------------


def peft_model(model: Path, quantization: str, adapter: Path) -> peft.PeftModel:
    """The same adapter on the same base, by transformers, bitsandbytes and PEFT."""
    base = transformers.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=quantisation(quantization), dtype=torch.float32, device_map={"": "cpu"}
    )
    for path, module in list(base.named_modules()):
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if quantization == "int8" and hasattr(getattr(module, "weight", None), "SCB"):
            base.set_submodule(path, dequantised(module))
    base.requires_grad_(False)
    return peft.PeftModel.from_pretrained(base, adapter, is_trainable=True, torch_device="cpu")


def peft_loss(model: peft.PeftModel, data: Dataset, group: list[int]) -> torch.Tensor:
    """Sum of the losses of some sequences, each run by itself."""
    total = torch.zeros(())
    for index in group:
        ids, trained = (torch.from_numpy(part) for part in data.sequence(index))
        logits = model(ids.long()[None]).logits[0, :-1]
        total = total + F.cross_entropy(logits[trained[1:]], ids[1:][trained[1:]].long(), reduction="sum")
    return total


def gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def peft_gradients(model: peft.PeftModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    named = dict(model.named_parameters())
    suffix = ".lora_A.default.weight"
    return {
        name.removeprefix("base_model.model.").removesuffix(suffix): (
            gradient(parameter),
            gradient(named[name.replace("lora_A", "lora_B")]),
        )
        for name, parameter in named.items()
        if name.endswith(suffix)
    }


def our_gradients(task: Task) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The task's gradients by the names and shapes of its tensors."""
    values = task.adapter.values.clone()
    task.adapter.values.copy_(task.adapter.grads)
    gradients = {name: (a.clone(), b.clone()) for name, (a, b) in task.adapter.tensors().items()}
    task.adapter.values.copy_(values)
    return gradients


def assert_same_gradients(task: Task, model: peft.PeftModel) -> None:
    ours, theirs = our_gradients(task), peft_gradients(model)
    assert ours.keys() == theirs.keys()
    for name, pair in theirs.items():
        for mine, expected in zip(ours[name], pair, strict=True):
            assert expected is not None
            assert expected.norm() > 0
            assert (mine - expected).norm() <= 1e-4 * expected.norm(), name


class SharedDropout(torch.nn.Module):
    """PEFT's dropout, dropping what the trainer dropped."""

    def __init__(self, linear: int) -> None:
        super().__init__()
        self.linear = linear
        self.current: Dropout | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.current is not None
        return x * self.current.mask(self.linear, x[0])


# --- gradients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 1, "lora_alpha": 3},
        {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
        {"r": 17, "lora_alpha": 16, "use_rslora": True},
        {"r": 4, "rank_pattern": {"down_proj": 12}, "layers_to_transform": [1, 2]},
    ],
    ids=str,
)
@pytest.mark.parametrize("memory", ["recompute", "keep"])
def test_gradients_of_a_packed_two_job_step_equal_peft_for_each_job_alone(
    lora: dict[str, Any], memory: str, engine: Engine, trainer: Trainer, model_dir: Path, tmp_path: Path
) -> None:
    configs = [
        {"target_modules": ALL_LINEAR} | lora,
        {"r": 5, "lora_alpha": 5, "target_modules": ["o_proj", "up_proj"]},
    ]
    data = [DATA, dataset(8, seed=1)]
    adapters = [
        initial_adapter(engine, tmp_path / f"initial-{n}", model_dir, seed=n, **config)
        for n, config in enumerate(configs)
    ]
    for n in range(2):
        trainer.start(
            job(
                engine.base, tmp_path / f"job-{n}", data[n], id=str(n), lora=configs[n], initial=adapters[n],
                seed=n, memory=memory, micro_batch_tokens=200,
            )
        )  # fmt: skip
    run_until(trainer, "clip")
    for n, task in enumerate(trainer.tasks.values()):
        model = peft_model(model_dir, "nf4", adapters[n])
        group = task.steps.batch(0)
        labels = sum(data[n].sequence(index)[1].sum() for index in group)
        (peft_loss(model, data[n], group) / labels).backward()
        assert_same_gradients(task, model)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_gradients_equal_peft_on_every_quantisation(
    quantization: str, model_dir: Path, cache_dir: Path, tmp_path: Path
) -> None:
    engine = engines.load_engine(model_dir, cache_dir, quantization=quantization)
    adapter = initial_adapter(engine, tmp_path / "initial", model_dir)
    trainer = Trainer(engine.base)
    trainer.start(job(engine.base, tmp_path / "job", DATA, initial=adapter))
    run_until(trainer, "clip")
    (task,) = trainer.tasks.values()
    model = peft_model(model_dir, quantization, adapter)
    group = task.steps.batch(0)
    (peft_loss(model, DATA, group) / sum(DATA.sequence(index)[1].sum() for index in group)).backward()
    assert_same_gradients(task, model)
    trainer.close()


def test_gradients_with_dropout_and_accumulation_equal_peft(
    engine: Engine, trainer: Trainer, model_dir: Path, tmp_path: Path
) -> None:
    """One sequence a micro-batch, so that PEFT sees the same rows in the same places."""
    adapter = initial_adapter(engine, tmp_path / "initial", model_dir)
    trainer.start(job(engine.base, tmp_path / "job", DATA, initial=adapter, packing=False, lora_dropout=0.3, seed=7))
    run_until(trainer, "clip")
    (task,) = trainer.tasks.values()
    model: Any = peft_model(model_dir, "nf4", adapter)
    drops: list[SharedDropout] = []
    for linear in engine.base.linears:
        layer = model.base_model.model.get_submodule(linear.name)
        drops.append(SharedDropout(linear.index))
        layer.lora_dropout["default"] = drops[-1]
    groups = task.steps.micro_batches(0)
    assert len(groups) == 4
    labels = sum(DATA.sequence(index)[1].sum() for group in groups for index in group)
    for number, group in enumerate(groups):
        for drop in drops:
            drop.current = Dropout(0.3, (7, "dropout", 0, number))
        (peft_loss(model, DATA, group) / labels).backward()
    assert_same_gradients(task, model)


def test_a_window_is_honoured(cache_dir: Path, tmp_path: Path) -> None:
    model = tiny_model(
        tmp_path / "mistral",
        config_class=transformers.MistralConfig,
        model_class=transformers.MistralForCausalLM,
        sliding_window=8,
    )
    engine = engines.load_engine(model, cache_dir)
    adapter = initial_adapter(engine, tmp_path / "initial", model)
    trainer = Trainer(engine.base)
    trainer.start(job(engine.base, tmp_path / "job", DATA, initial=adapter))
    run_until(trainer, "clip")
    (task,) = trainer.tasks.values()
    reference = peft_model(model, "nf4", adapter)
    group = task.steps.batch(0)
    (peft_loss(reference, DATA, group) / sum(DATA.sequence(index)[1].sum() for index in group)).backward()
    assert_same_gradients(task, reference)
    trainer.close()


def test_the_scale_vector_is_trained_and_folded_into_b(base: Base, trainer: Trainer, tmp_path: Path) -> None:
    start = job(base, tmp_path / "job", DATA, n_epochs=3, learning_rate=1e-2, scale_vector=True)
    trainer.start(start)
    (task,) = trainer.tasks.values()
    vectors = task.adapter.values[task.adapter.decayed :]
    assert len(vectors) == sum(linear.out_features for linear in base.linears)
    replies = run(trainer)
    assert (vectors != 1).all()
    saved = adapter_format.load(final(replies), adapter_format.inspect(final(replies), *shape_of(base)))
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
    assert theirs[-1] < 0.7 * theirs[0], "something must have been learned, or this test shows nothing"
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
    spec = adapter_format.inspect(final(replies), *shape_of(base))
    assert {name.rsplit(".", 1)[-1] for name in spec.modules} == {"q_proj", "v_proj"}
    assert {(module.rank, module.scaling) for module in spec.modules.values()} == {(8, 4.0)}


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_32bit", "paged_adamw_8bit"])
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
    """Run a job with a trainer that vanishes at random moments; each next one goes on from the last checkpoint."""
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


def test_ten_kills_change_no_bit(base: Base, trainer: Trainer, tmp_path: Path) -> None:
    def start(name: str) -> StartJob:
        return job(
            base, tmp_path / name, dataset(20), valid=dataset(3, seed=5), n_epochs=6, checkpoint_every=1,
            lora_dropout=0.2, lr_scheduler="cosine", warmup_steps=4, memory="keep",
        )  # fmt: skip

    assert same_weights(final(run(trainer, start("whole"))), interrupted(base, start("killed"), kills=10, seed=2))


def test_company_changes_no_bit(base: Base, trainer: Trainer, tmp_path: Path) -> None:
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


# --- faults and neighbours --------------------------------------------------------------------------------


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
