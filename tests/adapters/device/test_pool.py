"""The pool's segment tables against plain matrix products, through insertions, removals and compactions."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from adapters.device.host import HostAdapter, host_adapter, pack_rows
from adapters.device.lora import LoraLinear, StepSlot
from adapters.device.pool import RowPool, Use
from adapters.peft_format.sizes import LinearSize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


LINEARS = {
    "layers.0.q_proj": LinearSize("q_proj", 8, 12),
    "layers.0.down_proj": LinearSize("down_proj", 16, 8),
    "layers.1.q_proj": LinearSize("q_proj", 8, 12),
    "layers.1.down_proj": LinearSize("down_proj", 16, 8),
}


def make_pool(units: int = 32) -> RowPool:
    return RowPool(LINEARS, {"q_proj": units, "down_proj": units}, torch.device("cpu"))


def modules(seed: int, ranks: dict[str, int]) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, LINEARS[name].in_features, generator=draw),
            torch.randn(LINEARS[name].out_features, rank, generator=draw),
            0.5 + seed,
        )
        for name, rank in ranks.items()
    }


def adapter(seed: int, ranks: dict[str, int], dtype: torch.dtype = torch.float32) -> HostAdapter:
    return host_adapter(f"sha256:{seed}", modules(seed, ranks), dtype)


def delta(pool: RowPool, name: str, uses: list[Use], x: torch.Tensor) -> torch.Tensor:
    size = LINEARS[name]
    linear = LoraLinear(nn.Linear(size.in_features, size.out_features), name, list(LINEARS).index(name), StepSlot())
    deltas = pool.deltas(uses)
    assert deltas is not None
    return deltas.add(linear, x, torch.zeros(len(x), size.out_features))


def expected(seed: int, ranks: dict[str, int], dtype: torch.dtype, name: str, x: torch.Tensor) -> torch.Tensor:
    if name not in ranks:
        return torch.zeros(len(x), LINEARS[name].out_features)
    a, b, scaling = modules(seed, ranks)[name]
    return scaling * (x @ a.to(dtype).float().T) @ b.to(dtype).float().T


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deltas_are_the_adapters_products(dtype: torch.dtype) -> None:
    pool = make_pool()
    ranks = {"layers.0.q_proj": 3, "layers.1.q_proj": 5, "layers.1.down_proj": 1}
    assert pool.insert(adapter(1, ranks, dtype))
    for name, size in LINEARS.items():
        x = torch.randn(6, size.in_features)
        got = delta(pool, name, [Use(1, 4, "sha256:1", 2.0)], x)
        want = torch.zeros(6, size.out_features)
        want[1:4] = 2.0 * expected(1, ranks, dtype, name, x[1:4])
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_several_adapters_on_the_same_tokens_add_up() -> None:
    pool = make_pool()
    ranks = dict.fromkeys(LINEARS, 2)
    for seed in (1, 2):
        pool.insert(adapter(seed, ranks))
    x = torch.randn(5, 8)
    got = delta(pool, "layers.0.q_proj", [Use(0, 5, "sha256:1", 1.0), Use(2, 5, "sha256:2", -0.5)], x)
    want = expected(1, ranks, torch.float32, "layers.0.q_proj", x)
    want[2:] -= 0.5 * expected(2, ranks, torch.float32, "layers.0.q_proj", x[2:])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_kind_that_is_not_touched_costs_nothing() -> None:
    pool = make_pool()
    pool.insert(adapter(1, {"layers.0.q_proj": 4, "layers.1.q_proj": 7}))
    assert pool.resident == {"q_proj": 14, "down_proj": 0}
    assert pool.free == {"q_proj": 18, "down_proj": 32}
    assert pool.units_of("sha256:1") == {"q_proj": 14}


def test_an_adapter_that_does_not_fit_changes_nothing() -> None:
    pool = make_pool(units=12)
    pool.insert(adapter(1, {"layers.0.q_proj": 4}))
    before = [tensor.clone() for tensor in (*pool.a, *pool.b)]
    assert not pool.insert(adapter(2, {"layers.0.q_proj": 3, "layers.0.down_proj": 1}))
    assert "sha256:2" not in pool
    assert pool.free == {"q_proj": 4, "down_proj": 12}
    assert all(torch.equal(old, new) for old, new in zip(before, (*pool.a, *pool.b), strict=True))


def test_a_reservation_that_fails_halfway_gives_everything_back() -> None:
    pool = make_pool(units=12)
    for seed in (1, 2, 3):
        assert pool.insert(adapter(seed, {"layers.0.down_proj": 2}))
    pool.remove("sha256:1")
    pool.remove("sha256:3")
    free = dict(pool.free)
    wide = adapter(4, {"layers.0.q_proj": 2, "layers.0.down_proj": 3})  # 6 of the 8 free units, which lie in gaps of 4
    assert not pool.reserve(wide, compact=False)
    assert "sha256:4" not in pool
    assert pool.free == free, "the rows taken of q_proj are freed"
    assert pool.reserve(wide)


def test_a_fault_while_reserving_gives_everything_back() -> None:
    class OutOfMemory:
        def to(self, device: torch.device) -> None:
            raise MemoryError

    pool = make_pool()
    refused = replace(adapter(1, dict.fromkeys(LINEARS, 2)), extras=cast("Any", OutOfMemory()))
    free = dict(pool.free)
    with pytest.raises(MemoryError):
        pool.reserve(refused)
    assert "sha256:1" not in pool
    assert pool.free == free


def test_compaction_moves_rows_and_keeps_answers_and_addresses() -> None:
    pool = make_pool(units=24)
    addresses = [tensor.data_ptr() for tensor in (*pool.a, *pool.b)]
    everywhere = dict.fromkeys(LINEARS, 4)
    for seed in (1, 2, 3):
        assert pool.insert(adapter(seed, everywhere))
    pool.remove("sha256:2")
    pool.remove("sha256:1")
    wide = dict.fromkeys(LINEARS, 8)
    assert pool.insert(adapter(4, wide)), "16 units are free at 0 and none after 24: number 3 has to move"
    pool.remove("sha256:4")
    assert pool.insert(adapter(5, {"layers.0.q_proj": 1, "layers.0.down_proj": 1}))
    pool.remove("sha256:3")
    assert pool.insert(adapter(6, dict.fromkeys(LINEARS, 11))), "2 + 22 units fit only as one piece"
    for seed, ranks in ((5, {"layers.0.q_proj": 1, "layers.0.down_proj": 1}), (6, dict.fromkeys(LINEARS, 11))):
        for name, size in LINEARS.items():
            x = torch.randn(3, size.in_features)
            got = delta(pool, name, [Use(0, 3, f"sha256:{seed}", 1.0)], x)
            torch.testing.assert_close(got, expected(seed, ranks, torch.float32, name, x), atol=1e-4, rtol=1e-5)
    assert addresses == [tensor.data_ptr() for tensor in (*pool.a, *pool.b)]


def test_compaction_when_only_a_move_makes_room() -> None:
    pool = make_pool(units=16)
    one = {"layers.0.q_proj": 2}
    for seed in range(4):
        assert pool.insert(adapter(seed, one))
    pool.remove("sha256:0")
    pool.remove("sha256:2")
    assert pool.insert(adapter(9, {"layers.0.q_proj": 4})), "two gaps of 4 units become one of 8"
    for seed in (1, 3):
        x = torch.randn(2, 8)
        got = delta(pool, "layers.0.q_proj", [Use(0, 2, f"sha256:{seed}", 1.0)], x)
        torch.testing.assert_close(got, expected(seed, one, torch.float32, "layers.0.q_proj", x))


def test_no_use_no_tables() -> None:
    assert make_pool().deltas([]) is None


def test_tables_are_made_anew_when_uses_or_rows_are_others() -> None:
    pool = make_pool()
    small, large = adapter(1, {"layers.0.q_proj": 2}), adapter(2, {"layers.0.q_proj": 4})
    x = torch.randn(5, 8)
    uses = [Use(0, 5, small.digest, 1.0)]
    assert pool.insert(small)
    tables = pool.deltas(uses)
    assert pool.deltas([*uses]) is tables
    uses[0] = uses[0]._replace(weight=0.5)  # the caller may change its list
    assert pool.deltas(uses) is not tables
    pool.remove(small.digest)
    assert pool.insert(large)  # in the place of the small one
    assert pool.insert(small)
    torch.testing.assert_close(
        delta(pool, "layers.0.q_proj", uses, x),
        0.5 * expected(1, {"layers.0.q_proj": 2}, torch.float32, "layers.0.q_proj", x),
    )
    before = delta(pool, "layers.0.q_proj", uses, x)
    pool.remove(large.digest)
    pool._compact("q_proj")  # the large one moves to the front
    assert torch.equal(delta(pool, "layers.0.q_proj", uses, x), before)


def test_stale_rows_of_another_adapter_are_never_read() -> None:
    pool = make_pool()
    ranks = {"layers.0.q_proj": 8}
    nan = {name: (a * np.nan, b * np.nan, s) for name, (a, b, s) in modules(1, ranks).items()}
    pool.insert(host_adapter("sha256:1", nan, torch.float32))
    pool.remove("sha256:1")
    pool.insert(adapter(2, {"layers.0.q_proj": 3}))
    x = torch.randn(4, 8)
    assert delta(pool, "layers.0.q_proj", [Use(0, 4, "sha256:2", 1.0)], x).isfinite().all()


def test_rows_in_one_piece_of_memory_are_the_same_rows() -> None:
    linears = adapter(1, {"layers.0.q_proj": 3, "layers.1.down_proj": 1}).linears
    memory = torch.zeros(sum(rows.a.numel() + rows.b.numel() for rows in linears.values()), dtype=torch.int16)
    again = pack_rows(linears, memory)
    assert list(again) == list(linears)
    for name, rows in linears.items():
        assert torch.equal(again[name].a, rows.a)
        assert torch.equal(again[name].b, rows.b)
        assert again[name].a.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


@pytest.mark.cuda
def test_rows_are_filled_beside_a_busy_device_and_behind_their_former_owner() -> None:
    pool = RowPool(LINEARS, {"q_proj": 16, "down_proj": 16}, torch.device("cuda"))
    ranks = dict.fromkeys(LINEARS, 8)
    busy = torch.randn(4096, 4096, device="cuda")
    with ThreadPoolExecutor(1) as filler:
        for seed in range(1, 8):
            for _ in range(20):
                busy = busy @ busy / 64
            before = None if seed == 1 else pool.factors(f"sha256:{seed - 1}", "layers.0.q_proj")  # the device reads it
            if seed > 1:
                pool.remove(f"sha256:{seed - 1}")
            given = host_adapter(f"sha256:{seed}", modules(seed, ranks), torch.float32, pin=True)
            assert pool.reserve(given)
            filler.submit(pool.fill, given).result()
            for number, found in ((seed, pool.factors(f"sha256:{seed}", "layers.0.q_proj")), (seed - 1, before)):
                if found is not None:
                    a, b, _ = modules(number, ranks)["layers.0.q_proj"]
                    assert torch.equal(found[0].cpu(), a)
                    assert torch.equal(found[1].cpu(), b)
