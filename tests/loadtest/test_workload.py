"""The statistics of random arrivals, lengths and popularity. Seeds are fixed, bounds are 5 sigma or wider."""

from pathlib import Path

import numpy as np
import pytest

from loadtest import scenario as sc
from loadtest import workload


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    count, rate = 40_000, 5.0
    times = workload.arrival_times(sc.Open(rate=rate, requests=count, burstiness=burstiness), rng())
    gaps = np.diff(times)
    assert times[0] == 0
    assert (gaps >= 0).all()
    variation = gaps.std() / gaps.mean()  # of a gamma variable: 1 / sqrt(shape)
    assert gaps.mean() == pytest.approx(1 / rate, rel=0.05)
    assert variation == pytest.approx(burstiness**-0.5, rel=0.05)


def test_poisson_arrivals_have_exponential_gaps() -> None:
    gaps = np.diff(workload.arrival_times(sc.Open(rate=2.0, requests=40_000), rng()))
    for seconds in (0.1, 0.5, 1.5):
        assert (gaps > seconds).mean() == pytest.approx(np.exp(-2.0 * seconds), abs=0.015)


def test_uniform_lengths_reach_both_ends() -> None:
    lengths = workload.request_lengths(sc.Uniform(prompt=(8, 10), output=(1, 2)), 3000, rng())
    prompts, outputs = zip(*lengths, strict=True)
    assert {p: pytest.approx(prompts.count(p) / 3000, abs=0.05) for p in (8, 9, 10)} == dict.fromkeys((8, 9, 10), 1 / 3)
    assert set(outputs) == {1, 2}


def test_trace_lengths_repeat_in_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("prompt,output\n3,4\n5,6\n")
    assert workload.request_lengths(sc.TraceFile(file=str(path)), 3, rng()) == [(3, 4), (5, 6), (3, 4)]


@pytest.mark.parametrize(
    "content", ["", "prompt,output\n", "prompt\n3\n", "prompt,output\n3,x\n", "prompt,output\n3,0\n"]
)
def test_bad_traces_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(content)
    with pytest.raises(sc.ScenarioError, match=r"trace\.csv"):
        workload.read_trace(path)


def shares(law: sc.Zipf | sc.Power | sc.UniformChoice, adapters: int) -> np.ndarray:
    chosen = workload.popularity(law, 100_000, adapters, rng())
    assert chosen.min() >= 0
    assert chosen.max() < adapters
    return np.bincount(chosen, minlength=adapters) / 100_000


def test_popularity_laws() -> None:
    assert workload.popularity(sc.Identical(), 3, 4, rng()).tolist() == [0, 0, 0]
    assert workload.popularity(sc.Distinct(), 5, 3, rng()).tolist() == [0, 1, 2, 0, 1]
    assert shares(sc.UniformChoice(), 5) == pytest.approx(np.full(5, 0.2), abs=0.01)

    ranks = np.arange(1, 9)
    assert shares(sc.Zipf(a=1.2), 8) == pytest.approx(ranks**-1.2 / (ranks**-1.2).sum(), abs=0.01)

    # The power law's distribution function is x ** a on [0, 1]: adapter k holds ((k+1)/n) ** a - (k/n) ** a.
    edges = np.arange(9) / 8
    assert shares(sc.Power(a=0.3), 8) == pytest.approx(np.diff(edges**0.3), abs=0.01)
    assert shares(sc.Power(a=1.0), 8) == pytest.approx(np.full(8, 1 / 8), abs=0.01)


def scenario(**changes: object) -> sc.Scenario:
    values = {
        "name": "x",
        "load": sc.Open(rate=3.0, requests=20),
        "lengths": sc.Uniform(prompt=(4, 9), output=(1, 5)),
        "adapters": sc.Adapters(popularity=sc.UniformChoice()),
    }
    return sc.Scenario(**(values | changes))  # type: ignore[arg-type]


def test_a_plan_follows_from_its_seed() -> None:
    names = ["a", "b", "c"]
    first = workload.plan(scenario(), names)
    assert first == workload.plan(scenario(), names)
    assert first != workload.plan(scenario(seed=1), names)
    assert {request.adapter for request in first} == set(names)
    assert all(100 <= token <= 10_000 for request in first for token in request.prompt)
    # Another popularity leaves arrivals, lengths and prompts unchanged.
    other = workload.plan(scenario(adapters=sc.Adapters(popularity=sc.Identical())), names)
    assert [(r.at, r.prompt, r.output_tokens) for r in other] == [(r.at, r.prompt, r.output_tokens) for r in first]


def test_without_adapters_requests_go_to_the_base() -> None:
    assert {request.adapter for request in workload.plan(scenario(), [])} == {None}
