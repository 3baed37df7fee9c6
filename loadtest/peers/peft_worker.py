"""PEFT on a bitsandbytes NF4 base, in a process of its own: JSON lines in, JSON lines out.

Started by `peft.Peft`; the first line has the settings, every further one is a burst of prompts of equal length. Times
are `perf_counter` seconds, on Linux one clock for all processes.
"""

import json
import sys
import time
import warnings
from typing import Any

import torch


class StepClock:
    """A stopping criterion that never stops and records the time of each step's tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def load_base(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    """Load the quantised base alone."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(settings["threads"])
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        settings["model"], quantization_config=quantization, dtype=dtype, device_map={"": settings.get("device", "cpu")}
    )


def load(settings: dict[str, Any]) -> Any:
    """Load the quantised base with all adapters."""
    from peft import PeftModel

    base = load_base(settings, getattr(torch, settings["dtype"]))
    first, *others = settings["adapters"].items()
    model = PeftModel.from_pretrained(base, first[1], adapter_name=first[0])
    for name, path in others:
        model.load_adapter(path, adapter_name=name)
    model.eval()
    model.generation_config.eos_token_id = None  # every sequence runs to its full length
    return model


@torch.inference_mode()
def generate(model: Any, prompts: list[list[int]], tokens: int, **keywords: Any) -> tuple[list[float], list[list[int]]]:
    """Generate one batch greedily; return the time of each step, and the new token ids `[requests][tokens]`."""
    from transformers import StoppingCriteriaList

    clock = StepClock()
    ids = torch.tensor(prompts, device=model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([clock]),
        **keywords,
    )
    return clock.times, out[:, ids.shape[1] :].tolist()


def mixed_batch(model: Any, burst: dict[str, Any]) -> list[dict[str, Any]]:
    """Run all requests in one batch, each row with its own adapter."""
    if not any(burst["adapters"]):
        return without_adapters(model, burst)
    names = [name or "__base__" for name in burst["adapters"]]
    times, rows = generate(model, burst["prompts"], burst["tokens"], adapter_names=names)
    return [{"times": times, "tokens": row} for row in rows]


def without_adapters(model: Any, burst: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the base alone, in one batch."""
    with model.disable_adapter():
        times, rows = generate(model, burst["prompts"], burst["tokens"])
    return [{"times": times, "tokens": row} for row in rows]


def switching(model: Any, burst: dict[str, Any]) -> list[dict[str, Any]]:
    """Run one adapter at a time: a batch for the requests of each adapter."""
    if not any(burst["adapters"]):
        return without_adapters(model, burst)
    answers: dict[int, dict[str, Any]] = {}
    for name in dict.fromkeys(burst["adapters"]):
        members = [i for i, other in enumerate(burst["adapters"]) if other == name]
        model.set_adapter(name)
        times, rows = generate(model, [burst["prompts"][i] for i in members], burst["tokens"])
        answers |= {i: {"times": times, "tokens": row} for i, row in zip(members, rows, strict=True)}
    return [answers[i] for i in range(len(answers))]


def main() -> None:
    """Serve bursts until standard input ends."""
    warnings.simplefilter("ignore")
    answers = sys.stdout
    sys.stdout = sys.stderr  # keeps libraries' prints out of the protocol
    settings = json.loads(sys.stdin.readline())
    model = load(settings)
    run = switching if settings["switching"] else mixed_batch
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(model, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
