"""An engine of depth 1, which submits each step before collecting the last: outputs equal those of depth 0."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from adapters.peft_format.outline import Outline
from server.engine.batch import InFlightStep
from server.engine.engine import Engine
from server.engine.loop import Gaps, Loop
from server.engine.merge_builder import MergeBuilder
from server.engine.offline import ScriptedSocket
from server.engine.sequence import Step
from server.messages.protocol import NON_FINITE, AdapterRef, Generate, Merge
from server.training import bench
from server.training.pacing import Pacer
from server.training.trainer import Trainer
from tests.support import interpreter
from tests.support.offline import Answer, load_engine, make_resident, publish, request, run
from tests.support.tiny import tiny_adapter


class Watched:
    """An engine of depth 1, with the number of steps per request submitted while one of its tokens was pending."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.ahead: Counter[str] = Counter()
        self._submit = engine.runner.submit
        engine.runner.submit = self.submit  # type: ignore[method-assign]

    def submit(self, step: Step, previous: InFlightStep | None = None) -> InFlightStep:
        self.ahead.update(work.sequence.id for work in step.works if work.pending)
        return self._submit(step, previous)


@pytest.fixture(scope="module")
def adapters(shallow_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [tiny_adapter(root / str(rank), shallow_dir, seed=rank, r=rank) for rank in (4, 16)]


# Also on a GPU, a request's tokens must not depend on an ended one that is still computing.


@pytest.fixture
def plain(shallow_dir: Path, cache_dir: Path) -> Engine:
    return load_engine(shallow_dir, cache_dir, deterministic=True, depth=0)


@pytest.fixture
def watched(shallow_dir: Path, cache_dir: Path) -> Watched:
    return Watched(load_engine(shallow_dir, cache_dir, deterministic=True, depth=1))


def workload(references: list[AdapterRef], **sampling: Any) -> list[Generate]:
    """Requests that end one after the other: greedy, sampled, truncated; with and without adapters."""
    draw = random.Random(1)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 1.2, "top_p": 0.8, "seed": 4},
        {"temperature": 0.7, "top_k": 9, "min_p": 0.02, "seed": 5},
    ]
    chosen = [*references, None]
    return [
        request(
            f"r{index}",
            [draw.randrange(3, 500) for _ in range(draw.randrange(4, 40))],
            chosen[index % len(chosen)],
            **{"max_tokens": 4 + 3 * index, "logprobs": None, "prompt_logprobs": 1 if index == 4 else None}
            | kinds[index % len(kinds)]
            | sampling,
        )
        for index in range(4 if interpreter.whole_suite() else 9)
    ]


def test_answers_are_the_same(plain: Engine, watched: Watched, adapters: list[Path]) -> None:
    references = [publish(plain, directory) for directory in adapters]
    expected = run(plain, workload(references), every=2)
    assert run(watched.engine, workload(references), every=2) == expected
    # All tokens but the first of each, even when requests join, end or have their prompts chunked in the meantime.
    assert watched.ahead == {single.id: single.sampling.max_tokens - 1 for single in workload(references)}
    report = watched.engine.inspect("x")
    assert report.free_blocks + report.cached_blocks == report.num_blocks
    for kind, capacity in watched.engine.pool.capacity.items():
        assert report.free_rows[kind] + report.resident_rows[kind] == capacity


def test_the_extra_step_after_a_stop_does_not_change_outputs(plain: Engine, watched: Watched) -> None:
    endless = run(plain, workload([], max_tokens=30))
    stopping = [  # stop at the third token
        replace(single, sampling=replace(single.sampling, stop_token_ids=[endless[single.id].tokens[2]]))
        for single in workload([], max_tokens=30)
    ]
    plain.blocks.reset_cache()
    expected = run(plain, stopping)
    answers = run(watched.engine, stopping)
    assert answers == expected
    assert {answer.finish_reason for answer in answers.values()} == {"stop"}
    assert all(watched.ahead[name] == 3 for name in answers)  # two to get the third token, and one for nothing
    # The cache it leaves is intact: the same prompts, extended by these tokens, continue as without the stop.
    longer = [replace(single, prompt=[*single.prompt, *answers[single.id].tokens]) for single in workload([])]
    plain.blocks.reset_cache()
    fresh = run(plain, longer)
    again = run(watched.engine, longer)
    assert any(answer.cached_tokens for answer in again.values())
    assert {name: again[name].tokens for name in again} == {name: fresh[name].tokens for name in fresh}


@pytest.mark.parametrize(
    "sampling",
    [
        {"logprobs": 2},
        {"prompt_logprobs": 1},
        {"logit_bias": {7: 2.0}},
        {"min_tokens": 3, "ignore_eos": False},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.3},
        {"speculative_tokens": 3},
    ],
)
def test_options_of_one_request_do_not_delay_others(plain: Engine, watched: Watched, sampling: dict[str, Any]) -> None:
    asking = [
        replace(single, sampling=replace(single.sampling, **sampling)) if index % 2 else single
        for index, single in enumerate(workload([]))
    ]
    expected = run(plain, asking)
    assert run(watched.engine, asking) == expected
    waits = sampling.keys() & {"frequency_penalty", "repetition_penalty", "speculative_tokens"}
    for index, single in enumerate(asking):
        assert watched.ahead[single.id] == (0 if waits and index % 2 else single.sampling.max_tokens - 1)


