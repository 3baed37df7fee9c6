"""The capacity page: its arithmetic equals the server's, and its simulation follows its docstring."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.peft_format.sizes import LinearSize, device_bytes, units_per_row
from loadtest import capacity
from loadtest.synthetic import linear_shapes
from server.model.attention import block_bytes
from server.model.base import load
from server.model.geometry import LayerKV

COST = capacity.Cost(step_seconds=0.003, token_seconds=0.002, prompt_seconds=0.04, load_seconds=0.02)
DEMAND = capacity.Demand(adapters=500, requests_per_client=12)
RESULTS = Path(capacity.__file__).parent / "results"


def _sizes(config: dict[str, Any]) -> dict[str, LinearSize]:
    return {name: LinearSize(name.rpartition(".")[2], *shape) for name, shape in linear_shapes(config).items()}


# --- one GPU -------------------------------------------------------------------------------------------------------


def test_rank_rows_are_the_servers() -> None:
    sizes = _sizes(capacity.LLAMA_8B)
    units = {size.kind: 16 * units_per_row("bfloat16") for size in sizes.values()}
    assert 16 * capacity.row_bytes(capacity.LLAMA_8B) == device_bytes(units, sizes)


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 2), (torch.float8_e4m3fn, 1)])
def test_kv_is_the_servers(dtype: torch.dtype, width: int) -> None:
    layers = [LayerKV(kv_heads=8, head_dim=128, window=0, source=i) for i in range(32)]
    (block,) = block_bytes(layers, 16, dtype)
    assert 16 * capacity.kv_bytes(capacity.LLAMA_8B, width) == block


def test_the_base_is_as_large_as_one_that_is_loaded(model_dir: Path, cache_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    base = load(model_dir, "nf4", "float32", "cpu", cache_dir)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in base.model.parameters()}
    embeddings = config["vocab_size"] * config["hidden_size"]
    # In fp32 the embeddings are twice as large; scales and norms of such a small model are a few kB.
    assert sum(sizes.values()) == pytest.approx(capacity.base_bytes(config) + 2 * embeddings, rel=0.05)


def test_a_card_is_divided_as_the_server_divides_it() -> None:
    found = capacity.gpu(capacity.LLAMA_8B, 80 * capacity.GIB)
    free = found["free"]
    assert found["kv_tokens"]["bfloat16"] * capacity.kv_bytes(capacity.LLAMA_8B, 2) <= 0.7 * free
    assert found["adapters"]["16"] * 16 * capacity.row_bytes(capacity.LLAMA_8B) <= 0.1 * free
    assert found["adapters"]["8"] >= 2 * found["adapters"]["16"]


# --- many replicas -------------------------------------------------------------------------------------------------


def test_one_replica_is_as_fast_as_its_steps() -> None:
    """Every adapter resident and no prompts: sixteen clients, sixteen tokens per step."""
    cost = replace(COST, prompt_seconds=0.0, load_seconds=0.0, device_adapters=500)
    found = capacity.simulate(1, "queue", cost, replace(DEMAND, requests_per_client=60))
    assert found["tokens_per_second"] == pytest.approx(16 / (0.003 + 16 * 0.002), rel=0.05)


def test_the_cost_goes_through_what_was_measured() -> None:
    comparison = json.loads((RESULTS / "2026-11-22-amd-epyc-2-cores.json").read_text())
    cost = capacity.cost_of(comparison, 0.02)
    speeds = [comparison["cells"][case]["lorakeet"]["decode"]["median"] for case in ("one", "eight")]
    assert 1 / (cost.step_seconds + cost.token_seconds) == pytest.approx(speeds[0])
    assert 8 / (cost.step_seconds + 8 * cost.token_seconds) == pytest.approx(speeds[1])
    assert min(cost.step_seconds, cost.token_seconds, cost.prompt_seconds) > 0


def test_every_request_is_answered_once() -> None:
    world = capacity._Simulation(3, "residency", COST, DEMAND)
    world.run()
    assert len(world.finished) == 3 * 16 * 12
    assert all(not replica.requests and not any(replica.held.values()) for replica in world.replicas)
    assert all(len(replica.held) <= COST.device_adapters for replica in world.replicas)
    held = {(adapter, place) for adapter, places in world.holders.items() for place in places}
    assert held == {(adapter, place) for place, one in enumerate(world.replicas) for adapter in one.held}


def test_a_device_full_of_adapters_in_use_lets_others_wait() -> None:
    world = capacity._Simulation(1, "queue", replace(COST, device_adapters=2), DEMAND)
    world.run()
    assert len(world.finished) == 16 * 12


def test_residency_finds_more_adapters_on_the_device() -> None:
    found = {way: capacity.simulate(8, way, COST, DEMAND) for way in capacity.ROUTINGS}
    assert found["residency"]["resident"] > found["queue"]["resident"] + 0.2


def test_where_loads_are_what_limits_residency_is_faster() -> None:
    slow = replace(COST, load_seconds=1.0)
    found = {way: capacity.simulate(8, way, slow, DEMAND) for way in capacity.ROUTINGS}
    assert found["residency"]["tokens_per_second"] > 1.5 * found["queue"]["tokens_per_second"]


def test_a_run_is_repeatable() -> None:
    assert capacity.simulate(2, "residency", COST, DEMAND) == capacity.simulate(2, "residency", COST, DEMAND)


def test_the_page_has_the_committed_figures() -> None:
    file = max(RESULTS.glob("*-capacity.json"))
    result = json.loads(file.read_text())
    page = (RESULTS.parent.parent / "docs/capacity.md").read_text()
    assert file.name in page
    assert all(table in page for table in capacity.markdown(result))
    assert result["gpus"] == {str(size): capacity.gpu(capacity.LLAMA_8B, size * capacity.GIB) for size in (24, 80, 140)}
    words = page.replace(",", " ").split()
    assert {f"{size / capacity.GIB:.2f}" for size in result["gpus"]["24"]["job"].values()} <= set(words)
