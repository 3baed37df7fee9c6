"""The self-check of a new base: the engine's log-probabilities are compared with stock transformers'.

Transformers passes no mask to a custom attention function and relies on it, and a model family may keep state or count
positions outside the engine's view. So every new base first answers two requests in one batch, one of them through a
random adapter on every linear, in several chunks and ten decoded tokens; the result is compared with stock eager
attention over all tokens at once, and in every step each layer must attend once. A passed check is recorded by digest
and versions.
"""

import hashlib
import inspect
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from adapters.device.lora import LoraLinear
from adapters.kernels import native, triton
from adapters.peft_format import inspection
from adapters.peft_format.directory import CONFIG_NAME, WEIGHTS_NAME
from adapters.scratch import scratch
from server.engine.engine import Engine
from server.messages.protocol import AdapterRef, Forget, Generate, Sampling, TokenLogprob
from server.model import attention, experts, geometry
from server.model.base import Base, UnservableModel, errors_as_unservable

REVISION = 4  # of this check: bases that passed an earlier revision are checked again
SCORED = 64  # prompt positions compared, the last ones of the first chunk
PLAIN = 48  # prompt tokens of the request without an adapter
DECODED = 10
ALTERNATIVES = 20  # log-probabilities compared at each drawn token, besides its own
RANK = 4
B_STD = 0.05  # of the adapter's B: its update is about a tenth of the base weights' output
TOLERANCE = {torch.float32: 5e-3}  # of a log-probability; LOOSE for bf16 and fp16
LOOSE = 0.5
_POLL_SECONDS = 1e-3

log = logging.getLogger(__name__)


def run(engine: Engine, cache_dir: Path) -> None:
    """Check a base, unless it has passed before, and record the pass. Raises UnservableModel on disagreement."""
    kept = str(engine.cache.dtype)
    identity = [engine.base_digest, engine.base.architecture, str(engine.base.device), kept, transformers.__version__]
    name = hashlib.sha256(json.dumps([*identity, torch.__version__, REVISION]).encode()).hexdigest()[:24]
    passed = cache_dir / "selfcheck" / name
    if passed.exists():
        return
    with errors_as_unservable(engine.base.architecture):
        difference = compare(engine)
    exact = engine.cache.dtype == engine.cache.compute
    limit = TOLERANCE.get(engine.base.dtype, LOOSE) if exact else LOOSE
    if not difference <= limit:  # NaN fails too
        raise UnservableModel(
            f"the engine disagrees with transformers on this {engine.base.architecture}: log-probabilities differ by "
            f"{difference:.2g} (at most {limit} expected); it is not a model that can be served"
        )
    try:
        passed.parent.mkdir(parents=True, exist_ok=True)
        passed.write_text(json.dumps({"digest": engine.base_digest, "difference": difference}))
    except OSError as fault:
        log.warning("the self-check passed, but this could not be recorded, so the next start repeats it: %s", fault)


# --- comparison -------------------------------------------------------------------------------------


@dataclass
class _Answer:
    """One sequence, and the engine's log-probabilities along it."""

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)  # drawn after the whole prompt
    found: list[tuple[int, int, float]] = field(default_factory=list)  # (position before it, token, log-probability)

    def record(self, position: int, entry: TokenLogprob) -> None:
        """Record the engine's log-probabilities of the token after `position`."""
        self.found += [(position, token, logprob) for token, logprob in [(entry.token, entry.logprob), *entry.top]]


def compare(engine: Engine) -> float:
    """Return the largest difference of our log-probabilities from stock eager attention with the adapter's formula.

    The stock side dequantises the weights with their own library, so that it shares no kernel with ours. Raises
    UnservableModel when a request fails, or a layer does not attend exactly once in a step.
    """
    longest = engine.max_model_len - DECODED
    length = max(3, min(max(layer.window for layer in engine.base.layers) + SCORED + 16, longest))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(engine.base.vocab_size, (2, length), generator=generator).tolist()
    adapted, plain = _Answer(ids[0]), _Answer(ids[1][:PLAIN])
    with scratch() as folder:
        adapter, rows = _random_adapter(engine, folder)
        try:
            # Three rounds over growing prompts: the prefix cache has the earlier rounds, so each computes a chunk.
            with geometry.checked_attention(engine.base.decoder, engine.base.slot, engine.base.layers):
                for part in (1, 2, 3):
                    _answer(engine, {"adapted": (adapted, adapter), "plain": (plain, None)}, part)
        finally:
            engine.blocks.reset_cache()
            engine.forget(Forget(id="selfcheck", digest=adapter.digest))
            engine.take_done()
    return max(_difference(engine.base, adapted, rows), _difference(engine.base, plain, {}))


