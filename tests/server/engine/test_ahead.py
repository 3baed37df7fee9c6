"""A step given to the device before the one before it was looked at: nobody can tell from the answers."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from server.engine.engine import Engine
from server.engine.runner import Flight
from server.engine.sequence import Step
from server.messages.protocol import NON_FINITE, AdapterRef, Generate
from tests.support import interpreter
from tests.support.offline import Answer, load_engine, publish, request, run
from tests.support.tiny import tiny_adapter


class Ahead:
    """An engine told to run ahead, and how often it did."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        engine._runs_ahead = True
        self.steps = self.followed = 0
        self._submit = engine.runner.submit
        engine.runner.submit = self.submit  # type: ignore[method-assign]

    def submit(self, step: Step, before: Flight | None = None) -> Flight:
        self.steps += 1
        self.followed += before is not None
        return self._submit(step, before)


@pytest.fixture(scope="module")
def adapters(shallow_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [tiny_adapter(root / str(rank), shallow_dir, seed=rank, r=rank) for rank in (4, 16)]


# On a GPU too a request's tokens must not depend on the one that has ended and still computes.


@pytest.fixture
def plain(shallow_dir: Path, cache_dir: Path) -> Engine:
    engine = load_engine(shallow_dir, cache_dir, deterministic=True)
    engine._runs_ahead = False
    return engine


@pytest.fixture
def ahead(shallow_dir: Path, cache_dir: Path) -> Ahead:
    return Ahead(load_engine(shallow_dir, cache_dir, deterministic=True))


def workload(references: list[AdapterRef], **sampling: Any) -> list[Generate]:
    """Requests that end one after the other: greedy, drawn, truncated; with adapters and without."""
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


def test_answers_are_the_same(plain: Engine, ahead: Ahead, adapters: list[Path]) -> None:
    references = [publish(plain, directory) for directory in adapters]
    expected = run(plain, workload(references), every=2)
    assert run(ahead.engine, workload(references), every=2) == expected
    assert ahead.followed > ahead.steps / 2
    report = ahead.engine.inspect("x")
    assert report.free_blocks + report.cached_blocks == report.num_blocks
    for kind, capacity in ahead.engine.pool.capacity.items():
        assert report.free_rows[kind] + report.resident_rows[kind] == capacity


def test_one_that_stops_has_run_once_too_often_and_nobody_sees_it(plain: Engine, ahead: Ahead) -> None:
    endless = run(plain, workload([], max_tokens=30))
    stopping = [  # with the third of the tokens that they would give
        replace(single, sampling=replace(single.sampling, stop_token_ids=[endless[single.id].tokens[2]]))
        for single in workload([], max_tokens=30)
    ]
    plain.blocks.reset_cache()
    expected = run(plain, stopping)
    answers = run(ahead.engine, stopping)
    assert answers == expected
    assert {answer.finish_reason for answer in answers.values()} == {"stop"}
    assert ahead.followed
    # What it left in the cache is whole: the same prompts, continued from there, go on as they would have.
    longer = [replace(single, prompt=[*single.prompt, *answers[single.id].tokens]) for single in workload([])]
    plain.blocks.reset_cache()
    fresh = run(plain, longer)
    again = run(ahead.engine, longer)
    assert any(answer.cached_tokens for answer in again.values())
    assert {name: again[name].tokens for name in again} == {name: fresh[name].tokens for name in fresh}


@pytest.mark.parametrize(
    "sampling",
    [
        {"logprobs": 2},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.3},
        {"logit_bias": {7: 2.0}},
        {"speculative_tokens": 3},
    ],
)
def test_who_must_be_waited_for_is_waited_for(plain: Engine, ahead: Ahead, sampling: dict[str, Any]) -> None:
    expected = run(plain, workload([], **sampling))
    assert run(ahead.engine, workload([], **sampling)) == expected
    assert not ahead.followed


def test_aborted_under_way(plain: Engine, ahead: Ahead) -> None:
    expected = run(plain, workload([]))
    engine = ahead.engine
    answers = {single.id: Answer() for single in workload([])}
    for single in workload([]):
        engine.add(single)
    had = None
    while not engine.idle:
        for output in engine.step()[0]:
            answers[output.id].take(output)
        if ahead.followed and had is None:  # one is under way
            had = len(answers["r1"].tokens)
            engine.abort("r1")
            engine.add(request("r1", [9, 8, 7], max_tokens=2, logprobs=None))  # the name is free at once
    assert had is not None
    assert len(answers["r1"].tokens) == had + 2
    assert answers["r1"].finish_reason == "length"
    for name in expected.keys() - {"r1"}:
        assert answers[name] == expected[name]


def test_all_aborted_under_way(ahead: Ahead) -> None:
    engine = ahead.engine
    engine.add(request("a", [5, 6], max_tokens=20, logprobs=None))
    engine.step()
    assert ahead.followed == 1
    engine.abort("a")
    assert engine.idle
    assert engine.step()[0] == []
    assert len(run(engine, [request("b", [5, 6], max_tokens=3, logprobs=None)])["b"].tokens) == 3


def test_logits_that_are_not_finite(ahead: Ahead, monkeypatch: pytest.MonkeyPatch) -> None:
    """They end their sequence, whose next token was already on its way; the others go on."""
    engine = ahead.engine
    for name in ("a", "b"):
        engine.add(request(name, [5, 6, 7], max_tokens=8, logprobs=None))
    hidden, calls = engine.runner._hidden, 0

    def poisoned(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        states = hidden(*arguments)
        if calls == 3:
            states[0] = torch.nan
        return states

    monkeypatch.setattr(engine.runner, "_hidden", poisoned)
    answers = {"a": Answer(), "b": Answer()}
    while not engine.idle:
        for output in engine.step()[0]:
            answers[output.id].take(output)
    assert answers["a"].code == NON_FINITE
    assert len(answers["a"].tokens) == 2
    assert answers["b"].error is None
    assert len(answers["b"].tokens) == 8
    assert ahead.followed >= 6


def test_newcomers_do_not_wait_for_others_to_end(ahead: Ahead) -> None:
    engine = ahead.engine
    engine.add(request("a", [5, 6, 7], max_tokens=50, logprobs=None))
    for _ in range(4):
        engine.step()
    engine.add(request("b", [5, 6, 7], max_tokens=1, logprobs=None))
    engine.step()  # the one under way
    assert "b" in {output.id for output in engine.step()[0]}


def test_told_not_to_it_does_not(ahead: Ahead) -> None:
    engine = ahead.engine
    engine.add(request("a", [5, 6, 7], max_tokens=5, logprobs=None))
    for _ in range(5):
        engine.step(ahead=False)
    assert engine.idle
    assert not ahead.followed


@pytest.mark.cuda
def test_a_gpu_is_given_the_next_step_without_waiting(shallow_dir: Path, cache_dir: Path, adapters: list[Path]) -> None:
    ahead = Ahead(load_engine(shallow_dir, cache_dir, device="cuda"))
    references = [publish(ahead.engine, directory) for directory in adapters]
    run(ahead.engine, workload(references))  # everything is compiled
    submit = ahead._submit

    def watched(step: Step, before: Flight | None = None) -> Flight:
        torch.cuda.set_sync_debug_mode("error" if before is not None else "default")
        try:
            return submit(step, before)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    ahead._submit = watched
    ahead.followed = 0
    ahead.engine.blocks.reset_cache()
    run(ahead.engine, workload(references))
    assert ahead.followed
