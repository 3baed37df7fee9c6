"""The engine's JSON-lines runner: full lengths, adapters with effect, times that increase."""

import io
import json
import random
import sys
from pathlib import Path

import pytest

from server.engine import offline
from server.engine.engine import Engine
from server.messages.protocol import EngineConfig
from tests.support import interpreter
from tests.support.offline import load_engine
from tests.support.tiny import tiny_adapter


@pytest.fixture
def adapter(model_dir: Path, tmp_path: Path) -> Path:
    return tiny_adapter(tmp_path / "adapter", model_dir, seed=1, r=4)


def test_bursts_run_to_their_full_length(
    model_dir: Path, cache_dir: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    prompt = [draw.randrange(3, 500) for _ in range(9)]
    settings = {"model": str(model_dir), "cache_dir": str(cache_dir), "adapters": {"a": str(adapter)}}
    burst = {"prompts": [prompt] * 3, "tokens": 8, "adapters": [None, "a", None]}
    lines = "\n".join(json.dumps(line) for line in (settings, burst, burst | {"tokens": 1}))
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    offline.main()
    ready, first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready == {"ready": True}
    assert [len(answer["tokens"]) for answer in first] == [8, 8, 8]
    assert first[0]["tokens"] == first[2]["tokens"] != first[1]["tokens"]
    for answer in first:
        assert len(answer["times"]) == 8
        assert answer["times"] == sorted(answer["times"])
    assert [answer["tokens"] for answer in second] == [answer["tokens"][:1] for answer in first]


def test_a_failing_request_is_an_error(model_dir: Path, cache_dir: Path) -> None:
    engine = load_engine(model_dir, cache_dir)
    impossible = {"prompts": [[5] * (engine.max_model_len + 1)], "tokens": 1, "adapters": [None]}
    with pytest.raises(RuntimeError, match=r".+"):
        bench_of(engine).run(impossible, {})


def bench_of(engine: Engine) -> offline.Bench:
    return offline.Bench(engine, EngineConfig(address="", model=str(engine.base.model.name_or_path), cache_dir=""))


def test_requests_come_when_they_are_due(model_dir: Path, cache_dir: Path) -> None:
    pause = 5.0 if interpreter.whole_suite() else 0.2  # longer than the first needs
    burst = {"prompts": [[5, 6], [7, 8]], "tokens": [3, 1], "adapters": [None, None], "at": [pause, 0.0]}
    late, early = bench_of(load_engine(model_dir, cache_dir)).run(burst, {})
    assert [len(late["tokens"]), len(early["tokens"])] == [3, 1]
    assert late["sent"] == pytest.approx(early["sent"] + pause)
    assert early["times"][0] < late["sent"] <= late["times"][0]


def test_a_job_trains_in_the_gaps_and_is_watched(model_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    bench = bench_of(load_engine(model_dir, cache_dir))
    job = {"batch_size": 2, "length": 8, "micro_batch_tokens": 16, "memory": "recompute", "rank": 2}
    bench.start_job(job, tmp_path)
    seconds = 20.0 if interpreter.whole_suite() else 0.5  # enough for a step
    watched = bench.watch(seconds)
    assert watched["tokens"] > 0
    assert watched["tokens"] % 16 == 0
    assert watched["seconds"] >= seconds
    bench.run({"prompts": [[5, 6]], "tokens": 40, "adapters": [None]}, {})
    assert bench.watch(0.0)["seconds"] > 0