def test_a_training_job_does_not_delay_requests(watched: Watched, shallow_dir: Path, tmp_path: Path) -> None:
    engine = watched.engine
    trainer = Trainer(engine.base)
    settings = {"batch_size": 1, "length": 16, "rank": 4, "micro_batch_tokens": 64, "memory": "recompute"}
    bench.random_data(settings, engine.base.vocab_size).save(tmp_path / bench.DATA)
    gaps = Gaps([(trainer, Pacer(1.0, 0.9))])
    gaps.handle(bench.endless_job("1", tmp_path, engine.base, settings))
    pieces, run_piece = 0, trainer.run_piece

    def counted() -> float:
        nonlocal pieces
        pieces += engine.busy
        return run_piece()

    trainer.run_piece = counted  # type: ignore[method-assign]
    sent = [request(name, [5, 6, 7], max_tokens=12, logprobs=None) for name in "ab"]
    Loop(engine, gaps, ScriptedSocket([(0.0, single) for single in sent])).run()
    assert pieces
    assert watched.ahead == {"a": 11, "b": 11}


def test_merged_weights_do_not_delay_requests(shallow_dir: Path, cache_dir: Path, adapters: list[Path]) -> None:
    """Neither during the build nor while requests run on them."""
    answers = []
    for depth in (0, 1):
        watched = Watched(load_engine(shallow_dir, cache_dir, deterministic=True, depth=depth))
        engine = watched.engine
        references = [publish(engine, directory) for directory in adapters]
        make_resident(engine, references[:1])
        watched.ahead.clear()
        merging = MergeBuilder(engine, Outline.read(shallow_dir))
        merging.handle(Merge("m", references[0], "bf16", [[5, 6, 7, 8]]))
        engine.add(request("meanwhile", [5, 6, 7], max_tokens=1000, logprobs=None))
        while not merging.take_replies():
            engine.step()
            if merging.ready:
                engine.wait()
                merging.run_piece()
        assert not engine.idle
        assert watched.ahead["meanwhile"] > 10 or not depth
        engine.abort("meanwhile")
        watched.ahead.clear()
        answers.append(run(engine, workload(references)))
        expected = {single.id: single.sampling.max_tokens - 1 for single in workload(references)} if depth else {}
        assert watched.ahead == expected
    assert answers[0] == answers[1]


def test_aborted_under_way(plain: Engine, watched: Watched) -> None:
    expected = run(plain, workload([]))
    engine = watched.engine
    answers = {single.id: Answer() for single in workload([])}
    for single in workload([]):
        engine.add(single)
    had = None
    while not engine.idle:
        for output in engine.step()[0]:
            answers[output.id].take(output)
        if watched.ahead["r1"] and had is None:  # a step is in flight
            had = len(answers["r1"].tokens)
            engine.abort("r1")
            engine.add(request("r1", [9, 8, 7], max_tokens=2, logprobs=None))  # the id is free at once
    assert had is not None
    assert len(answers["r1"].tokens) == had + 2
    assert answers["r1"].finish_reason == "length"
    for name in expected.keys() - {"r1"}:
        assert answers[name] == expected[name]


def test_all_aborted_under_way(watched: Watched) -> None:
    engine = watched.engine
    engine.add(request("a", [5, 6], max_tokens=20, logprobs=None))
    engine.step()
    engine.step()
    assert watched.ahead == {"a": 1}
    engine.abort("a")
    assert engine.busy  # the device is busy
    assert engine.step()[0] == []
    assert engine.idle
    assert not engine.blocks.counts.used
    assert len(run(engine, [request("b", [5, 6], max_tokens=3, logprobs=None)])["b"].tokens) == 3


def test_logits_that_are_not_finite(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end their sequence, whose next token was already in flight; the others continue."""
    engine = watched.engine
    for name in ("a", "b"):
        engine.add(request(name, [5, 6, 7], max_tokens=8, logprobs=None))
    engine.runner.weights.graphs = None  # a recording would not compute hidden states again
    hidden, calls = engine.runner.weights.hidden, 0

    def poisoned(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        states = hidden(*arguments)
        if calls == 3:
            states[0] = torch.nan
        return states

    monkeypatch.setattr(engine.runner.weights, "hidden", poisoned)
    answers = {"a": Answer(), "b": Answer()}
    while not engine.idle:
        for output in engine.step()[0]:
            answers[output.id].take(output)
    assert answers["a"].code == NON_FINITE
    assert len(answers["a"].tokens) == 2
    assert answers["b"].error is None
    assert len(answers["b"].tokens) == 8
    assert watched.ahead["b"] == 7


def test_newcomers_do_not_wait_for_others_to_end(watched: Watched) -> None:
    engine = watched.engine
    engine.add(request("a", [5, 6, 7], max_tokens=50, logprobs=None))
    for _ in range(4):
        engine.step()
    engine.add(request("b", [5, 6, 7], max_tokens=1, logprobs=None))
    engine.step()  # collects the step submitted before the new request
    assert "b" in {output.id for output in engine.step()[0]}


@pytest.mark.cuda
@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"logprobs": 2, "prompt_logprobs": 1},
        {"logit_bias": {7: 2.0}, "min_tokens": 3},
        {"frequency_penalty": 0.5, "repetition_penalty": 1.2},
    ],
)
def test_a_gpu_is_given_steps_without_waiting(
    shallow_dir: Path, cache_dir: Path, adapters: list[Path], sampling: dict[str, Any]
) -> None:
    watched = Watched(load_engine(shallow_dir, cache_dir, device="cuda"))
    references = [publish(watched.engine, directory) for directory in adapters]
    run(watched.engine, workload(references, **sampling))  # compiles everything
    submit = watched._submit

    def strict(step: Step, previous: InFlightStep | None = None) -> InFlightStep:
        torch.cuda.set_sync_debug_mode("error" if previous is not None else "default")
        try:
            return submit(step, previous)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    watched._submit = strict
    watched.ahead.clear()
    watched.engine.blocks.reset_cache()
    run(watched.engine, workload(references, **sampling))
    assert watched.ahead or "frequency_penalty" in sampling
