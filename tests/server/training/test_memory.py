"""The memory plan compared with the measured use."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from server.engine.engine import Engine
from server.messages.training import MemoryMode, ModuleShape, PlanMemory
from server.training.trainer import Trainer
from tests.support import offline as engines
from tests.support.tiny import tiny_model
from tests.support.training import dataset, job, run, run_until


class Peak(TorchDispatchMode):
    """Counts the bytes of live storages created while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Engine:
    """Wider and deeper than the usual one, so that activations outweigh bookkeeping."""
    directory = tiny_model(
        tmp_path_factory.mktemp("memory"), hidden_size=128, intermediate_size=384, num_hidden_layers=6
    )
    return engines.load_engine(directory, cache_dir)


@pytest.mark.parametrize("memory", ["recompute", "keep"])
def test_predicted_and_measured_agree(memory: MemoryMode, engine: Engine, tmp_path: Path) -> None:
    trainer = Trainer(engine.base)
    data = dataset(6, low=250, high=256)
    start = job(engine.base, tmp_path / "job", data, micro_batch_tokens=1024, batch_size=4, n_epochs=1, memory=memory)
    tokens = max(sum(data.lengths[index] for index in group) for group in [[0, 1, 2, 3]])
    asked = PlanMemory(id="1", modules=start.modules, optimizer="adamw", scale_vector=False, tokens=int(tokens))
    plan = trainer.plan_memory(asked)
    assert plan.mode == "keep"
    gc.collect()
    with Peak() as measured:
        trainer.start(start)
        run_until(trainer, "update")
    predicted = plan.adapter + plan.gradients + plan.activations[memory]
    print(f"{memory}: predicted {predicted / 2**20:.1f} MiB, measured {measured.peak / 2**20:.1f} MiB")
    assert 0.8 * measured.peak <= predicted <= 1.5 * measured.peak
    run(trainer)
    trainer.close()


def test_the_plan_is_arithmetic_over_the_adapter(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(engine.base)
    q = next(linear for linear in engine.base.linears if linear.size.kind == "q_proj")
    shape = {q.name: ModuleShape(2, 1.0)}

    def plan(**changes: Any) -> Any:
        settings: dict[str, Any] = {
            "id": "1", "modules": shape, "optimizer": "adamw", "scale_vector": False, "tokens": 64
        }  # fmt: skip
        return trainer.plan_memory(PlanMemory(**(settings | changes)))

    parameters = 2 * (q.in_features + q.out_features)
    assert (plan().adapter, plan().gradients, plan().optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert plan(optimizer="paged_adamw_8bit").optimizer < 3 * parameters
    assert plan(scale_vector=True).adapter == 4 * (parameters + q.out_features)
    assert plan(tokens=128).activations["recompute"] > plan().activations["recompute"]
    assert plan().activations["keep"] > plan().activations["recompute"]
    assert plan().base > 0
    for available, mode in ((1 << 40, "keep"), (int(plan().total("recompute") * 1.2), "recompute"), (1 << 10, None)):
        monkeypatch.setattr(trainer._memory, "_available", lambda available=available: available)
        assert plan().mode == mode
    trainer.close()
