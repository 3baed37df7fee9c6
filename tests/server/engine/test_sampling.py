"""Sampling compared with a plain float64 implementation of the same rules, and for independence of other rows."""

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from adapters.kernels import native
from server.engine import sampling
from server.engine.sampling import Draw, Logprobs, Row, uniform
from server.messages.protocol import Sampling

EOS = 0


def sample(logits: torch.Tensor, rows: Sequence[Row], eos_token_ids: Sequence[int] = ()) -> list[Draw]:
    return sampling.sample(logits, rows, eos_token_ids).draws()


def row(tokens: list[int] | None = None, num_prompt: int = 0, allowed: torch.Tensor | None = None, **kw: Any) -> Row:
    return Row(Sampling(**kw), tokens or [], num_prompt, allowed)


def one(logits: torch.Tensor, row: Row) -> int | None:
    return sample(logits[None], [row], [EOS])[0].token


def packed(vocabulary: int, allowed: list[int]) -> torch.Tensor:
    words = [0] * -(-vocabulary // 32)
    for token in allowed:
        words[token // 32] |= 1 << (token % 32)
    return torch.tensor([word - 2**32 if word >= 2**31 else word for word in words], dtype=torch.int32)


@pytest.fixture(autouse=True, params=["native", "torch"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """C++ if it can be compiled, and plain torch."""
    with native.switched_off() if request.param == "torch" else contextlib.nullcontext():
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Make torch split reductions over threads, on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


# --- the reference -----------------------------------------------------------------------------------


def reference(logits: list[float], row: Row, allowed: list[int] | None) -> list[float] | None:
    """The distribution of the next token, by sorting, in float64; None where float32 may differ."""
    sampling, output = row.sampling, row.tokens[row.num_prompt :]
    scores = list(logits)
    for token in range(len(scores)):
        if allowed is not None and token not in allowed:
            scores[token] = -math.inf
        stops = token in sampling.stop_token_ids or (token == EOS and not sampling.ignore_eos)
        if len(output) < sampling.min_tokens and stops:
            scores[token] = -math.inf
        scores[token] += sampling.logit_bias.get(token, 0.0)
        if token in row.tokens:
            penalty = sampling.repetition_penalty
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        scores[token] -= sampling.frequency_penalty * output.count(token)
        scores[token] -= sampling.presence_penalty * (token in output)
    peak = max(scores)
    if peak == -math.inf:
        return None  # no token is allowed
    if sampling.temperature == 0 or sampling.top_p == 0:
        return [float(score > peak - 1e-5) for score in scores]  # float32 may see a difference between equals
    weights = [math.exp((score - peak) / sampling.temperature) for score in scores]
    weights = [weight if weight >= sampling.min_p else 0.0 for weight in weights]
    if 0 < sampling.top_k < len(weights):
        kth = sorted(weights, reverse=True)[sampling.top_k - 1]
        if any(0 < abs(weight - kth) < 1e-5 * kth for weight in weights):
            return None
        weights = [weight if weight >= kth else 0.0 for weight in weights]
    if sampling.top_p < 1:
        goal, reach, least = sampling.top_p * sum(weights), 0.0, 0.0
        for weight in sorted(weights, reverse=True):
            if abs(reach - goal) < 1e-5 * goal:
                return None
            if reach >= goal:
                break
            reach, least = reach + weight, weight
        if any(0 < abs(weight - least) < 1e-5 * least for weight in weights):
            return None
        weights = [weight if weight >= least else 0.0 for weight in weights]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("seed", range(12))
def test_a_token_is_where_the_reference_says(seed: int) -> None:
    """The draw inverts the distribution in order of token id, at the row's own random number."""
    rng = random.Random(seed)
    judged = 0
    for _ in range(60):
        vocabulary = rng.choice([3, 40, 128, 300])
        logits = torch.tensor([rng.gauss(0, 1) for _ in range(vocabulary)]) * rng.choice([0.3, 2.0, 8.0])
        if rng.random() < 0.3:
            logits = logits.round()  # many equal logits
        ids = range(vocabulary)
        tokens = rng.choices(ids, k=rng.randrange(8))
        allowed = rng.sample(ids, rng.randint(1, vocabulary)) if rng.random() < 0.3 else None
        settings: dict[str, Any] = {
            "temperature": rng.choice([0.0, 0.3, 1.0, 2.0]),
            "top_k": rng.choice([0, 0, 0, 1, 20, 1000]),
            "top_p": rng.choice([1.0, 1.0, 0.99, 0.6, 0.05, 0.0]),
            "min_p": rng.choice([0.0, 0.0, 0.04, 0.5]),
            "presence_penalty": rng.choice([0.0, 0.0, 0.75, -1.5]),
            "frequency_penalty": rng.choice([0.0, 0.0, 0.75, -1.5]),
            "repetition_penalty": rng.choice([1.0, 1.0, 1.5, 0.5]),
            "logit_bias": {token: rng.choice([-100.0, -1.0, 2.5]) for token in rng.choices(ids, k=rng.randrange(3))},
            "min_tokens": rng.randrange(4),
            "stop_token_ids": rng.choices(ids, k=rng.randrange(2)),
            "ignore_eos": rng.random() < 0.5,
        }
        history = (tokens, rng.randint(0, len(tokens)), None if allowed is None else packed(vocabulary, allowed))
        rows = [row(*history, seed=rng.getrandbits(64), **settings) for _ in range(20)]
        shares = reference(logits.tolist(), rows[0], allowed)
        if shares is None:
            continue
        judged += 1
        for subject, draw in zip(rows, sample(logits.expand(20, -1), rows, [EOS]), strict=True):
            assert draw.token is not None
            assert shares[draw.token] > 0
            if not subject.greedy:
                below, u = sum(shares[: draw.token]), uniform(subject.sampling.seed, subject.position)
                assert below - 1e-5 <= u <= below + shares[draw.token] + 1e-5
    assert judged > 40


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999])
def test_a_nucleus_wider_than_the_first_guess(top_p: float) -> None:
    """Thousands of tokens of similar weight: kept ones are drawn about equally often, all others never."""
    logits = torch.linspace(0.0, -1.0, 4000)[torch.randperm(4000, generator=torch.Generator().manual_seed(0))]
    rows = [row(seed=seed, top_p=top_p) for seed in range(2000)]
    drawn = [draw.token for draw in sample(logits.expand(2000, -1), rows)]
    shares = logits.double().softmax(-1)
    ranked = shares.sort(descending=True).values
    least = ranked[int((ranked.cumsum(-1) < top_p).sum())]
    assert all(shares[token] >= least * (1 - 1e-6) for token in drawn)
    assert min(float(shares[token]) for token in drawn) < least * 1.01


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_the_draws_follow_the_distribution(vary: str) -> None:
    """Chi-square over 20,000 draws; fixed randomness, so it either always passes or never."""
    logits = torch.linspace(-2.0, 2.0, 20)
    count = 20_000
    if vary == "seed":
        rows = [row(seed=seed, temperature=1.3) for seed in range(count)]
    else:
        tokens = [1] * count
        rows = [Row(Sampling(seed=7, temperature=1.3), tokens[:position], 0) for position in range(0, count, 10)]
    drawn = torch.tensor([draw.token for draw in sample(logits.expand(len(rows), -1), rows)])
    expected = (logits / 1.3).softmax(-1) * len(rows)
    observed = drawn.bincount(minlength=20)
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert statistic < 43.8  # the 99.9th percentile at 19 degrees of freedom


def test_random_numbers_are_the_same_everywhere() -> None:
    pinned = [0.0564663990004608, 0.44008326622012284, 0.6487508310490744, 0.9318107580365629]
    assert [uniform(*key) for key in [(0, 0), (0, 1), (1, 0), (2**64 - 1, 5)]] == pinned
    assert uniform(-1, 5) == uniform(2**64 - 1, 5)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
def test_the_ends_of_the_range_draw_possible_tokens(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "uniform", lambda seed, position: u)
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(3)) * 30
    for row_, draw in zip(logits, sample(logits, [row(top_k=7)] * 64), strict=True):
        assert draw.token in row_.topk(7).indices.tolist()


# --- independence of other rows -----------------------------------------------------------------------


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("vocabulary", [257, 4096, 50257])
def test_a_rows_result_does_not_depend_on_other_rows(vocabulary: int) -> None:
    """Tokens and log-probabilities are bit-equal alone, in any batch and at any position in it."""
    generator = torch.Generator().manual_seed(vocabulary)
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_k": 300},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.01},
        {"top_p": 0.95, "top_k": 64, "min_p": 0.001},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.5},
        {"logit_bias": {3: 4.0}, "min_tokens": 9},
    ]
    rows = [row([5, 6, 7, 7], 2, seed=seed, logprobs=seed % 4, **kw) for seed, kw in enumerate(settings)]
    logits = torch.randn(len(rows), vocabulary, generator=generator) * 3
    alone = [sample(logits[index : index + 1], [rows[index]], [EOS])[0] for index in range(len(rows))]
    for size in range(2, len(rows) + 1):
        order = torch.randperm(len(rows), generator=generator)[:size].tolist()
        assert sample(logits[order], [rows[index] for index in order], [EOS]) == [alone[index] for index in order]


