"""PEFT training on a bitsandbytes NF4 base, in a process of its own: JSON lines in, JSON lines out.

The protocol is `server.training.bench`'s. `checkpointing` turns gradient checkpointing on; as there, the loss is that
of each sequence's second half. On a CPU all arithmetic is fp32, on a GPU the base's is bf16.
"""

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from loadtest.peers.peft_worker import load_base

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(settings: dict[str, Any]) -> Any:
    """Load the quantised base, ready for a trainable adapter."""
    base = load_base(settings, torch.bfloat16 if settings.get("device") == "cuda" else torch.float32)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Otherwise it repacks the weight, and gradients are lost.
            module.support_avx512bf16_for_cpu = False
    return base


def trainable(base: Any, settings: dict[str, Any]) -> Any:
    """Return PEFT's model over the base."""
    import peft

    base.requires_grad_(False)
    config = peft.LoraConfig(
        r=settings["rank"], lora_alpha=2 * settings["rank"], target_modules=LINEARS, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(base, config)


def checkpoint(base: Any) -> None:
    """Turn gradient checkpointing on; it stays on."""
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    base.train()  # transformers checkpoints in this mode only


def main() -> None:
    """Answer requests until standard input ends."""
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr
    settings = json.loads(sys.stdin.readline())
    base = load(settings)
    device = base.device
    print(json.dumps({"ready": True}), file=answers, flush=True)
    resident = reset_peak(device)
    model = trainable(base, settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    training: dict[str, Any] = {}
    for line in sys.stdin:
        asked = settings | json.loads(line)
        steps = asked.pop("steps")
        if asked != training:
            if asked["checkpointing"] and not training.get("checkpointing"):
                checkpoint(base)
            training = asked
            reset_peak(device)
        size, length = asked["batch_size"], asked["length"]
        ids = torch.randint(3, model.config.vocab_size, (size, length), generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[:, : length // 2] = -100
        ids, labels = ids.to(device), labels.to(device)
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            model(input_ids=ids, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        answer = {"seconds": seconds, "tokens": size * length, "peak": peak(device) - resident}
        print(json.dumps(answer), file=answers, flush=True)


def reset_peak(device: torch.device) -> int:
    """Reset the memory peak; return the bytes in use now: allocated on the GPU, or resident ones of the process."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the process's peak (Linux)
    return peak(device)


def peak(device: torch.device) -> int:
    """Return the most bytes in use since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main()
