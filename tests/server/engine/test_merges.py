"""Merged weights in the engine: their outputs, the requests that use them, and complete removal."""

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.offline.factors import read_factors
from adapters.offline.merge import merge
from adapters.offline.recipe import MergedDtype
from adapters.peft_format.outline import Outline
from server.engine import comparison
from server.engine.engine import Engine
from server.engine.merge_builder import MergeBuilder
from server.messages.protocol import AdapterRef, AdapterUse, Done, Forget, Generate, Merge, MergeReport, Unmerge
from tests.server.engine.test_parity import PROMPT, peft_logprobs
from tests.support import interpreter
from tests.support.offline import Answer, load_engine, publish, request, run
from tests.support.tiny import tiny_adapter, tiny_model

PROMPTS = [PROMPT[:40], PROMPT[50:75]]


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use fewer steps in the interpreter, where a comparison takes most of a test."""
    if interpreter.whole_suite():
        monkeypatch.setattr(comparison, "CHUNK", 16)
        monkeypatch.setattr(comparison, "STEPS", 3)


class World:
    """A model with two adapters, and engines over it."""

    def __init__(self, root: Path, cache: Path, **model: Any) -> None:
        self.model = rounded(tiny_model(root / "model", **model))
        self.adapters = [tiny_adapter(root / f"a{seed}", self.model, seed=seed) for seed in range(2)]
        self._cache = cache

    def load(self, **settings: Any) -> tuple[Engine, MergeBuilder, list[AdapterRef]]:
        engine = load_engine(self.model, self._cache, **settings)
        merging = MergeBuilder(engine, Outline.read(self.model))
        return engine, merging, [publish(engine, directory) for directory in self.adapters]

    def checkpoint_logprobs(self, root: Path, quantization: str) -> torch.Tensor:
        """Log-probabilities of the exported checkpoint of the first adapter, by transformers."""
        root.mkdir()
        merge(self.model, read_factors(self.adapters[0]), root)
        return peft_logprobs(root, None, quantization, PROMPT)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> World:
    return World(tmp_path_factory.mktemp("merges"), cache_dir)


def rounded(model: Path) -> Path:
    """Round to bf16, as in most checkpoints: a merged checkpoint also rounds embeddings and norms."""
    tensors = {name: tensor.bfloat16().float() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


def build(
    engine: Engine, merging: MergeBuilder, reference: AdapterRef, dtype: MergedDtype = "bf16", prompts: Any = PROMPTS
) -> MergeReport | Done:
    """Merge, with steps in between as in the engine's loop."""
    merging.handle(Merge("m", reference, dtype, prompts))
    while not (replies := merging.take_replies()):
        engine.step()
        if merging.ready:
            merging.run_piece()
    [reply] = replies
    return reply


def built(engine: Engine, merging: MergeBuilder, reference: AdapterRef, dtype: MergedDtype = "bf16") -> MergeReport:
    report = build(engine, merging, reference, dtype)
    assert isinstance(report, MergeReport), report
    return report


def forget(engine: Engine, merging: MergeBuilder, digest: str) -> None:
    """Remove a merge as the engine's loop does."""
    merging.handle(Forget("f", digest))
    engine.forget(Forget("f", digest))


def requests(references: list[AdapterRef]) -> list[Generate]:
    """One on each adapter and one on the base; prompt log-probabilities bypass the prefix cache."""
    names = {"first": references[0], "second": references[1], "base": None}
    return [request(name, PROMPT, ref, max_tokens=6, prompt_logprobs=0) for name, ref in names.items()]


def scores(answer: Any) -> torch.Tensor:
    return torch.tensor([entry.logprob for entry in answer.prompt_logprobs if entry is not None])


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "nf4"])
def test_a_merged_adapter_equals_its_checkpoint_and_others_notice_nothing(
    dtype: MergedDtype, planned: bool, world: World, tmp_path: Path
) -> None:
    engine, merging, references = world.load(planned=planned)
    before = run(engine, requests(references))
    built(engine, merging, references[0], dtype)
    alone = {single.id: run(engine, [single])[single.id] for single in requests(references)}
    mixed = run(engine, requests(references), every=2)
    assert mixed == alone, "a request's output does not depend on the other requests"
    assert {name: mixed[name] for name in ("second", "base")} == {name: before[name] for name in ("second", "base")}

    expected = world.checkpoint_logprobs(tmp_path / "checkpoint", "none" if dtype == "bf16" else "nf4")
    torch.testing.assert_close(scores(mixed["first"]), expected, atol=1e-3, rtol=0)
    assert (scores(mixed["first"]) - scores(before["first"])).abs().max() > 0.01, "the merge must have an effect"
    assert engine.base.digest() == engine.base_digest