def test_the_logits_are_left_as_they_are() -> None:
    logits = torch.randn(2, 50)
    before = logits.clone()
    sample(
        logits, [row([1], logit_bias={1: 5.0}, presence_penalty=1.0, min_tokens=3, top_p=0.5, logprobs=2)] * 2, [EOS]
    )
    assert torch.equal(logits, before)


def test_no_rows() -> None:
    assert sample(torch.empty(0, 50), []) == []


# --- greedy, masks, faults ------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [5, 1000, 60_000])
def test_greedy_takes_the_first_of_equals(vocabulary: int) -> None:
    logits = torch.zeros(vocabulary)
    logits[[3, vocabulary - 1]] = 2.0
    assert one(logits, row(temperature=0.0)) == 3
    assert one(logits, row(temperature=1e-6)) == 3


def test_the_smallest_temperature_that_draws_cannot_overflow() -> None:
    logits = torch.tensor([1e30, -3e38, 3e38])
    assert one(logits, row(temperature=1e-5)) == 2


def test_greedy_and_drawn_rows_mix() -> None:
    logits = torch.tensor([[0.0, 9.0, 1.0]] * 4)
    rows = [row(temperature=0.0), row(logit_bias={2: 100.0}), row(temperature=0.0, logit_bias={0: 100.0}), row(top_k=1)]
    assert [draw.token for draw in sample(logits, rows)] == [1, 2, 0, 1]


