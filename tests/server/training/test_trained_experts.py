"""Adapters of experts, trained with frozen routers: equal to PEFT, and loaded by PEFT."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from msgspec.structs import replace

from adapters.peft_format import directory as adapter_format
from adapters.peft_format.directory import AdapterSpec
from server.engine.engine import Engine
from server.finetune.hyperparameters import trained_on
from server.messages.dataset import Dataset
from server.messages.training import MemoryPlan, PlanMemory, StartJob
from server.training.trainable import TrainableAdapter
from server.training.trainer import Trainer
from tests.support.offline import load_engine, publish, request, run
from tests.support.peft_side import initial_adapter
from tests.support.single_experts import on_single_experts, single_experts_adapter
from tests.support.tiny import tiny_model
from tests.support.training import PLAN, dataset, ended, final, job, losses
from tests.support.training import run as train

LORA: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
RATE = 1e-2
PLANNED: dict[str, Any] = {"n_epochs": 2, "learning_rate": RATE, "max_grad_norm": 0.0}
COMMON = {"num_hidden_layers": 2, "head_dim": 16, "num_experts_per_tok": 2, "tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("family", "settings", "memory", "goes_on"),
    [
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 48, "norm_topk_prob": True}, "recompute", False),
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 48, "norm_topk_prob": True}, "keep", True),
        ("GptOss", {"num_local_experts": 4, "intermediate_size": 48}, "keep", False),
    ],
)
def test_two_steps_equal_peft_and_the_checkpoint_loads_there(
    family: str, settings: dict[str, Any], memory: str, goes_on: bool, tmp_path: Path
) -> None:
    """From PEFT's initialisation, and from an existing adapter."""
    model, engine = opened(tmp_path, family, settings)
    data = dataset(4, seed=3)
    plan = PLANNED | {"memory": memory}
    initial = initial_adapter(engine, tmp_path / "begun", model, b_std=0.05, **LORA) if goes_on else None
    start = job(engine.base, tmp_path / "job", data, lora=LORA, initial=initial, **plan)
    begun = TrainableAdapter(engine.base.trainable, start.modules, device=torch.device("cpu"), seed=PLAN["seed"])
    if not goes_on:
        (tmp_path / "begun").mkdir()
        adapter_format.write(tmp_path / "begun", LORA, begun.tensors())
    replies, planned = trained(engine, start)
    assert ended(replies).outcome == "succeeded"
    assert planned.adapter == 4 * len(begun.values)

    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "begun"), is_trainable=True)
    check_steps(theirs, data, replies, len(begun.values))
    check_result(engine, model, replies, theirs)


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module")
@pytest.mark.parametrize(
    ("family", "sizes", "module", "parts", "memory"),
    [
        (
            "Qwen3Moe",
            {"num_experts": 8, "moe_intermediate_size": 96, "norm_topk_prob": True},
            "mlp",
            ["gate_proj", "up_proj", "down_proj"],
            "keep",
        ),
        (
            "Mixtral",
            {"num_local_experts": 8, "intermediate_size": 96},
            "block_sparse_moe",
            ["w1", "w3", "w2"],
            "recompute",
        ),
    ],
)
def test_a_job_goes_on_from_linears_of_single_experts_as_in_peft(
    family: str, sizes: dict[str, Any], module: str, parts: list[str], memory: str, tmp_path: Path
) -> None:
    """Each is trained separately, and the zeros between gate and up stay, as in PEFT's training of the same modules."""
    model, engine = opened(tmp_path, family, sizes)
    data = dataset(4, seed=3)
    plan = PLANNED | {"memory": memory}
    begun = single_experts_adapter(tmp_path / "begun", model, module, parts)
    publish(engine, begun)
    config = json.loads((begun / "adapter_config.json").read_text())
    start = replace(
        job(engine.base, tmp_path / "job", data, lora={"target_modules": ["q_proj"]}, initial=begun, **plan),
        modules=trained_on(AdapterSpec.read(begun)),
        config=config,
    )
    replies, planned = trained(engine, start)
    theirs = on_single_experts(model, begun, module, parts)
    assert ended(replies).outcome == "succeeded"
    check_steps(theirs, data, replies, planned.adapter // 4)
    assert AdapterSpec.read(begun).variants.experts == published(engine, final(replies)).variants.experts
    check_result(engine, model, replies, theirs)


def opened(directory: Path, family: str, sizes: dict[str, Any]) -> tuple[Path, Engine]:
    """A tiny model of a family, and an engine over it."""
    model = tiny_model(
        directory / "model",
        config_class=getattr(transformers, f"{family}Config"),
        model_class=getattr(transformers, f"{family}ForCausalLM"),
        **(COMMON | sizes),
    )
    return model, load_engine(model, directory / "cache", quantization="none", adapter_bytes=1 << 20)


def trained(engine: Engine, start: StartJob) -> tuple[list[Any], MemoryPlan]:
    """A job's replies, and its memory plan."""
    trainer = Trainer(engine.base)
    try:
        replies = train(trainer, start)
        asked = PlanMemory(id="p", modules=start.modules, optimizer="adamw", scale_vector=False, tokens=64)
        return replies, trainer.plan_memory(asked)
    finally:
        trainer.close()


def published(engine: Engine, directory: Path) -> AdapterSpec:
    publish(engine, directory)
    return AdapterSpec.read(directory)


def check_steps(theirs: peft.PeftModel, data: Dataset, replies: list[Any], parameters: int) -> None:
    """Check that two steps of PEFT have the same losses."""
    adapted = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in adapted) == parameters
    optimizer = torch.optim.AdamW(adapted, lr=RATE, weight_decay=0)
    expected = []
    for _ in range(2):
        total, count = torch.zeros(()), 0
        for index in range(4):
            ids, labelled = (torch.from_numpy(part) for part in data.sequence(index))
            logits = theirs(input_ids=ids.long()[None]).logits[0, :-1]
            total = total + F.cross_entropy(logits[labelled[1:]], ids[1:][labelled[1:]].long(), reduction="sum")
            count += int(labelled[1:].sum())
        expected.append((total / count).item())
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    assert losses(replies) == pytest.approx(expected, abs=1e-3)
    assert abs(expected[0] - expected[1]) > 0.01


def check_result(engine: Engine, model: Path, replies: list[Any], theirs: peft.PeftModel) -> None:
    last = final(replies)
    prompt = list(range(3, 30))
    answer = run(engine, [request("r", prompt, publish(engine, last), max_tokens=1, prompt_logprobs=0)])["r"]
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, str(last))
    for scored in (loaded, theirs):  # the same file, and the parameters that PEFT trained
        with torch.no_grad():
            scores = scored(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        found = [entry.logprob for entry in answer.prompt_logprobs if entry is not None]
        assert found == pytest.approx(scores.gather(1, torch.tensor(prompt)[1:, None])[:, 0].tolist(), abs=1e-3)
