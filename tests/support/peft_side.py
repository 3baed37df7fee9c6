"""The same training by PEFT, on transformers' and bitsandbytes' own base, as reference for the trainer."""

from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers

from server.engine.engine import Engine
from server.messages.dataset import Dataset
from tests.server.engine.test_parity import dequantised, quantisation
from tests.support import offline as engines
from tests.support.tiny import tiny_adapter


def initial_adapter(engine: Engine, directory: Path, model: Path, **config: Any) -> Path:
    """A random adapter with B != 0, so that A has a gradient."""
    tiny_adapter(directory, model, **config)
    engines.publish(engine, directory)
    return directory


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
    """Sum of the losses of some sequences, each run separately."""
    total = torch.zeros(())
    for index in group:
        ids, trained = (torch.from_numpy(part) for part in data.sequence(index))
        logits = model(ids.long()[None]).logits[0, :-1]
        total = total + F.cross_entropy(logits[trained[1:]], ids[1:][trained[1:]].long(), reduction="sum")
    return total