def test_stop_tokens_are_impossible_before_min_tokens() -> None:
    logits = torch.tensor([9.0, 8.0, 7.0])
    early, late = [1], [1, 1]
    for tokens, expected in [(early, 2), (late, 0)]:
        assert one(logits, row(tokens, temperature=0.0, min_tokens=2, stop_token_ids=[1])) == expected
    assert one(logits, row(early, temperature=0.0, min_tokens=2, ignore_eos=True)) == EOS


def seconds(work: Callable[[], object]) -> float:
    """Processor time of the best of three runs."""
    tries = []
    for _ in range(3):
        before = time.thread_time()
        work()
        tries.append(time.thread_time() - before)
    return min(tries)


@pytest.mark.parametrize(
    "every", [{"logit_bias": dict.fromkeys(range(20_000), 1.0)}, {"stop_token_ids": [*range(20_000)], "min_tokens": 9}]
)
def test_fields_that_name_the_whole_vocabulary_cost_a_step_little(every: dict[str, Any]) -> None:
    logits = torch.randn(32, 20_001)
    rows = [row(**every, temperature=0.0)] * 32
    draws = sample(logits, rows)  # fill the caches
    # Compared with one pass over all of them on the same machine; undisturbed, the best time is a third of that bound.
    assert seconds(lambda: sample(logits, rows)) < 6 * seconds(lambda: torch.tensor([[*range(20_000)]] * 32))
    if "min_tokens" in every:
        assert {draw.token for draw in draws} == {20_000}


