"""Reports of adapters in steps: every change once, and no work for unchanged adapters."""

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from adapters.device.host import HostAdapter, host_adapter
from server.engine import engine as engine_module
from server.engine.engine import Engine
from server.engine.runner import Runner
from server.messages.protocol import AdapterRef, AdapterUse
from tests.support.offline import load_engine, request

RESIDENT = 10_000


@pytest.fixture
def engine(model_dir: Path, cache_dir: Path) -> Engine:
    return load_engine(model_dir, cache_dir)


def small(engine: Engine, digest: str) -> HostAdapter:
    linear = engine.base.linears[0]
    pair = torch.zeros(1, linear.in_features), torch.zeros(linear.out_features, 1), 1.0
    return host_adapter(digest, {linear.name: pair}, torch.float32)


class Watched(OrderedDict[str, Any]):
    """Counts the entries read."""

    looks = 0

    def __getitem__(self, key: str) -> Any:
        self.looks += 1
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.looks += 1
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.looks += 1
        return super().get(key, default)

    def __iter__(self) -> Any:
        for key in super().__iter__():
            self.looks += 1
            yield key

    def keys(self) -> Any:
        return list(self)

    def values(self) -> Any:
        return [self[key] for key in self]

    def items(self) -> Any:
        return [(key, self[key]) for key in self]


def test_a_step_looks_at_no_resident_adapter_that_did_not_change(engine: Engine) -> None:
    cache = engine.adapter_cache
    one = small(engine, "")
    for number in range(RESIDENT):
        cache.insert(replace(one, digest=f"sha256:{number}"))
    assert len(engine.step()[1].adapters) == RESIDENT, "news once"
    cache._host, cache._device = Watched(cache._host), Watched(cache._device)
    for _ in range(2):
        assert engine.step()[1].adapters == []
    engine.add(request("a", range(20, 40), AdapterRef("sha256:7", ""), max_tokens=3))
    seen = []
    while not engine.idle:
        seen += engine.step()[1].adapters
    assert seen == [
        AdapterUse("sha256:7", "host", present=False),
        AdapterUse("sha256:7", "device", 1, running=1),
        AdapterUse("sha256:7", "device", 1),
    ]
    assert cache._host.looks + cache._device.looks < 50


def test_every_change_of_tier_and_use_is_told_once(engine: Engine) -> None:
    told: dict[tuple[str, str], AdapterUse] = {}

    def step() -> None:
        for use in engine.step()[1].adapters:
            if use.present:
                assert told.get((use.digest, use.tier)) != use, "not news"
                told[use.digest, use.tier] = use
            else:
                del told[use.digest, use.tier]

    digests = ["sha256:1", "sha256:2"]
    for digest in digests:
        engine.adapter_cache.insert(small(engine, digest))
    engine.add(request("a", range(20, 40), AdapterRef(digests[0], ""), max_tokens=2))
    engine.add(request("b", range(20, 40), AdapterRef(digests[0], ""), max_tokens=4))
    step()
    assert told == {
        (digests[0], "device"): AdapterUse(digests[0], "device", 1, running=2),
        (digests[1], "host"): AdapterUse(digests[1], "host", 1),
    }
    step()
    assert told[digests[0], "device"].running == 1
    engine.abort("b")
    step()
    assert told[digests[0], "device"] == AdapterUse(digests[0], "device", 1)
    for digest in digests:
        engine.adapter_cache.forget(digest)
    step()
    assert told == {}


@pytest.mark.parametrize("depth", [0, 1])
def test_a_steps_time_is_shared_by_tokens(
    model_dir: Path, cache_dir: Path, depth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that advances only while the device computes a step."""
    now, submit = 0.0, Runner.submit

    def submitted(*args: Any) -> Any:
        nonlocal now
        now += 1.0
        return submit(*args)

    monkeypatch.setattr(engine_module, "time", Mock(monotonic=lambda: now))
    monkeypatch.setattr(Runner, "submit", submitted)
    engine = load_engine(model_dir, cache_dir, depth=depth)
    for name, length in (("long", 150), ("short", 10)):  # a step takes 64 tokens
        engine.add(request(name, [20 + n % 30 for n in range(length)], max_tokens=6))
    shares, steps = dict.fromkeys(("long", "short"), 0.0), 0.0
    while not engine.idle:
        outputs, stats = engine.step()
        steps += stats.step_seconds
        for output in outputs:
            shares[output.id] += output.device_seconds
    assert steps == now
    assert sum(shares.values()) == pytest.approx(steps)
    assert shares["long"] > 1.5 * shares["short"] > 0
