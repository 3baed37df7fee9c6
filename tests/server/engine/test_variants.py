"""Variants in the engine: batch-invariant outputs, shared prefixes where possible, memory freed."""

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from adapters.peft_format.fields import AdapterError
from adapters.peft_format.sizes import EXTRAS
from server.engine.engine import Engine
from server.engine.runner import ModulesPath
from server.messages.protocol import AdapterRef, Generate
from tests.server.engine.test_parity import peft_logprobs
from tests.support import interpreter
from tests.support.offline import Answer, load_engine, publish, request, run
from tests.support.variants import BASES, INVOCATION, VARIANTS, make_base

# PEFT's advice about merging and tied embeddings, given for every such adapter.
pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore::UserWarning:peft")

PROMPT = [random.Random(3).randrange(3, 290) for _ in range(70)]
PROMPT[40:43] = PROMPT[20:23] = INVOCATION  # the last one counts
PROMPT[5], PROMPT[60] = 70, 5  # trained tokens


class World:
    """One base with an engine over it, and adapters of every variant for it."""

    def __init__(self, name: str, root: Path, cache: Path) -> None:
        depth = {"num_hidden_layers": 1} if interpreter.whole_suite() else {}
        self.model = make_base(name, root / "model", **depth)
        self.load = functools.partial(load_engine, self.model, cache, adapter_bytes=32 << 20)
        self.engine: Engine = self.load()
        names = [variant for variant, made in VARIANTS.items() if made.base == name]
        self.adapters = {
            variant: VARIANTS[variant].save(root / str(seed), self.model, seed) for seed, variant in enumerate(names)
        }
        self.references = {variant: publish(self.engine, path) for variant, path in self.adapters.items()}

    def requests(self, **sampling: int) -> list[Generate]:
        settings = {"max_tokens": 4, "prompt_logprobs": 0} | sampling
        named: list[tuple[str, AdapterRef | None]] = [*self.references.items(), ("base", None)]
        return [request(name, PROMPT, reference, **settings) for name, reference in named]