def test_the_drift_is_that_of_full_distributions(world: World) -> None:
    engine, merging, references = world.load()
    report = built(engine, merging, references[0], "nf4")
    divergence, agreeing, positions = 0.0, 0, 0
    for prompt in PROMPTS:
        # Top-k over the whole vocabulary.
        whole = {"max_tokens": 0, "prompt_logprobs": engine.base.vocab_size}
        engine.merges._in_force, kept = {}, engine.merges._in_force
        first = run(engine, [request("a", [*prompt, 5], references[0], **whole)])["a"]
        engine.merges._in_force = kept
        second = run(engine, [request("a", [*prompt, 5], references[0], **whole)])["a"]
        for one, other in zip(first.prompt_logprobs[1:], second.prompt_logprobs[1:], strict=True):
            assert one is not None
            assert other is not None
            theirs = dict(other.top)
            divergence += sum(math.exp(logprob) * (logprob - theirs[token]) for token, logprob in one.top)
            agreeing += one.top[0][0] == other.top[0][0]
            positions += 1
    assert report.positions == positions == sum(map(len, PROMPTS))
    assert report.mean_kl == pytest.approx(divergence / positions, rel=1e-3)
    assert report.agreement == agreeing / positions
    assert report.mean_kl > 0
    assert [speed.requests for speed in report.speeds] == [1, 8]
    assert all(speed.adapter > 0 and speed.merged > 0 for speed in report.speeds)


def test_merged_and_unmerged_never_share_keys_and_values(world: World) -> None:
    engine, merging, references = world.load()
    single = request("a", PROMPT, references[0], max_tokens=4)
    cold = run(engine, [single])["a"]
    built(engine, merging, references[0])
    merged = run(engine, [single])["a"]
    assert (merged.cached_tokens, merged.logprobs != cold.logprobs) == (0, True)
    assert run(engine, [single])["a"].cached_tokens == 80
    again = run(engine, [request("b", PROMPT, references[1], max_tokens=4)])["b"]
    assert again.cached_tokens == 0
    merging.handle(Unmerge("u", references[0].digest))
    unmerged = run(engine, [single])["a"]
    assert (unmerged.cached_tokens, unmerged.tokens, unmerged.logprobs) == (80, cold.tokens, cold.logprobs)


@pytest.mark.parametrize("how", ["undone", "forgotten"])
def test_a_request_on_a_removed_merge_finishes_on_it(how: str, world: World) -> None:
    engine, merging, references = world.load()
    built(engine, merging, references[0])
    [key] = engine.merges._merged
    long = request("long", PROMPT, references[0], max_tokens=20)
    expected = run(engine, [long])["long"]
    engine.blocks.reset_cache()
    answer = Answer()
    engine.add(long)
    undo = {
        "undone": lambda: merging.handle(Unmerge("u", references[0].digest)),
        "forgotten": lambda: forget(engine, merging, references[0].digest),
    }[how]
    for step in range(100):
        for output in engine.step()[0]:
            answer.take(output)
        if step == 5:
            undo()
            assert engine.merges.take_reports() == []
            assert key in engine.merges._merged, "a request still uses it"
        if answer.finish_reason is not None:
            break
    assert (answer.tokens, answer.logprobs) == (expected.tokens, expected.logprobs)
    assert not engine.merges._merged
    assert not engine.runner.merged
    merging.handle(Unmerge("u", references[0].digest))
    assert merging.take_replies()[-1] == Done("u", code="merge_not_found")


def test_merging_leaves_nothing_behind(world: World) -> None:
    engine, merging, references = world.load(prefix_caching=False)
    built(engine, merging, references[0])
    engine.add(request("gone", PROMPT, references[0], max_tokens=50))
    engine.step()
    engine.abort("gone")
    assert engine.merges._merged[f"{references[0].digest}/bf16"].references == 0
    forget(engine, merging, references[0].digest)
    assert engine.blocks.counts.free == engine.blocks.num_blocks
    assert all(not rows for rows in engine.pool.resident.values())
    # Cancelled in every stage of the build: rows, blocks and weights are freed.
    for pieces in range(0, 60, 7):
        merging.handle(Merge("m", references[1], "nf4", PROMPTS))
        while engine.adapter_cache.loading:
            engine.step()
        for _ in range(pieces):
            merging.run_piece()
        forget(engine, merging, references[1].digest)
        [reply] = merging.take_replies()
        assert isinstance(reply, Done)
        assert reply.code == "merge_given_up"
        assert engine.blocks.counts.free == engine.blocks.num_blocks
        assert all(not rows for rows in engine.pool.resident.values())
        assert not engine.runner.merged