def test_penalties_do_not_see_what_they_should_not() -> None:
    """Presence and frequency consider only the output; repetition also the prompt."""
    logits = torch.tensor([1.0, 1.1, 0.9])
    assert one(logits, row([1], 1, temperature=0.0, presence_penalty=2.0)) == 1
    assert one(logits, row([1], 0, temperature=0.0, presence_penalty=2.0)) == 0
    assert one(logits, row([1], 1, temperature=0.0, repetition_penalty=2.0)) == 0
    assert one(logits, row([], 0, temperature=0.0, repetition_penalty=2.0, frequency_penalty=1.0)) == 1


def test_repetition_makes_any_logit_smaller() -> None:
    """Dividing a negative logit would do the opposite."""
    assert one(torch.tensor([-1.0, -1.5]), row([0], 1, temperature=0.0, repetition_penalty=2.0)) == 1
    assert one(torch.tensor([3.0, 2.0]), row([0], 1, temperature=0.0, repetition_penalty=2.0)) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_mask_is_obeyed(temperature: float) -> None:
    logits = torch.randn(70, generator=torch.Generator().manual_seed(0))
    allowed = [31, 63, 69]
    rows = [row(allowed=packed(70, allowed), seed=seed, temperature=temperature) for seed in range(50)]
    drawn = {draw.token for draw in sample(logits.expand(51, -1), [*rows, row(temperature=0.0)])[:50]}
    assert drawn == ({max(allowed, key=lambda token: float(logits[token]))} if temperature == 0 else set(allowed))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_fails_alone(temperature: float, fault: float) -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    rows = [row(seed=seed, temperature=temperature, top_p=0.9, logprobs=2) for seed in range(3)]
    healthy = sample(logits, rows)
    logits[1, 250] = fault
    first, second, third = sample(logits, rows)
    assert (first, third) == (healthy[0], healthy[2])
    assert (second.token, second.logprob) == (None, None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_allowed_tokens_fails_alone(temperature: float) -> None:
    logits = torch.zeros(2, 40)
    nothing = row(allowed=packed(40, []), temperature=temperature)
    assert [draw.token is None for draw in sample(logits, [nothing, row()])] == [True, False]


# --- log-probabilities ------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_untouched_logits() -> None:
    logits = torch.randn(3, 9000, generator=torch.Generator().manual_seed(1)) * 4
    rows = [
        row([1], seed=1, logprobs=3, logit_bias={7: 100.0}, temperature=0.2),
        row(seed=2),
        row(seed=3, logprobs=0),
    ]
    draws = sample(logits, rows)
    expected = logits.double().log_softmax(-1)
    assert draws[1].logprob is None
    for index in (0, 2):
        got = draws[index].logprob
        assert got is not None
        assert got.token == draws[index].token
        assert got.logprob == pytest.approx(float(expected[index, got.token]), abs=1e-6)
        assert got.rank == 1 + int((logits[index] > logits[index, got.token]).sum())
    assert draws[0].token == 7
    assert draws[0].logprob is not None
    assert draws[2].logprob is not None
    assert draws[2].logprob.top == []
    values, ids = expected[0].topk(3)
    assert [token for token, _ in draws[0].logprob.top] == ids.tolist()
    assert [value for _, value in draws[0].logprob.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_equal_alternatives_come_in_order_of_id() -> None:
    logits = torch.zeros(1, 300)
    logits[0, 200] = 1.0
    (got,) = Logprobs(logits, torch.tensor([5]), [4]).read()
    assert [token for token, _ in got.top] == [200, 0, 1, 2]
    assert got.rank == 2


def test_more_alternatives_than_tokens() -> None:
    (got,) = Logprobs(torch.tensor([[0.0, 1.0]]), torch.tensor([1]), [20]).read()
    assert [token for token, _ in got.top] == [1, 0]
    assert math.fsum(math.exp(value) for _, value in got.top) == pytest.approx(1.0)


def test_many_rows_are_scored_slice_by_slice() -> None:
    """The rows of a whole prompt, each with its own number of alternatives."""
    logits = torch.randn(40, 20_000, generator=torch.Generator().manual_seed(2))
    tokens = torch.arange(40)
    got = Logprobs(logits, tokens, [index % 3 for index in range(40)]).read()
    expected = logits.double().log_softmax(-1)[range(40), range(40)]
    assert [line.logprob for line in got] == pytest.approx(expected.tolist(), abs=1e-6)
    assert [len(line.top) for line in got] == [index % 3 for index in range(40)]