def _answer(engine: Engine, requests: Mapping[str, tuple[_Answer, AdapterRef | None]], part: int) -> None:
    """Answer the first `part` thirds of every prompt in one batch; decode after the whole prompts."""
    ends = {}
    for name, (answer, adapter) in requests.items():
        ends[name] = max(1, len(answer.prompt) * part // 3)
        sampling = Sampling(
            max_tokens=DECODED if part == 3 else 1,
            temperature=0.0,
            ignore_eos=True,
            logprobs=min(ALTERNATIVES, engine.base.vocab_size),
            prompt_logprobs=0 if part == 1 else None,
        )
        prompt = answer.prompt[: ends[name]]
        engine.add(Generate(id=name, prompt=prompt, sampling=sampling, adapters=[adapter] if adapter else []))
    drawn = dict.fromkeys(requests, 0)
    scores: dict[str, list[TokenLogprob | None]] = {name: [] for name in requests}
    while not engine.idle:
        outputs, _ = engine.step()
        for output in outputs:
            if output.error is not None:
                raise UnservableModel(f"the self-check failed: {output.error}")
            answer, _ = requests[output.id]
            scores[output.id] += output.prompt_logprobs
            if output.tokens and not drawn[output.id]:
                for position, score in list(enumerate(scores[output.id]))[-SCORED:]:
                    if score is not None:
                        answer.record(position - 1, score)
            for token, logprob in zip(output.tokens, output.logprobs, strict=True):
                answer.record(ends[output.id] - 1 + drawn[output.id], logprob)
                drawn[output.id] += 1
                if part == 3:
                    answer.tokens.append(token)
        if not outputs and engine.loading:
            time.sleep(_POLL_SECONDS)


# --- the stock side ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _AdapterDeltas:
    """An adapter's formula, applied to all tokens: linear -> (A [rank, in], B [out, rank]) in fp32, B scaled."""

    rows: Mapping[str, tuple[Tensor, Tensor]]

    def add(self, linear: LoraLinear, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.rows[linear.name]
        return y + (x.float() @ a.T @ b.T).to(y.dtype)


@torch.no_grad()
def _difference(base: Base, answer: _Answer, rows: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """Return the largest difference of an answer from the stock model over all tokens at once; NaN stays NaN."""
    model = base.model
    ids = torch.tensor([answer.prompt + answer.tokens], device=base.device)
    positions = sorted({position for position, _, _ in answer.found})
    keep = torch.tensor(positions, device=base.device)
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    base.slot.deltas = _AdapterDeltas(rows) if rows else None
    try:
        with native.switched_off(), triton.switched_off():
            if "logits_to_keep" in inspect.signature(model.forward).parameters:
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0]
            else:
                logits = model(input_ids=ids, use_cache=False).logits[0, keep]
    finally:
        base.slot.deltas = None
        model.set_attn_implementation(attention.ATTENTION)
        model.set_experts_implementation(experts.EXPERTS)
    stock = logits.float().log_softmax(-1).cpu()
    row_of = {position: row for row, position in enumerate(positions)}
    index = torch.tensor([(row_of[position], token) for position, token, _ in answer.found])
    ours = torch.tensor([logprob for _, _, logprob in answer.found])
    return float((ours - stock[index[:, 0], index[:, 1]]).abs().max())


def _random_adapter(engine: Engine, folder: Path) -> tuple[AdapterRef, dict[str, tuple[Tensor, Tensor]]]:
    """Make an adapter on every linear, saved and inspected like an upload; return it and its rows, with B scaled."""
    ready = engine.ready()
    rank = max(1, min(RANK, min(ready.pool_rows[linear.kind] for linear in ready.linears.values()) // 2))
    generator = torch.Generator().manual_seed(1)
    tensors, rows = {}, {}
    for linear in engine.base.linears:
        a = torch.randn(rank, linear.in_features, generator=generator) * linear.in_features**-0.5
        b = torch.randn(linear.out_features, rank, generator=generator) * B_STD
        tensors[f"base_model.model.{linear.name}.lora_A.weight"] = a
        tensors[f"base_model.model.{linear.name}.lora_B.weight"] = b
        rows[linear.name] = (a.to(engine.base.device), 2 * b.to(engine.base.device))
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(rows)}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS_NAME)
    spec = inspection.inspect(folder, ready.linears, ready.architecture)
    spec.save(folder)
    return AdapterRef(spec.digest, str(folder)), rows
