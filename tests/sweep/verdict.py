"""One type of the sweep: served and equal to eager transformers with PEFT, or refused in one line by name.

`judge` takes a type and a directory and returns a `Verdict`. It compares, for the plain base and the base
quantised to nf4: two requests of one batch, one with an adapter on every linear, in chunks and ten decoded tokens;
and the losses of two training steps.
"""

import os
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast
from unittest import mock

import bitsandbytes.functional as bnb
import peft
import torch
import torch.nn.functional as F
import transformers
from peft.tuners import tuners_utils
from peft.utils import transformers_weight_conversion
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from server.engine import boot, selfcheck
from server.engine.engine import Engine
from server.messages.protocol import AdapterRef, EngineConfig
from server.model.base import UnservableModel, check_servable
from server.training.layers import LayeredModel
from server.training.trainer import Trainer
from tests.support import offline
from tests.support.training import dataset, ended, job, losses
from tests.support.training import run as train
from tests.sweep.families import VOCAB, auto_class, tiny_config, tiny_family

Word = Literal["served", "refused", "wrong", "unclear"]
TOLERANCE = 1e-3  # of a log-probability, of a loss
PROMPTS = {"adapted": 90, "plain": 40}  # tokens; windows are 32, chunks at most BATCH_TOKENS
BATCH_TOKENS = 48
LEARNING_RATE = 1e-3


class RefusedJob(Exception):
    """Training was refused by name; outputs are right."""


class Verdict(NamedTuple):
    """The outcome for one type."""

    word: Word
    reason: str  # one line: the largest difference, or the reason


def judge(model_type: str, directory: Path) -> Verdict:
    """Build, load, check and compare a tiny model of this type below `directory`."""
    try:
        check_servable(tiny_config(model_type))
    except UnservableModel as refusal:
        return _refused(refusal)
    except Exception as fault:
        # The config is too small for its class; its own default may still show whether the type is refused.
        try:
            check_servable(CONFIG_MAPPING[model_type.partition(",")[0]]())
        except UnservableModel as refusal:
            return _refused(refusal)
        except Exception as other:
            return _unclear("no config", other)
        return _unclear("no tiny config", fault)
    model = directory / "model"
    try:
        tiny_family(model_type, model)
    except ImportError:  # a part of the model needs a library that nothing else does: any weights will do
        tiny_config(model_type).save_pretrained(model)
        save_file({"none": torch.zeros(1)}, model / "model.safetensors", metadata={"format": "pt"})
    except Exception as fault:
        return _unclear("no tiny model", fault)
    try:
        differences = [_compare(model, quantization, directory / quantization) for quantization in ("none", "nf4")]
    except UnservableModel as refusal:
        return _refused(refusal)
    except RefusedJob as refusal:
        return Verdict("served", str(refusal))
    except Exception as fault:
        return _unclear("fault", fault)
    worst = {name: max(difference[name] for difference in differences) for name in differences[0]}
    reason = ", ".join(f"{name} {difference:.1e}" for name, difference in worst.items())
    return Verdict("served" if all(value <= TOLERANCE for value in worst.values()) else "wrong", reason)


def _refused(refusal: UnservableModel) -> Verdict:
    reason = str(refusal)
    clear = "\n" not in reason and "no file named" not in reason  # missing weights prove nothing
    return Verdict("refused" if clear else "unclear", reason)


def _unclear(what: str, fault: Exception) -> Verdict:
    if os.environ.get("SWEEP_TRACEBACK"):
        traceback.print_exception(fault)
    lines = str(fault).splitlines() or [""]
    return Verdict("unclear", f"{what}: {type(fault).__name__}: {' '.join(lines)[:200]}")


def _compare(model: Path, quantization: str, directory: Path) -> Mapping[str, float]:
    """The largest differences between the engine and stock transformers with PEFT. Raises UnservableModel."""
    directory.mkdir(parents=True)
    config = EngineConfig(
        address="",
        model=str(model),
        cache_dir=str(directory / "cache"),
        quantization=quantization,
        kv_cache_bytes=16 << 20,
        adapter_bytes=8 << 20,
        max_batch_tokens=BATCH_TOKENS,
        max_batch_requests=16,
    )
    engine = boot.load(config)
    selfcheck.run(engine, directory / "cache")
    names = [linear.name for linear in engine.base.linears]
    experts = [linear.name for linear in engine.base.experts]
    adapted = _adapted(_stock(model, quantization), names, directory / "adapter", experts)
    answers = _answers(engine, adapted, offline.publish(engine, directory / "adapter"))
    # Linears outside the decoder's layers are adapted but not trained; experts are not trained.
    inner = [linear.name for linear in engine.base.linears if linear.index in LayeredModel(engine.base).layer_of]
    if experts or inner != names:
        adapted = _adapted(_stock(model, quantization), inner, directory / "inner")
        offline.publish(engine, directory / "inner")
    initial = directory / ("inner" if experts or inner != names else "adapter")
    try:
        return {"answers": answers, "losses": _losses(engine, adapted, directory, initial, inner)}
    except RefusedJob as refusal:
        if answers > TOLERANCE:
            return {"answers": answers}
        raise RefusedJob(f"answers {answers:.1e}; {refusal}") from None


