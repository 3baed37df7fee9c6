"""Before a base serves for the first time: does our engine agree with stock transformers on it?

A custom attention function gets no mask from transformers and is trusted to do right, so every new base scores one
prompt both ways, longer than its sliding window. What passed is remembered by digest and versions.
"""

import hashlib
import json
from pathlib import Path

import torch
import transformers

from adapters.kernels import native, triton
from server.engine.engine import Engine
from server.messages.protocol import Generate, Sampling
from server.model import attention
from server.model.base import UnservableModel

SCORED = 64  # prompt positions compared, the last ones
TOLERANCE = {torch.float32: 5e-3}  # of a log-probability; bf16 and fp16 get LOOSE
LOOSE = 0.5


def run(engine: Engine, cache_dir: Path) -> None:
    """Compare and remember. Raises UnservableModel when the two disagree."""
    identity = [engine.base_digest, engine.base.architecture, str(engine.base.device), transformers.__version__]
    name = hashlib.sha256(json.dumps([*identity, torch.__version__]).encode()).hexdigest()[:24]
    passed = cache_dir / "selfcheck" / name
    if passed.exists():
        return
    difference = compare(engine)
    limit = TOLERANCE.get(engine.base.dtype, LOOSE)
    if not difference <= limit:  # NaN fails too
        raise UnservableModel(
            f"the engine disagrees with transformers on this {engine.base.architecture}: log-probabilities differ by "
            f"{difference:.2g} (at most {limit} expected); it is not a model that can be served"
        )
    passed.parent.mkdir(parents=True, exist_ok=True)
    passed.write_text(json.dumps({"digest": engine.base_digest, "difference": difference}))


def compare(engine: Engine) -> float:
    """Largest difference between our log-probabilities of a prompt's tokens and those of stock eager attention.

    The stock side decodes the weights with their own library, so that it shares no kernel with ours.
    """
    length = min(max(engine.base.windows) + SCORED + 16, engine.max_model_len - 1)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(engine.base.vocab_size, (length,), generator=generator).tolist()
    scored = min(SCORED, length - 1)
    ours = torch.tensor(_score(engine, prompt)[-scored:])
    return float((ours - _stock(engine, prompt, scored)).abs().max())


def _score(engine: Engine, prompt: list[int]) -> list[float]:
    """Log-probability of every prompt token but the first, through scheduler, chunks, blocks and our attention."""
    sampling = Sampling(max_tokens=0, prompt_logprobs=0)
    engine.add(Generate(id="selfcheck", prompt=prompt, sampling=sampling))
    while not engine.idle:
        for output in engine.step()[0]:
            if output.error is not None:
                raise UnservableModel(f"the self-check failed: {output.error}")
            scores = output.prompt_logprobs or []
    engine.blocks.reset_cache()
    return [entry.logprob for entry in scores if entry is not None]


@torch.no_grad()
def _stock(engine: Engine, prompt: list[int], scored: int) -> torch.Tensor:
    base, model = engine.base, engine.base.model
    ids = torch.tensor([prompt], device=base.device)
    keep = torch.arange(len(prompt) - 1 - scored, len(prompt) - 1, device=base.device)
    model.set_attn_implementation("eager")
    try:
        with native.switched_off(), triton.switched_off():
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[0].float()
    finally:
        model.set_attn_implementation(attention.ATTENTION)
    following = ids[0, keep + 1]
    return logits.log_softmax(-1).gather(1, following[:, None])[:, 0].cpu()
