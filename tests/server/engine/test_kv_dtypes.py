"""KV caches of fewer bits: more tokens in the same memory, outputs close to the exact ones, and the drift reported."""

from pathlib import Path

import pytest

from server.engine import activations
from server.engine.engine import Engine
from tests.server.engine.test_activations import scores, workload
from tests.support import interpreter
from tests.support.offline import load_engine, publish, run, solo
from tests.support.tiny import tiny_adapter, tiny_model

pytestmark = pytest.mark.skipif(interpreter.whole_suite(), reason="the kernels have tests of their own there")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 64 numbers, so that the scale of an int8 row is small in comparison."""
    return tiny_model(tmp_path_factory.mktemp("wide"), head_dim=64)


def load(model: Path, cache_dir: Path, kept: str, *, planned: bool = True) -> Engine:
    engine = load_engine(model, cache_dir, kv_cache_dtype=kept, planned=planned)
    activations.measure_kv(engine, model)
    return engine


@pytest.mark.parametrize(
    ("kept", "ratio", "most"),
    [("auto", 1, 0), ("bfloat16", 2, 0.03), ("float16", 2, 0.01), ("fp8", 4, 0.8), ("int8", 3.76, 0.1)],
)
def test_it_holds_more_and_says_how_far_answers_are(
    wide: Path, cache_dir: Path, kept: str, ratio: float, most: float
) -> None:
    exact, engine = load_engine(wide, cache_dir), load(wide, cache_dir, kept)
    there, here = exact.ready(), engine.ready()
    assert there.kv_cache is not None
    assert here.kv_cache is not None
    assert here.num_blocks == pytest.approx(ratio * there.num_blocks, rel=0.02)
    assert here.kv_cache.bytes == pytest.approx(4 << 20, rel=0.01)
    (group,), (wider,) = here.kv_cache.groups, there.kv_cache.groups
    assert wider.bytes_per_token / group.bytes_per_token == pytest.approx(ratio, rel=0.01)
    apart = float((scores(engine) - scores(exact)).abs().mean())
    if kept == "auto":
        assert here.kv_cache.drift is None
        assert apart == 0
        return
    drift = here.kv_cache.drift
    assert drift is not None
    assert drift.positions > 100
    assert 0 < drift.mean_kl < most, "this model is random and amplifies small differences"
    assert apart > 0
    report = engine.inspect("x")
    assert report.free_blocks + report.cached_blocks == report.num_blocks, "the measurement freed its blocks"


@pytest.mark.parametrize("kept", ["fp8", "int8"])
def test_outputs_do_not_depend_on_other_requests(model_dir: Path, cache_dir: Path, tmp_path: Path, kept: str) -> None:
    engine = load(model_dir, cache_dir, kept)
    requests = workload(publish(engine, tiny_adapter(tmp_path / "a", model_dir)))
    assert run(engine, requests, every=2) == solo(engine, requests)


def test_our_kernels_and_the_modules_see_the_same_cache(model_dir: Path, cache_dir: Path) -> None:
    planned, modules = (scores(load(model_dir, cache_dir, "int8", planned=planned)) for planned in (True, False))
    assert (planned - modules).abs().max() < 0.05, "only rounding differences"