def _stock(model: Path, quantization: str) -> Any:
    """The model loaded by transformers and bitsandbytes alone."""
    settings: dict[str, Any] = {}
    if quantization != "none":
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model_type = transformers.AutoConfig.from_pretrained(model).model_type
    stock = auto_class(model_type).from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager", device_map={"": "cpu"}, **settings
    )
    for module in stock.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            cast("Any", module).support_avx512bf16_for_cpu = False  # otherwise it repacks the weight
        if hasattr(module, "is_transposed") and quantization != "none":
            round_experts(module, quantization)
    return stock.requires_grad_(False).eval()


@torch.no_grad()
def round_experts(module: Any, quantization: str) -> None:
    """Quantise each expert's weights `[out, in]` and decode them again: transformers leaves them unquantised."""
    for weights in (parameter for parameter in module.parameters() if parameter.dim() == 3):
        for expert in range(len(weights)):
            dense = weights[expert].T if module.is_transposed else weights[expert]
            data, state = bnb.quantize_4bit(dense.contiguous(), quant_type=quantization, compress_statistics=True)
            decoded = bnb.dequantize_4bit(data, state)
            weights[expert] = decoded.T if module.is_transposed else decoded


def _adapted(stock: Any, names: list[str], directory: Path, experts: Sequence[str] = ()) -> Any:
    """A model like `stock` with a random adapter on every linear and on `experts`, made and saved by PEFT."""
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=names, target_parameters=list(experts) or None)
    with (
        # It would add experts named like other linears,
        mock.patch.object(transformers_weight_conversion, "convert_peft_config_for_transformers"),
        # and refuse the Mamba-2 linears that CUDA kernels bypass.
        mock.patch.object(tuners_utils, "_check_lora_target_modules_mamba"),
    ):
        wrapped = peft.get_peft_model(stock, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.08)
    wrapped.save_pretrained(str(directory))
    return wrapped


def _answers(engine: Engine, adapted: Any, adapter: AdapterRef) -> float:
    """Largest difference of log-probabilities in two prompts of one batch and of the tokens after them."""
    generator = torch.Generator().manual_seed(2)
    prompts = {name: torch.randint(3, VOCAB, (count,), generator=generator).tolist() for name, count in PROMPTS.items()}
    requests = [
        offline.request(name, prompt, adapter if name == "adapted" else None, max_tokens=10, prompt_logprobs=0)
        for name, prompt in prompts.items()
    ]
    worst = 0.0
    for name, answer in offline.run(engine, requests).items():
        if answer.error is not None:
            raise RuntimeError(answer.error)
        ids = torch.tensor([[*prompts[name], *answer.tokens]])
        with torch.no_grad(), nullcontext() if name == "adapted" else adapted.disable_adapter():
            logits = adapted(input_ids=ids, use_cache=False).logits[0, :-1].float()
        scores = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        given = [entry.logprob for entry in [*answer.prompt_logprobs, *answer.logprobs] if entry is not None]
        worst = max(worst, float((torch.tensor(given) - scores).abs().max()))
    return worst


def _losses(engine: Engine, adapted: Any, directory: Path, initial: Path, names: list[str]) -> float:
    """Largest difference of the losses of two steps of AdamW, starting from the saved adapter."""
    data = dataset(4, seed=3)
    trainer = Trainer(engine.base)
    try:
        start = job(
            engine.base,
            directory / "job",
            data,
            lora={"target_modules": names},
            initial=initial,
            n_epochs=2,
            batch_size=4,
            learning_rate=LEARNING_RATE,
            max_grad_norm=0.0,
        )
        replies = train(trainer, start)
    finally:
        trainer.close()
    end = ended(replies)
    if end.code == "not_trainable":
        raise RefusedJob(end.message)
    if end.outcome != "succeeded":
        raise RuntimeError(f"the job ended: {end.message}")
    ours = losses(replies)
    theirs = []
    for parameter_name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)
    optimizer = torch.optim.AdamW(
        [p for p in adapted.parameters() if p.requires_grad], lr=LEARNING_RATE, weight_decay=0
    )
    for _ in range(2):
        total, count = torch.zeros(()), 0
        for index in range(4):
            ids, trained = (torch.from_numpy(part) for part in data.sequence(index))
            logits = adapted(input_ids=ids.long()[None], use_cache=False).logits[0, :-1].float()
            total = total + F.cross_entropy(logits[trained[1:]], ids[1:][trained[1:]].long(), reduction="sum")
            count += int(trained[1:].sum())
        loss = total / count
        theirs.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return max(abs(mine - theirs[step]) for step, mine in enumerate(ours)) if len(ours) == 2 else float("inf")
