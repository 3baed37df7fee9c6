"""Optional rounding: int8 inputs for 4-bit linears, a narrower KV cache, and the measured drift of each.

Only serving is rounded: training, merging, the head and adapters' rank rows keep exact inputs, on the same base.
The drift is measured when rounding is switched on, against the exact path, on a fixed text.
"""

import logging
import math
from contextlib import suppress
from pathlib import Path

import torch
from tokenizers import Tokenizer

from adapters.kernels import ExpertWeights, QuantizedWeight, native
from server.engine.block_pool import BlockPool
from server.engine.blocks import BlockGroups
from server.engine.comparison import Comparison, drift, longest_text
from server.engine.engine import Engine
from server.engine.runner import Runner
from server.engine.sequence import AdapterKey
from server.engine.state_slots import StateSlots
from server.messages.protocol import Drift
from server.model.attention import KVCache
from server.model.base import UnservableModel, with_weights
from server.model.states import StateCache

log = logging.getLogger("lorakeet.engine")

_EXACT = "exact"  # the key under which the unrounded base is installed during the comparison
_CHUNK = 64  # tokens
_TEXT = """\
The lighthouse keeper wrote in his journal every evening: the wind from the south-west, three ships before noon, \
a letter from his sister in Bergen. On 14 March 1897 he noted that the lamp had failed twice, and that he had \
walked the gallery until dawn with a lantern in each hand.

Question: A train leaves at 9:40 and arrives at 12:05. How long is the journey?
Answer: From 9:40 to 12:00 is 2 hours and 20 minutes, and 5 minutes more make 2 hours and 25 minutes.

def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2

Photosynthesis turns carbon dioxide and water into sugar and oxygen; the energy comes from light that \
chlorophyll takes up. In most plants this happens in the leaves, whose pores open by day and close at night.

"I don't think we should go back," said Maria. "Not tonight, anyway." Tom looked at the river. "Then we'll need \
a fire," he said, "and something dry to sleep on."
"""


def round_to_int8(engine: Engine, directory: Path) -> None:
    """Switch an idle engine's steps to int8 inputs, and record their drift from exact ones in `engine.int8_drift`.

    Args:
        directory: of the base, for its tokenizer.

    Raises:
        UnservableModel: int8 inputs are not available for this base or on this machine.
    """
    base = engine.base
    if base.device.type != "cpu" or base.dtype != torch.float32:
        dtype = str(base.dtype).removeprefix("torch.")
        raise UnservableModel(f"--activations int8 is for float32 on a CPU; here it would be {dtype} on {base.device}")
    library = native.load()
    if library is None:
        raise UnservableModel(
            "--activations int8 needs the C++ kernels, which this machine can neither load nor compile: leave it out"
        )
    weights: dict[str, QuantizedWeight | ExpertWeights] = {linear.name: linear.weight for linear in base.linears}
    weights |= {linear.name: linear.weights for linear in base.experts}
    rounded: dict[str, QuantizedWeight | ExpertWeights] = {}
    for name, weight in weights.items():
        if native.supports_weight(weight):
            with suppress(ValueError):
                rounded[name] = library.with_int8_inputs(weight)
    if not rounded:
        raise UnservableModel(
            "--activations int8 is for linears in nf4 or fp4 (--quantization), and this base has none"
        )
    engine.runner.replace_base(with_weights(base, rounded))
    engine.int8_drift = found = _measure(engine, directory)
    log.info(
        "activations are rounded to int8 in %d of %d linears: mean KL %.4f nats from exact, the same most likely token "
        "at %.1f%% of %d positions",
        *(len(rounded), len(weights), found.mean_kl, 100 * found.greedy_agreement, found.positions),
    )


def measure_kv(engine: Engine, directory: Path) -> None:
    """Record in `engine.kv_drift` how far an idle engine's answers are from those with an exact KV cache.

    Raises UnservableModel.
    """
    cache, base = engine.cache, engine.base
    if cache.dtype == cache.compute:
        return
    prompt = _prompt(engine, directory)
    count = 2 * engine.blocks.blocks_for(len(prompt))  # half of them may be taken
    layout = base.layers, [count] * len(cache.windows), cache.block_size
    exact = KVCache(*layout, cache.compute, cache.compute, base.device)
    states = StateCache(base.states, 2, base.device) if base.states else None
    runner = Runner(base, exact, engine.pool, engine.max_model_len, states=states)
    slots = StateSlots(2, cache.block_size, False) if base.states else None
    blocks = [BlockPool(count, cache.block_size, False) for _ in cache.windows]
    pools = BlockGroups(blocks, cache.windows, _CHUNK, 1, slots)
    keys: tuple[AdapterKey, AdapterKey] = (), ()
    engine.kv_drift = found = _drift((runner, engine.runner), (pools, engine.blocks), keys, prompt, "--kv-cache-dtype")
    log.info(
        "the KV cache is kept in %s: mean KL %.4f nats from %s, the same most likely token at %.1f%% of %d positions",
        *(str(cache.dtype).removeprefix("torch."), found.mean_kl, str(cache.compute).removeprefix("torch.")),
        *(100 * found.greedy_agreement, found.positions),
    )


def _measure(engine: Engine, directory: Path) -> Drift:
    """Return the drift of the rounded base from the exact one. Raises UnservableModel when logits are not finite."""
    engine.runner.install(_EXACT, engine.base)
    try:
        prompt, keys = _prompt(engine, directory), (((_EXACT, 1.0),), ())
        return _drift(
            (engine.runner, engine.runner), (engine.blocks, engine.blocks), keys, prompt, "--activations int8"
        )
    finally:
        engine.runner.remove(_EXACT)


def _prompt(engine: Engine, directory: Path) -> list[int]:
    ids = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(_TEXT).ids
    longest = min(engine.max_model_len, longest_text(engine.blocks))
    return [token for token in ids if token < engine.base.vocab_size][:longest]


def _drift(
    runners: tuple[Runner, Runner],
    pools: tuple[BlockGroups, BlockGroups],
    keys: tuple[AdapterKey, AdapterKey],
    prompt: list[int],
    setting: str,
) -> Drift:
    """Return the drift of the second side from the first. Raises UnservableModel when logits are not finite."""
    comparison = Comparison()
    for _ in drift(runners, pools, keys, prompt, comparison, _CHUNK):
        pass
    if not math.isfinite(comparison.divergence):
        raise UnservableModel(f"with {setting}, this base's logits are not finite: leave it out")
    return Drift(
        comparison.positions, comparison.divergence / comparison.positions, comparison.agreeing / comparison.positions
    )
