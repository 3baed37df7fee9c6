"""A request with speculation gets the same output as without: token for token and bit for bit, in any situation."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine import prompt_lookup as speculation
from server.engine.batch import WorkResult, accept
from server.engine.engine import Engine
from server.engine.graphs import DecodeGraphs
from server.engine.sampling import Draw
from server.messages.protocol import AdapterRef, Generate
from tests.support import interpreter
from tests.support.offline import Answer, load_engine, make_resident, publish, request, run, tight_engine
from tests.support.tiny import tiny_adapter


@pytest.fixture(scope="module")
def engine(shallow_dir: Path, cache_dir: Path) -> Engine:
    return load_engine(shallow_dir, cache_dir)


@pytest.fixture(scope="module")
def adapters(engine: Engine, shallow_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterRef]:
    root = tmp_path_factory.mktemp("adapters")
    plain = [publish(engine, tiny_adapter(root / str(i), shallow_dir, seed=i, r=4 * (i + 1))) for i in range(3)]
    return [*plain, publish(engine, tiny_adapter(root / "dora", shallow_dir, seed=9, use_dora=True))]


def repetitive(draw: random.Random, length: int) -> list[int]:
    """A prompt with repetitions."""
    phrases = [[draw.randrange(3, 500) for _ in range(draw.randrange(3, 9))] for _ in range(3)]
    prompt: list[int] = []
    while len(prompt) < length:
        prompt += draw.choice(phrases)
    return prompt[:length]


def workload(adapters: list[AdapterRef], speculative_tokens: int, **sampling: Any) -> list[Generate]:
    """Requests with all kinds of options, on every adapter and the base."""
    count, longest = (6, 16) if interpreter.whole_suite() else (12, 40)
    draw = random.Random(0)
    asked: list[dict[str, Any]] = [
        {},
        {"temperature": 0.4, "top_p": 0.9},
        {"repetition_penalty": 1.2, "presence_penalty": 0.2},
        {"temperature": 0.7, "frequency_penalty": 0.3, "top_k": 20},
        {"stop_token_ids": list(range(3, 40)), "min_tokens": 9},
        {"prompt_logprobs": 1, "logit_bias": {7: 3.0, 8: -3.0}},
    ]
    return [
        request(
            f"r{i}",
            repetitive(draw, draw.randrange(5, 60)),
            [None, *adapters][i % (1 + len(adapters))],
            **{"max_tokens": longest + i, "seed": i, "logprobs": 2, "speculative_tokens": speculative_tokens}
            | asked[i % len(asked)]
            | sampling,
        )
        for i in range(count)
    ]


def drafts(engine: Engine, requests: list[Generate], every: int = 0) -> tuple[dict[str, Answer], int, int]:
    """The answers, and the numbers of drafted and accepted tokens."""
    counted = [0, 0]
    step = engine.step

    def counting() -> Any:
        outputs, stats = step()
        assert sum(output.accepted_tokens for output in outputs) == stats.accepted_tokens
        counted[0] += stats.drafted_tokens
        counted[1] += stats.accepted_tokens
        return outputs, stats

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "step", counting)
        return run(engine, requests, every), counted[0], counted[1]


@pytest.fixture(scope="module")
def expected(engine: Engine, adapters: list[AdapterRef]) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for single in workload(adapters, 0):
        engine.blocks.reset_cache()
        answers |= run(engine, [single])
    return answers


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft as much as allowed, as if all drafts had been accepted so far."""
    monkeypatch.setattr(speculation, "_PRIOR", 1.0)
    monkeypatch.setattr(speculation, "_GAIN", 0.0)


@pytest.mark.parametrize("most", [1, 5])
def test_alone(engine: Engine, adapters: list[AdapterRef], expected: dict[str, Answer], most: int) -> None:
    drafted = accepted = 0
    for single in workload(adapters, most):
        engine.blocks.reset_cache()
        answers, more_drafted, more_accepted = drafts(engine, [single])
        assert answers[single.id] == expected[single.id], single
        drafted, accepted = drafted + more_drafted, accepted + more_accepted
    assert 0.2 * drafted < accepted < drafted


@pytest.mark.usefixtures("eager")
def test_together_and_again_from_the_cache(
    engine: Engine, adapters: list[AdapterRef], expected: dict[str, Answer]
) -> None:
    engine.blocks.reset_cache()
    for _ in range(2):
        answers, drafted, accepted = drafts(engine, workload(adapters, 6), every=2)
        assert 0 < accepted < drafted
        for answer in answers.values():
            answer.cached_tokens = 0
        assert answers == expected
    report = engine.inspect("x")
    assert report.free_blocks + report.cached_blocks == report.num_blocks


@pytest.mark.usefixtures("eager")
def test_beside_those_that_do_not(engine: Engine, adapters: list[AdapterRef], expected: dict[str, Answer]) -> None:
    engine.blocks.reset_cache()
    mixed = [pair[i % 2] for i, pair in enumerate(zip(workload(adapters, 0), workload(adapters, 6), strict=True))]
    answers, drafted, _ = drafts(engine, mixed)
    assert drafted
    assert answers == expected


@pytest.mark.usefixtures("eager")
def test_preempted_and_in_small_chunks(
    engine: Engine, shallow_dir: Path, cache_dir: Path, adapters: list[AdapterRef], expected: dict[str, Answer]
) -> None:
    blocks, longest = (6, 96) if interpreter.whole_suite() else (20, 256)
    tight = tight_engine(engine, shallow_dir, cache_dir, blocks, longest)
    make_resident(tight, adapters)
    preemptions = drafted = 0
    answers = {single.id: Answer() for single in workload(adapters, 6)}
    for single in workload(adapters, 6):
        tight.add(single)
    while not tight.idle:
        outputs, stats = tight.step()
        preemptions += stats.preemptions
        drafted += stats.drafted_tokens
        for output in outputs:
            answers[output.id].take(output)
    assert preemptions
    assert drafted
    assert answers == expected


@pytest.mark.usefixtures("eager")
def test_where_drafts_attend_as_requests_of_their_own(
    engine: Engine, adapters: list[AdapterRef], expected: dict[str, Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under graphs, which are recorded for one token of each request."""
    model, sizes = engine.runner.weights, set()

    class Recorded(DecodeGraphs):
        def run(self, step: Any) -> torch.Tensor | None:
            sizes.add(len(step.ids))
            return model.head(model.hidden(step))

    if model.plan is None:
        pytest.skip("no compiler: no plan")
    graphs = Recorded(lambda step: step.ids, linears=0, max_blocks=1, device=engine.base.device, record=lambda run: run)
    monkeypatch.setattr(model, "graphs", graphs)
    engine.blocks.reset_cache()
    answers, drafted, _ = drafts(engine, workload(adapters, 6))
    assert drafted
    assert max(sizes) > len(expected)
    assert answers == expected


def test_logits_that_are_not_finite_fail_a_request_only_where_they_are_reached(engine: Engine) -> None:
    engine.add(request("x", [5, 6] * 6, speculative_tokens=2))
    step = engine.scheduler.schedule(0.0)
    assert step is not None
    work = replace(step.works[0], drafts=[7, 8])
    for draws, tokens, failed in (
        ([None, 8, 9], [], True),
        ([7, None, 9], [7], False),  # a later step will detect it
        ([6, None, 9], [6], False),
        ([7, 8, 9], [7, 8, 9], False),
    ):
        result = WorkResult()
        accept(work, [Draw(token) for token in draws], result)
        assert (result.tokens, result.failed) == (tokens, failed)
    engine.abort("x")
