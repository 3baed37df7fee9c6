"""Gradients equal PEFT's on the same quantised base: packed, beside other jobs, with dropout, in every quantisation."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from server.engine.engine import Engine
from server.training.task import Task
from server.training.trainable import Dropout
from server.training.trainer import Trainer
from tests.server.engine.test_states import FAMILIES
from tests.support import offline as engines
from tests.support.peft_side import initial_adapter, peft_loss, peft_model
from tests.support.tiny import ALL_LINEAR, tiny_model
from tests.support.training import dataset, job, run_until

DATA = dataset(12)


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
    """The task's gradients under the names and shapes of its tensors."""
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
    """PEFT's dropout with the trainer's dropout mask."""

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


@pytest.mark.parametrize("family", ["qwen3_5", "granitemoehybrid", "falcon_h1"])
def test_gradients_through_states_equal_peft(family: str, cache_dir: Path, tmp_path: Path) -> None:
    model_dir = tiny_model(tmp_path / "model", **FAMILIES[family])
    engine = engines.load_engine(model_dir, cache_dir)
    lora = {"target_modules": r".*\.(in_proj\w*|q_proj|down_proj)"}
    adapter = initial_adapter(engine, tmp_path / "initial", model_dir, **lora)
    trainer = Trainer(engine.base)
    data = dataset(4, high=100)  # longer than one scan
    trainer.start(job(engine.base, tmp_path / "job", data, lora=lora, initial=adapter))
    run_until(trainer, "clip")
    (task,) = trainer.tasks.values()
    model = peft_model(model_dir, "nf4", adapter)
    (peft_loss(model, data, task.steps.batch(0)) / data.trained.sum()).backward()
    assert_same_gradients(task, model)
    trainer.close()


def test_gradients_with_dropout_and_accumulation_equal_peft(
    engine: Engine, trainer: Trainer, model_dir: Path, tmp_path: Path
) -> None:
    """One sequence per micro-batch, so that PEFT has the same rows in the same places."""
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
