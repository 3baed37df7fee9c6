"""Models with linear attention, convolutions, Mamba-2: equal to PEFT, and bit-identical after any use of states."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from server.engine import activations, selfcheck
from server.engine.comparison import compare
from server.engine.engine import Engine
from server.messages.protocol import AdapterRef, Generate
from server.model.base import UnservableModel
from server.model.states import StateCache
from tests.server.engine.test_parity import our_logprobs, peft_logprobs
from tests.support.offline import Answer, load_engine, publish, request, run, solo
from tests.support.tiny import ALL_LINEAR, tiny_adapter, tiny_model

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "config_class": transformers.Qwen3_5TextConfig,
        "model_class": transformers.Qwen3_5ForCausalLM,
        "num_hidden_layers": 4,  # three of gated DeltaNet, one of gated attention
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "lfm2": {
        "config_class": transformers.Lfm2Config,
        "model_class": transformers.Lfm2ForCausalLM,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "granitemoehybrid": {  # Mamba-2 or attention in each layer
        "config_class": transformers.GraniteMoeHybridConfig,
        "model_class": transformers.GraniteMoeHybridForCausalLM,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
        "mamba_n_heads": 8,
        "mamba_d_state": 24,
    },
    "falcon_h1": {  # Mamba-2 and attention in each layer, and layers that return tuples
        "config_class": transformers.FalconH1Config,
        "model_class": transformers.FalconH1ForCausalLM,
        "num_hidden_layers": 2,
        "mamba_d_ssm": 96,
        "mamba_n_heads": 6,
        "mamba_n_groups": 2,
        "mamba_d_state": 16,
        "ssm_multipliers": [0.4, 1.5, 0.7, 1.2, 0.5],
        "ssm_in_multiplier": 1.25,
        "key_multiplier": 0.5,
    },
}


@pytest.fixture(
    scope="module",
    params=["qwen3_5", "lfm2", "granitemoehybrid", pytest.param("falcon_h1", marks=pytest.mark.slow)],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp(request.param), **FAMILIES[request.param])


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """On every linear, and on the projections around the states alone; PEFT refuses `out_proj` of Falcon-H1."""
    root = tmp_path_factory.mktemp("adapters")
    kinds: list[str | list[str]] = ["all-linear", r".*\.(in_proj\w*|out_proj)"]
    if model.name.startswith("falcon_h1"):
        kinds = [["in_proj", *ALL_LINEAR], r".*\.in_proj"]
    return [tiny_adapter(root / str(i), model, seed=i, r=4 + i, target_modules=kind) for i, kind in enumerate(kinds)]


@pytest.fixture(scope="module")
def engine(model: Path, cache_dir: Path) -> Engine:
    return load_engine(model, cache_dir)


def settle(engine: Engine) -> None:
    """Check that in an idle engine every slot is free or a snapshot."""
    assert engine.blocks.states is not None
    counts = engine.blocks.states.counts
    assert (counts.used, counts.free + counts.cached) == (0, engine.blocks.states.num_slots)
    assert engine.blocks.counts.used == 0
    report = engine.inspect("x")
    assert report.free_slots + report.cached_slots == report.state_slots == engine.blocks.states.num_slots


def test_adapters_equal_peft(engine: Engine, model: Path, adapters: list[Path]) -> None:
    prompt = torch.randint(3, 500, (90,), generator=torch.Generator().manual_seed(1)).tolist()  # in two chunks
    for adapter in (None, *adapters):
        theirs = peft_logprobs(model, adapter, "nf4", prompt)
        torch.testing.assert_close(our_logprobs(engine, adapter, prompt), theirs, atol=1e-3, rtol=0)
    assert selfcheck.compare(engine) <= 1e-3  # in a batch, in chunks, decoding
    settle(engine)


def workload(references: list[AdapterRef], **sampling: Any) -> list[Generate]:
    """16 requests with few distinct prefixes, on both adapters and the base."""
    draw = random.Random(0)
    beginnings = [[draw.randrange(3, 500) for _ in range(48)] for _ in range(2)]
    requests = []
    for i in range(16):
        prompt = [*beginnings[i % 2][: draw.choice([20, 48])], *(draw.randrange(3, 500) for _ in range(i))]
        adapter = [None, *references][i % 3]
        drawn = {"temperature": 0.0 if i % 2 else 0.9, "seed": i, "logprobs": 2, "max_tokens": 16 + i}
        requests.append(request(f"r{i}", prompt, adapter, **(drawn | sampling)))
    return requests


def test_preemption_prefix_hits_and_chunks_change_nothing(
    engine: Engine, model: Path, cache_dir: Path, adapters: list[Path]
) -> None:
    references = [publish(engine, adapter) for adapter in adapters]
    requests = workload(references)
    if not model.name.startswith("lfm2"):  # the recurrences of the others, computed step by step, take long
        requests = requests[:8]
    expected = solo(engine, requests)
    slot = sum(state.bytes for state in engine.base.states.values())
    kept = sum(layer.kv_heads > 0 for layer in engine.base.layers)
    block = 2 * kept * 2 * 16 * 16 * 4  # k and v, layers, kv heads, head size, tokens, bytes
    tight = load_engine(
        model,
        cache_dir,
        kv_cache_bytes=12 * block,
        state_cache_bytes=9 * slot,
        max_batch_tokens=23,
        max_model_len=128,
    )
    # Loads in between would change the order of admission, and with it all counts of this test.
    run(tight, [request(f"w{i}", [5], reference, max_tokens=1) for i, reference in enumerate(references)])
    preemptions, most = 0, 0
    for cached in (False, True):
        if cached:
            run(tight, requests[:3])
        answers = {single.id: Answer() for single in requests}
        for single in requests:
            tight.add(single)
        while not tight.idle:
            outputs, stats = tight.step()
            preemptions += stats.preemptions
            most = max(most, len(tight.scheduler.running))
            for output in outputs:
                answers[output.id].take(output)
        hits = sum(answer.cached_tokens for answer in answers.values())
        assert {name: replace(answer, cached_tokens=0) for name, answer in answers.items()} == expected
        assert hits or not cached
        settle(tight)
    assert preemptions
    assert 2 < most <= 9


def test_a_cached_prompt_goes_on_from_its_snapshot(engine: Engine, adapters: list[Path]) -> None:
    reference = publish(engine, adapters[0])
    prompt = [random.Random(5).randrange(3, 500) for _ in range(70)]
    engine.blocks.reset_cache()
    cold, warm = (run(engine, [request("a", prompt, reference, max_tokens=8)])["a"] for _ in range(2))
    assert (cold.cached_tokens, warm.cached_tokens) == (0, 64)
    assert (warm.tokens, warm.logprobs) == (cold.tokens, cold.logprobs)
    shorter = run(engine, [request("a", prompt[:60], reference, max_tokens=1)])["a"]
    assert shorter.cached_tokens == 0, "this prefix has keys and values, but no state"
    other = run(engine, [request("a", prompt, None, max_tokens=8)])["a"]
    assert other.cached_tokens == 0
    settle(engine)


def test_slots_are_shown(engine: Engine) -> None:
    cache = engine.ready().kv_cache
    assert cache is not None
    assert cache.states is not None
    assert engine.blocks.states is not None
    slots = engine.blocks.states.num_slots
    assert cache.states.slots == slots
    one = StateCache(engine.base.states, 1, engine.base.device)
    kept = sum(tensor.nbytes for tensor in (*one.inputs.values(), *one.memory.values()))
    assert kept == 2 * cache.states.bytes_per_slot, "and the empty one"
    engine.add(request("a", list(range(3, 23)), max_tokens=4))
    _, stats = engine.step()
    assert stats.state_usage == 1 / slots
    assert engine.inspect("x").free_slots < slots
    while not engine.idle:
        engine.step()
    settle(engine)


def test_nothing_is_drafted_over_a_state(engine: Engine) -> None:
    prompt = [5, 6, 7, 8] * 10
    plain = run(engine, [request("a", prompt, max_tokens=20)])["a"]
    engine.add(request("b", prompt, max_tokens=20, speculative_tokens=4))
    tokens, drafted = [], 0
    while not engine.idle:
        outputs, stats = engine.step()
        drafted += stats.drafted_tokens
        tokens += [token for output in outputs for token in output.tokens]
    assert (tokens, drafted) == (plain.tokens, 0)


def test_two_ways_are_compared_on_states_of_their_own(engine: Engine, model: Path, cache_dir: Path) -> None:
    engine.runner.install("other", engine.base)
    pieces = compare(engine.runner, engine.blocks, ((), (("other", 1.0),)), [list(range(3, 40))], 8)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            found = end.value
            break
    engine.runner.remove("other")
    assert (found.positions, found.divergence, len(found.speeds)) == (37, 0.0, 2)
    settle(engine)
    narrow = load_engine(model, cache_dir, kv_cache_dtype="bfloat16")
    activations.measure_kv(narrow, model)
    assert narrow.kv_drift is not None
    assert 0 < narrow.kv_drift.mean_kl < 0.1
    settle(narrow)


def test_too_few_states_are_refused(model: Path, cache_dir: Path) -> None:
    with pytest.raises(UnservableModel, match="--state-cache-bytes 100 holds 0 states"):
        load_engine(model, cache_dir, state_cache_bytes=100)