@pytest.fixture(scope="module")
def world(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    @functools.cache
    def make(name: str) -> World:
        return World(name, tmp_path_factory.mktemp(name), cache_dir)

    return make


@pytest.mark.parametrize("base", BASES)
def test_outputs_are_bit_identical_in_any_batch(base: str, world: Callable[[str], World]) -> None:
    here = world(base)
    alone: dict[str, Answer] = {}
    for single in here.requests():
        here.engine.blocks.reset_cache()
        alone |= run(here.engine, [single])
    assert run(here.load(), here.requests()) == alone
    assert run(here.load(max_batch_tokens=29), here.requests(), every=2) == alone
    report = here.engine.inspect("x")
    assert report.base_digest == here.engine.base_digest


def test_plain_adapters_keep_their_path(world: Callable[[str], World], monkeypatch: pytest.MonkeyPatch) -> None:
    here = world("tied")
    if here.engine.runner.weights.plan is None:
        pytest.skip("there is no other path here")
    run(here.engine, here.requests())  # makes all resident
    modules: list[int] = []
    forward = ModulesPath.forward

    def counted(path: ModulesPath, batch: Any) -> Any:
        modules.append(len(batch.logits_indices))
        return forward(path, batch)

    monkeypatch.setattr(ModulesPath, "forward", counted)
    for name in ("plain", "base", "embedding", "head", "tokens", "activated", "saved head"):
        run(here.engine, [single for single in here.requests() if single.id == name])
    assert modules == []
    run(here.engine, [single for single in here.requests() if single.id == "DoRA"])
    assert modules
    hooked = [module for module in here.engine.base.model.modules() if module._forward_hooks]
    assert hooked == []


def test_an_activated_adapter_shares_the_bases_prefix(world: Callable[[str], World]) -> None:
    here = world("tied")
    engine = here.load()
    activated = here.references["activated"]
    cold = run(here.load(), [request("a", PROMPT, activated, max_tokens=8)])["a"]
    run(engine, [request("base", PROMPT, None, max_tokens=1)])
    warm = run(engine, [request("a", PROMPT, activated, max_tokens=8)])["a"]
    assert warm.cached_tokens == 32, "two whole blocks before the invocation at 40"
    assert (warm.tokens, warm.logprobs) == (cold.tokens, cold.logprobs)
    again = run(engine, [request("a", PROMPT, activated, max_tokens=1)])["a"]
    assert again.cached_tokens == 64, "and its own blocks after it"
    # The same tokens in a block, but invoked elsewhere: different keys and values.
    earlier = run(engine, [request("a", PROMPT[:36] + [7] * 20, activated, max_tokens=8)])["a"]
    alone = run(here.load(), [request("a", PROMPT[:36] + [7] * 20, activated, max_tokens=8)])["a"]
    assert earlier.cached_tokens == 16, "invoked at 20, so only the first block is the base's"
    assert (earlier.tokens, earlier.logprobs) == (alone.tokens, alone.logprobs)


def test_without_its_invocation_an_activated_adapter_is_the_base(world: Callable[[str], World]) -> None:
    here = world("tied")
    prompt = [token for token in PROMPT if token not in INVOCATION]
    one = run(here.engine, [request("a", prompt, here.references["activated"], max_tokens=4)])["a"]
    other = run(here.engine, [request("a", prompt, None, max_tokens=4)])["a"]
    assert (one.tokens, one.logprobs) == (other.tokens, other.logprobs)


def test_memory_beyond_rank_rows_is_counted_and_freed(world: Callable[[str], World]) -> None:
    here = world("tied")
    engine = here.load(adapter_bytes=1 << 20)  # a saved head alone takes 128 KiB: not all fit
    alone = {single.id: run(here.load(), [single])[single.id] for single in here.requests(prompt_logprobs=0)[:6]}
    evicted = 0
    for single in [*here.requests(), *here.requests()]:
        engine.add(single)
        while not engine.idle:
            for output in engine.step()[0]:
                assert output.error is None
            free, resident = engine.pool.free[EXTRAS], engine.pool.resident[EXTRAS]
            assert free + resident == engine.pool.capacity[EXTRAS]
        evicted += len(engine.adapter_cache.evictions)
    engine.blocks.reset_cache()
    for name, expected in alone.items():
        [single] = [single for single in here.requests() if single.id == name]
        engine.blocks.reset_cache()
        assert run(engine, [single])[name] == expected
    for reference in here.references.values():
        engine.adapter_cache.forget(reference.digest)
        assert engine.pool.adapter(reference.digest) is None
    assert engine.pool.resident[EXTRAS] == 0


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_changed_the_base_is_right_after_pefts_conversion(
    init: str, cache_dir: Path, tmp_path: Path
) -> None:
    model = make_base("tied", tmp_path / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    options: dict[str, Any] = {"init_lora_weights": init, "target_modules": ["q_proj", "up_proj"]}
    trained: Any = peft.get_peft_model(base, peft.LoraConfig(**options))
    trained.peft_config["default"].init_lora_weights = True
    trained.save_pretrained(tmp_path / "before")
    trained.peft_config["default"].init_lora_weights = init
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    trained.save_pretrained(tmp_path / "raw")
    trained.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    engine = load_engine(model, cache_dir)
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        publish(engine, tmp_path / "raw")
    single = request("a", PROMPT, publish(engine, tmp_path / "converted"), max_tokens=0, prompt_logprobs=0)
    ours = [entry.logprob for entry in run(engine, [single])["a"].prompt_logprobs if entry is not None]
    expected = peft_logprobs(model, tmp_path / "converted", "nf4", PROMPT)
    torch.testing.assert_close(torch.tensor(ours), expected, atol=1e-3, rtol=0)