def test_merged_weights_are_freed_with_the_merge(world: World) -> None:
    engine, merging, references = world.load()
    built(engine, merging, references[0])
    [model] = engine.runner.merged.values()
    weights = [weakref.ref(linear.weight) for linear in model.base.linears]
    del model
    merging.handle(Unmerge("u", references[0].digest))
    gc.collect()
    assert all(weight() is None for weight in weights)


def test_an_order_given_twice_is_carried_out_once(world: World) -> None:
    engine, merging, references = world.load()
    first = built(engine, merging, references[0])
    assert build(engine, merging, references[0]) == first
    assert engine.merges.take_reports() == [first]
    assert engine.merges.take_reports() is None
    other = build(engine, merging, references[0], "nf4")
    assert isinstance(other, Done)
    assert other.code == "merge_exists"
    merging.handle(Merge("one", references[1], "nf4", PROMPTS))
    merging.handle(Merge("two", references[1], "nf4", PROMPTS))
    [reply] = merging.take_replies()
    assert isinstance(reply, Done)
    assert (reply.id, reply.code) == ("two", "merge_busy")


def test_merges_that_cannot_be(world: World, tmp_path: Path, cache_dir: Path) -> None:
    engine, merging, references = world.load(merged_bytes=500_000)
    used = built(engine, merging, references[0], "bf16").bytes
    assert 250_000 < used <= 500_000, "room for one"
    reply = build(engine, merging, references[1], "bf16")
    assert isinstance(reply, Done)
    assert reply.code == "merge_too_large"
    assert "--merged-bytes" in (reply.error or "")
    assert isinstance(build(engine, merging, references[1], "nf4"), MergeReport)

    dora = publish(engine, tiny_adapter(tmp_path / "dora", world.model, use_dora=True))
    reply = build(engine, merging, dora)
    assert isinstance(reply, Done)
    assert reply.code == "unsupported_adapter_feature"

    broken = build(engine, merging, AdapterRef("sha256:" + "0" * 64, str(tmp_path / "nowhere")))
    assert isinstance(broken, Done)
    assert broken.code == "adapter_load_failed"

    odd = World(tmp_path / "odd", cache_dir, hidden_size=80, num_attention_heads=5, num_key_value_heads=1)
    engine, merging, references = odd.load()
    reply = build(engine, merging, references[0], "nf4")
    assert isinstance(reply, Done)
    assert "merge it as bf16" in (reply.error or "")
    assert isinstance(build(engine, merging, references[0], "bf16"), MergeReport)


def test_a_fault_while_merging_ends_the_merge_and_nothing_else(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine, merging, references = world.load()
    monkeypatch.setattr("server.engine.merge_builder.with_weights", lambda *args: 1 / 0)
    reply = build(engine, merging, references[0])
    assert isinstance(reply, Done)
    assert (reply.code, "ZeroDivisionError" in caplog.text) == ("merge_failed", True)
    assert run(engine, requests(references))["first"].error is None


def test_uses_are_told(world: World) -> None:
    engine, merging, references = world.load()
    report = built(engine, merging, references[0])
    engine.add(request("a", PROMPT, references[0], max_tokens=30))
    _, stats = engine.step()
    [use] = [use for use in stats.adapters if use.tier == "merged"]
    assert (use.digest, use.rank, use.running, use.waiting) == (report.digest, 8, 1, 0)
    engine.abort("a")
    merging.handle(Unmerge("u", report.digest))
    _, stats = engine.step()
    assert [use for use in stats.adapters if use.tier == "merged"] == [
        AdapterUse(report.digest, "merged", present=False)
    ]


def test_an_adapter_of_some_modules_merges_those(world: World, tmp_path: Path) -> None:
    engine, merging, _ = world.load()
    partial = tiny_adapter(tmp_path / "partial", world.model, target_modules=["q_proj"], layers_to_transform=[1])
    report = built(engine, merging, publish(engine, partial))
    assert report.bytes == 2 * 64 * 64
    [model] = engine.runner.merged.values()
    other = [new.name for new, old in zip(model.base.linears, engine.base.linears, strict=True) if new is not old]
    assert other == ["model.layers.1.self_attn.q_proj"]
