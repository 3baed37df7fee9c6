"""Adapters of single experts' linears, and a mixture with a module for each of these, as in transformers before
version 5, so that PEFT can adapt them.
"""

import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.support.tiny import tiny_adapter


def single_experts_adapter(
    path: Path, model: Path, module: str, parts: list[str], *, seed: int = 1, **config: Any
) -> Path:
    """An adapter of rank 3 on q_proj and on all linears of eight experts of two layers, 64 by 96.

    Args:
        module: the name in the file of the module that holds the experts.
        parts: the names of the linears for gate, up and down.
    """
    directory = tiny_adapter(path, model, r=3, target_modules=["q_proj"], **config)
    document = json.loads((directory / "adapter_config.json").read_text())
    document["target_modules"] = ["q_proj", *parts]
    (directory / "adapter_config.json").write_text(json.dumps(document))
    tensors = load_file(directory / "adapter_model.safetensors")
    torch.manual_seed(seed)
    for layer in range(2):
        for expert in range(8):
            for part in parts:
                inputs, outputs = (96, 64) if part == parts[2] else (64, 96)
                name = f"base_model.model.model.layers.{layer}.{module}.experts.{expert}.{part}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(3, inputs) * inputs**-0.5
                tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, 3) * 0.04
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


class _Expert(nn.Module):
    def __init__(self, gate_up: Tensor, down: Tensor, parts: list[str]) -> None:
        super().__init__()
        for part, weight in zip(parts, (*gate_up.chunk(2), down), strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight.detach().clone())
            self.add_module(part, linear)


class _Experts(nn.ModuleList):
    def __init__(self, whole: Any, parts: list[str]) -> None:
        super().__init__(_Expert(*pair, parts) for pair in zip(whole.gate_up_proj, whole.down_proj, strict=True))
        self.act_fn = whole.act_fn

    def forward(self, hidden: Tensor, index: Tensor, scores: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for expert in index.unique().tolist():
            rows, places = torch.where(index == expert)
            gate, up, down = self[expert].children()
            found = down(self.act_fn(gate(hidden[rows])) * up(hidden[rows])) * scores[rows, places, None]
            out = out.index_add(0, rows, found)
        return out


def on_single_experts(model: Path, adapter: Path, module: str, parts: list[str]) -> peft.PeftModel:
    """PEFT with this adapter, trainable, on the model with a module for each expert's linear."""
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    for layer in base.model.layers:
        layer.mlp.experts = _Experts(layer.mlp.experts, parts)
    # Otherwise PEFT assumes the experts of transformers 5. For mypy the attribute is a class constant.
    setattr(base.config, "model_type", "llama")  # noqa: B010
    adapted = peft.get_peft_model(base, peft.LoraConfig.from_pretrained(str(adapter)))
    assert isinstance(adapted, peft.PeftModel)
    parameters = {name.replace(".default.", "."): value for name, value in adapted.named_parameters()}
    with torch.no_grad():
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
            parameters.pop(name.replace(f".{module}.experts.", ".mlp.experts.")).copy_(tensor)
    assert not any("lora_" in name for name in parameters)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad = "lora_" in name
    return adapted
