"""The self-check passes correct engines, refuses wrong ones, and caches only passes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from adapters.kernels import native
from server.engine import selfcheck
from server.engine.batch import Batch
from server.engine.engine import Engine
from server.engine.runner import ModulesPath, PlannedPath
from server.model.base import UnservableModel
from tests.support.offline import load_engine


@pytest.fixture
def engine(model_dir: Path, cache_dir: Path) -> Engine:
    return load_engine(model_dir, cache_dir)


def test_a_right_engine_passes_once(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selfcheck.run(engine, tmp_path)
    assert len(list((tmp_path / "selfcheck").iterdir())) == 1
    counts = engine.blocks.counts
    assert counts.free == engine.blocks.num_blocks, "nothing is left behind"
    monkeypatch.setattr(selfcheck, "compare", lambda _: pytest.fail("it was remembered"))
    selfcheck.run(engine, tmp_path)


def test_a_cache_that_takes_nothing_is_no_fault_of_the_engine(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(selfcheck, "compare", lambda _: 0.0)
    selfcheck.run(engine, tmp_path / "file")
    assert "the next start repeats it" in caplog.text


def test_without_native_kernels_it_passes_too(model_dir: Path, cache_dir: Path) -> None:
    engine = load_engine(model_dir, cache_dir, planned=False)
    with native.switched_off():
        assert selfcheck.compare(engine) < 1e-4


@pytest.mark.parametrize("fault", ["a norm", "a weight", "nan"])
def test_a_wrong_engine_is_refused(fault: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(run: object) -> object:
        def forward(*args: object, **kwargs: object) -> tuple[torch.Tensor, object]:
            logits, classified = run(*args, **kwargs)  # type: ignore[operator]
            match fault:
                case "a norm":
                    return logits * 1.01, classified
                case "a weight":
                    return logits.roll(1, dims=-1), classified
                case _:
                    return logits * torch.nan, classified

        return forward

    for path in (PlannedPath, ModulesPath):
        monkeypatch.setattr(path, "forward", wrong(path.forward))
    with pytest.raises(UnservableModel, match=r"self-check|disagrees"):
        selfcheck.run(engine, tmp_path)
    assert not (tmp_path / "selfcheck").exists()


@pytest.mark.parametrize("linear", [0, -1])
def test_one_linear_whose_adapter_is_not_as_it_should_be_is_refused(
    linear: int, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = selfcheck._random_adapter

    def otherwise(engine: Engine, folder: Path) -> object:
        adapter, rows = given(engine, folder)
        rows[list(rows)[linear]][1].mul_(1.2)
        return adapter, rows

    monkeypatch.setattr(selfcheck, "_random_adapter", otherwise)
    with pytest.raises(UnservableModel, match="disagrees"):
        selfcheck.run(engine, tmp_path)


@pytest.mark.parametrize("steps", ["decoding", "later chunks", "in company"])
def test_an_engine_that_is_wrong_in_some_steps_only_is_refused(
    steps: str, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong: Callable[[Batch], bool] = {
        "decoding": lambda batch: batch.is_decode,
        "later chunks": lambda batch: not batch.is_decode and batch.works[0].start > 0,
        "in company": lambda batch: len(batch.works) > 1,
    }[steps]
    right = PlannedPath.forward

    def forward(path: PlannedPath, batch: Batch) -> object:
        logits, classified = right(path, batch)
        return logits * (1.01 if wrong(batch) else 1.0), classified

    monkeypatch.setattr(PlannedPath, "forward", forward)
    with pytest.raises(UnservableModel, match="disagrees"):
        selfcheck.run(engine, tmp_path)


@pytest.mark.parametrize("tokens", [1, 2], ids=["decoding", "chunks"])
def test_a_layer_that_attends_twice_in_some_steps_is_refused(
    tokens: int, model_dir: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although its numbers are right, and the step that determines the layers' geometry was a normal one."""
    engine = load_engine(model_dir, cache_dir, planned=False)
    attention = engine.base.decoder.layers[1].self_attn  # type: ignore[index, union-attr]
    assert isinstance(attention, nn.Module)
    once = attention.forward

    def twice(*, hidden_states: torch.Tensor, **step: object) -> object:
        decodes = hidden_states.shape[1] == 2  # one token of each request
        if decodes == (tokens == 1):
            once(hidden_states=hidden_states, **step)
        return once(hidden_states=hidden_states, **step)

    monkeypatch.setattr(attention, "forward", twice)
    with pytest.raises(UnservableModel, match=r"attends 4 times .*, 3 expected, once in each layer"):
        selfcheck.run(engine, tmp_path)
    assert not (tmp_path / "selfcheck").exists()
