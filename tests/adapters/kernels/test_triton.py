"""The Triton kernels: on a GPU if there is one, else in Triton's interpreter on small shapes.

Errors are relative, in the Frobenius norm, against float64: 2e-6 with fp32 activations, and the dtype's own rounding of
factors and results with bf16 (1.6e-2: the interpreter truncates, 2^-7 at each of two roundings) and fp16 (1.5e-3).
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear4bit, Params4bit
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters.kernels import ExpertWeights, QuantizedWeight, native, reference, triton
from tests.adapters.kernels.test_attention import Requests
from tests.adapters.kernels.test_lora import Pool, problems
from tests.adapters.kernels.test_recurrence import CUT, LAYERS, TOKENS, WHOLE
from tests.support.interpreter import DEVICE

pytestmark = pytest.mark.usefixtures("triton_kernels")

ERRORS = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 1.5e-3}
dtypes = st.sampled_from(list(ERRORS))


def budget(examples: int) -> settings:
    """Without shrinking, which would take the interpreter minutes."""
    return settings(
        max_examples=examples,
        deadline=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@pytest.fixture
def kernels(triton_kernels: None) -> Any:
    return triton.load()


@pytest.fixture(autouse=True)
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Create tensors on the device, and work in tiles as on a GPU."""
    monkeypatch.setattr(triton, "_use_gpu_tiles", True)
    with torch.device(DEVICE):
        yield


def error(actual: Tensor, exact: Tensor) -> float:
    assert actual.shape == exact.shape
    return ((actual.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)).item()


def near(actual: Tensor, exact: Tensor) -> bool:
    return error(actual, exact) < ERRORS[actual.dtype]


# --- linear -------------------------------------------------------------------------------------


def make_weight(outs: int, ins: int, kind: str = "nf4", nested: bool = True, blocksize: int = 64) -> QuantizedWeight:
    linear = Linear4bit(ins, outs, bias=False, device="cpu")
    dense = torch.randn(outs, ins).cpu() * ins**-0.5
    linear.weight = Params4bit(
        dense, requires_grad=False, quant_type=kind, compress_statistics=nested, blocksize=blocksize, module=linear
    )
    return QuantizedWeight.from_linear(linear.to(DEVICE))


def product(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ weight.dequantize(torch.float32).double().T
    return y if bias is None else y + bias


def check_linear(data: st.DataObject, most_out: int, most_chunks: int) -> None:
    from adapters.kernels.triton import linear

    outs, chunks = data.draw(st.integers(8, most_out)), data.draw(st.integers(1, most_chunks))
    blocksize = data.draw(st.sampled_from([size for size in (64, 128, 256) if chunks * 64 % size == 0]))
    kind, nested, dtype = data.draw(st.sampled_from(["nf4", "fp4"])), data.draw(st.booleans()), data.draw(dtypes)
    weight = make_weight(outs, 64 * chunks, kind, nested, blocksize)
    x = torch.randn(data.draw(st.just(1) | st.integers(2, 64)), 64 * chunks).to(dtype)
    bias = data.draw(st.sampled_from([None, torch.randn(outs).to(dtype)]))
    tiles = data.draw(st.sampled_from([linear._ONE_ROW, linear._FEW_ROWS, linear._MORE_ROWS]))
    tiles = tiles._replace(splits=data.draw(st.sampled_from([1, 2, tiles.splits])))
    assert near(linear.linear_by_tiles(x, weight, bias, tiles), product(x, weight, bias))


@given(data=st.data())
@budget(6)
def test_linear(data: st.DataObject) -> None:
    check_linear(data, 70, 4)


@pytest.mark.slow
@pytest.mark.timeout(900)
@given(data=st.data())
@budget(150)
def test_linear_widely(data: st.DataObject) -> None:
    check_linear(data, 300, 20)


@pytest.mark.parametrize("rows", [0, 3, 65])
def test_linear_forward_takes_any_number_of_rows(kernels: Any, rows: int) -> None:
    weight = make_weight(40, 128)
    x = torch.randn(rows, 128)
    assert near(kernels.linear_forward(x, weight), product(x, weight))


def test_weights_that_are_no_whole_chunks_go_another_way(kernels: Any) -> None:
    weight = make_weight(24, 96)
    x = torch.randn(5, 96)
    assert near(kernels.linear_forward(x, weight), product(x, weight))


def test_split_sums_leave_the_counters_at_zero(kernels: Any) -> None:
    from adapters.kernels.triton import linear

    weight = make_weight(48, 512)
    x = torch.randn(2, 512)
    first, second = (linear.linear_by_tiles(x, weight, None, linear.Tiles(16, 1, 8, 2, 2)) for _ in range(2))
    assert torch.equal(first, second)
    assert not linear._arrival_counters(x.device).any()


def permute_bytes(first: int, second: int, selector: int) -> int:
    """`prmt.b32` of PTX, for selectors without sign bits."""
    choice = first.to_bytes(4, "little") + second.to_bytes(4, "little")
    return int.from_bytes(bytes(choice[selector >> 4 * i & 7] for i in range(4)), "little")


def execute(program: str, word: int) -> list[int]:
    """The results of a few instructions of PTX."""
    registers = {"$4": word}
    operations: dict[str, Callable[..., int]] = {
        "and": operator.and_,
        "or": operator.or_,
        "shr": operator.rshift,
        "prmt": permute_bytes,
    }
    for line in program.strip("{} ").split(";")[1:-1]:
        name, _, operands = line.strip().partition(" ")
        target, *given = operands.split(", ")
        numbers = [registers[operand] if operand in registers else int(operand, 0) for operand in given]
        registers[target] = operations[name.split(".")[0]](*numbers)
    return [registers[f"${i}"] for i in range(4)]


def test_nibbles_are_looked_up_among_any_values() -> None:
    from adapters.kernels.triton import linear

    values = [0x1100 * i + 17 * (15 - i) for i in range(16)]
    program = linear.lookup_asm([value - 2**16 if value >= 2**15 else value for value in values])
    for low in range(256):
        given = bytes([low, (low + 77) % 256, 255 - low, low ^ 0x5A])
        high, low_nibbles = ([byte >> 4 for byte in given], [byte & 15 for byte in given])
        words = execute(program, int.from_bytes(given, "little"))
        found = [word >> shift & 0xFFFF for word in words for shift in (0, 16)]
        assert found == [values[nibble] for nibble in high + low_nibbles]


# --- experts ------------------------------------------------------------------------------------


def make_experts(count: int, outs: int, ins: int, kind: str = "nf4") -> ExpertWeights:
    dense = (torch.randn(outs, ins) * ins**-0.5 for _ in range(count))
    return ExpertWeights.quantize(dense, kind, torch.float32)


@given(data=st.data())
@budget(5)
def test_experts(kernels: Any, data: st.DataObject) -> None:
    counts = torch.tensor(data.draw(st.lists(st.sampled_from([0, 0, 1, 2, 17]), min_size=1, max_size=5).filter(any)))
    outs, ins, dtype = data.draw(st.integers(8, 70)), 64 * data.draw(st.integers(1, 4)), data.draw(dtypes)
    weights = make_experts(len(counts), outs, ins, data.draw(st.sampled_from(["nf4", "fp4"])))
    x = torch.randn(int(counts.sum()), ins).to(dtype)
    parts = enumerate(x.split(counts.tolist()))
    exact = torch.cat([product(part, weights[expert]) for expert, part in parts])
    assert near(kernels.grouped_forward(x, weights, counts), exact)


def test_many_rows_of_few_experts(kernels: Any) -> None:
    weights, counts = make_experts(2, 24, 64), torch.tensor([70, 3])
    x = torch.randn(73, 64)
    assert near(kernels.grouped_forward(x, weights, counts), reference.grouped_forward(x, weights, counts).double())


@pytest.mark.parametrize(("kind", "ins"), [("nf4", 96), ("int8", 64), ("none", 64)])
def test_experts_that_are_no_whole_chunks_go_another_way(kernels: Any, kind: str, ins: int) -> None:
    weights, counts = make_experts(3, 24, ins, kind), torch.tensor([2, 0, 1])
    x = torch.randn(3, ins)
    assert near(kernels.grouped_forward(x, weights, counts), reference.grouped_forward(x, weights, counts).double())


def test_how_experts_are_launched_depends_on_no_routing(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are never read on the host, since that would wait for the device."""
    weights, counts = make_experts(3, 24, 64), torch.tensor([2, 0, 1])
    x = torch.randn(3, 64)
    expected = reference.grouped_forward(x, weights, counts)
    for name in ("tolist", "item", "__int__", "__bool__"):
        monkeypatch.setattr(Tensor, name, None)
    found = kernels.grouped_forward(x, weights, counts)
    monkeypatch.undo()
    assert near(found, expected.double())


# --- states -------------------------------------------------------------------------------------


SMALL = ("convolution", "Mamba-2")  # the many tiles of the others would take the interpreter too long


def several(runs: list[list[int]]) -> Tensor:
    """Runs of two sequences: the given ones, and one token in a slot of its own."""
    return torch.tensor([*runs, [TOKENS - 1, TOKENS, 5, 5]], dtype=torch.int32)


@pytest.mark.parametrize("name", LAYERS)
def test_states(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_use_gpu_tiles", name in SMALL)
    layer, states = LAYERS[name]()
    states = torch.cat([states, torch.randn_like(states[:1])])
    whole, cut, exact = states.clone(), states.clone(), states.clone()
    with triton.switched_off(), native.switched_off():
        expected = layer(exact, several([[0, TOKENS - 1, 0, 1]]))
    ours = layer(whole, several([[0, TOKENS - 1, 0, 1]]))
    assert near(ours, expected.double())
    assert near(whole[[1, 5]], exact[[1, 5]].double())
    assert torch.equal(layer(cut, several([[*run[:1], min(run[1], TOKENS - 1), *run[2:]] for run in CUT[:-1]])), ours)
    assert torch.equal(cut[[4, 5]], whole[[1, 5]])
    assert torch.equal(cut[0], exact[0]), "the state before the first token is unchanged"


@pytest.mark.parametrize("name", LAYERS)
def test_states_of_numbers_of_fewer_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_use_gpu_tiles", name in SMALL)
    layer, states = LAYERS[name](torch.bfloat16)
    runs = torch.tensor(WHOLE, dtype=torch.int32)
    exact = states.clone()
    ours = layer(states, runs)
    with triton.switched_off():
        expected = layer(exact, runs)
    assert ours.dtype == torch.bfloat16
    assert near(ours, expected.double())


# --- adapters -----------------------------------------------------------------------------------


def check_lora(kernels: Any, problem: tuple[int, int, int, Any], dtype: torch.dtype) -> None:
    from adapters.kernels.triton import lora

    tokens, ins, outs, segments = problem
    pool = Pool(segments, ins, outs)
    x, y = torch.randn(tokens, ins).to(dtype), torch.randn(tokens, outs).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        if 4 < tokens <= 64:  # one program for each token would take the interpreter too long
            patch.setattr(lora, "_tiles", lambda tokens: lora.Tiles(tokens=16, ranks=16, ins=128, outs=64))
        # On a GPU bf16 activations meet fp32 rows as tf32 numbers, which is still finer than the activations' dtype.
        assert near(pool.add(kernels, y, x), pool.expected(y, x))


@given(problem=problems(), dtype=dtypes)
@budget(8)
def test_lora(kernels: Any, problem: tuple[int, int, int, Any], dtype: torch.dtype) -> None:
    check_lora(kernels, problem, dtype)


@pytest.mark.slow
@pytest.mark.timeout(900)
@given(problem=problems((0, 1, 16, 33, 64, 200, 512), 40), dtype=dtypes)
@budget(100)
def test_lora_widely(kernels: Any, problem: tuple[int, int, int, Any], dtype: torch.dtype) -> None:
    check_lora(kernels, problem, dtype)


@pytest.mark.parametrize("tokens", [3, 70])
def test_lora_of_every_rank_there_is(kernels: Any, tokens: int) -> None:
    check_lora(kernels, (tokens, 600, 30, [(0, tokens, 512, 1, 0.5), (1, 2, 33, 0, 1.0)]), torch.float32)


def test_lora_in_pieces_of_the_table(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapters.kernels.triton import lora

    monkeypatch.setattr(lora, "SCRATCH", 1)
    check_lora(kernels, (9, 40, 40, [(0, 5, 4, 0, 1.0), (2, 9, 3, 1, -1.0), (2, 9, 0, 1, 1.0)]), torch.float32)


@pytest.mark.parametrize("scratch", [64 << 20, 1])
def test_lora_of_linears_that_share_their_input(kernels: Any, scratch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With different widths, and ranks that differ between the linears."""
    from adapters.kernels.triton import lora

    monkeypatch.setattr(lora, "SCRATCH", scratch)
    pools = [
        Pool([(0, 5, 4, 0, 1.0), (2, 9, 3, 1, -1.0)], 200, 90),
        Pool([(0, 5, 0, 0, 1.0), (2, 9, 3, 1, -1.0)], 200, 20),
        Pool([(0, 5, 17, 0, 1.0), (2, 9, 0, 1, -1.0)], 200, 70),
    ]
    x = torch.randn(9, 200)
    for count in (2, 3):
        taken = pools[:count]
        ys = [torch.randn(9, pool.b.shape[1]) for pool in taken]
        expected = [pool.expected(y, x) for pool, y in zip(taken, ys, strict=True)]
        table, scale = (torch.stack([getattr(pool, name) for pool in taken]) for name in ("table", "scale"))
        kernels.lora_add_several_(ys, x, [pool.a for pool in taken], [pool.b for pool in taken], table, scale)
        assert all(near(y, exact) for y, exact in zip(ys, expected, strict=True))


def test_lora_without_segments_changes_nothing(kernels: Any) -> None:
    pool = Pool([(0, 0, 4, 0, 1.0), (1, 3, 0, 0, 1.0)], 16, 16)
    x, y = torch.randn(4, 16), torch.randn(4, 16)
    assert torch.equal(pool.add(kernels, y, x), y)


# --- attention ----------------------------------------------------------------------------------


class TypedRequests(Requests):
    """Requests whose queries and cache have a given dtype."""

    def __init__(self, kernels: Any, dtype: torch.dtype, *shape: Any) -> None:
        super().__init__(kernels, *shape)
        self.q, self.k, self.v = ([states.to(dtype) for states in kind] for kind in (self.q, self.k, self.v))
        self.k_cache, self.v_cache = self.k_cache.to(dtype), self.v_cache.to(dtype)


def check_attention(kernels: Any, data: st.DataObject, most: int) -> None:
    dtype = data.draw(dtypes)
    lengths = data.draw(st.lists(st.integers(1, most), min_size=1, max_size=3))
    kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 3), (1, 7), (2, 4), (1, 20)]))
    dim = data.draw(st.sampled_from([64, 80, 96, 128, 192, 256]))
    requests = TypedRequests(kernels, dtype, lengths, kv_heads * group, kv_heads, dim, 16)
    window = data.draw(st.sampled_from([0, 1, 30, 100]))
    firsts = [data.draw(st.integers(max(0, n - 40), n - 1)) for n in lengths]
    sinks = torch.randn(kv_heads * group) if data.draw(st.booleans()) else None
    more: dict[str, Any] = {"softcap": data.draw(st.sampled_from([0.0, 3.0])), "sinks": sinks}
    spans = [(r, firsts[r], n) for r, n in enumerate(lengths)]
    outs = requests.attend(spans, window, data.draw(st.integers(0, 2)), **more)
    for request, out in enumerate(outs):
        assert near(out, requests.expected(request, window, **more)[firsts[request] :])


@given(data=st.data())
@budget(7)
def test_attention(kernels: Any, data: st.DataObject) -> None:
    check_attention(kernels, data, 150)


@pytest.mark.slow
@pytest.mark.timeout(900)
@given(data=st.data())
@budget(50)
def test_attention_widely(kernels: Any, data: st.DataObject) -> None:
    check_attention(kernels, data, 400)


def test_attention_joins_split_keys(kernels: Any) -> None:
    requests = Requests(kernels, [700, 3], 2, 1, 16, 16)
    outs = requests.attend([(0, 699, 700), (1, 2, 3)], padding=1)
    for request, out in enumerate(outs):
        assert near(out, requests.expected(request)[-1:])
    (windowed,) = requests.attend([(0, 699, 700)], window=90)
    assert near(windowed, requests.expected(0, 90)[-1:])
    more: dict[str, Any] = {"softcap": 1.5, "sinks": torch.tensor([2.0, -1.0])}
    (capped,) = requests.attend([(0, 699, 700)], window=90, **more)
    assert near(capped, requests.expected(0, 90, **more)[-1:])


@pytest.mark.parametrize("kept", [torch.float16, torch.float8_e4m3fn, torch.int8])
def test_attention_over_caches_of_fewer_bits(kernels: Any, kept: torch.dtype) -> None:
    requests = Requests(kernels, [70, 3], 4, 2, 24, 16, kept)
    outs = requests.attend([(0, 60, 70), (1, 0, 3)], window=40)
    assert near(outs[0], requests.expected(0, 40)[60:])
    assert near(outs[1], requests.expected(1, 40))
    states = torch.cat([torch.randn(8, 2, 24) * 300, torch.randn(8, 2, 24) * 0.01, torch.zeros(1, 2, 24)])
    states[0, 0, :3] = torch.tensor([448.0, 464.0, 3 * 2**-10])
    cache = reference.cache_rows(torch.zeros(2, 2, 16, 24), kept)
    kernels.write_kv(states, states, cache, cache.clone(), torch.arange(17))
    found = reference.cache_numbers(cache.transpose(1, 2).flatten(0, 1)[:17])
    assert torch.equal(found, reference.cache_numbers(reference.cache_rows(states, kept)))


def test_attention_of_padding_alone_reads_nothing_before_its_requests(kernels: Any) -> None:
    """A graph is recorded with a step of padding only: every request starts beyond the last token."""
    tokens = 16
    before = torch.tensor([[0, tokens, 48]] * 3, dtype=torch.int32)  # stale content here must not count as requests
    seqs = torch.cat([before, torch.tensor([[tokens, tokens, 0]] * tokens, dtype=torch.int32)])[3:]
    cache = torch.randn(4, 2, 16, 16)
    out = kernels.paged_attention(
        torch.randn(tokens, 4, 16), cache, cache, seqs, torch.ones(tokens, 3, dtype=torch.int32), 0.25
    )
    assert not out.any()


def test_attention_with_scores_far_apart(kernels: Any) -> None:
    requests = Requests(kernels, [130], 2, 1, 16, 16)
    requests.q[0] *= 200.0
    assert error(requests.attend([(0, 100, 130)])[0], requests.expected(0)[100:]) < 1e-4


# --- elementwise --------------------------------------------------------------------------------


@given(rows=st.integers(1, 5), width=st.integers(8, 200), dtype=dtypes)
@budget(15)
def test_norms(kernels: Any, rows: int, width: int, dtype: torch.dtype) -> None:
    x, delta, weight = (torch.randn(*shape).to(dtype) for shape in ((rows, width), (rows, width), (width,)))
    assert near(kernels.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    hidden = x.clone()
    normed = kernels.add_rms_norm_(hidden, delta, weight, 1e-5)
    assert near(hidden, x + delta)
    assert near(normed, reference.rms_norm(x + delta, weight, 1e-5))


@given(rows=st.integers(1, 3), width=st.integers(8, 1500), dtype=dtypes)
@budget(10)
def test_silu_mul(kernels: Any, rows: int, width: int, dtype: torch.dtype) -> None:
    gate, up = (torch.randn(rows, width).to(dtype) for _ in range(2))
    assert near(kernels.silu_mul(gate, up), F.silu(gate.double()) * up.double())


@given(tokens=st.integers(1, 4), heads=st.integers(1, 9), kv_heads=st.integers(1, 3), dtype=dtypes, data=st.data())
@budget(10)
def test_rope(kernels: Any, tokens: int, heads: int, kv_heads: int, dtype: torch.dtype, data: st.DataObject) -> None:
    dim, rotary = data.draw(st.sampled_from([(64, 64), (80, 80), (128, 32)]))
    q, k = torch.randn(tokens, heads, dim).to(dtype), torch.randn(tokens, kv_heads, dim).to(dtype)
    cos, sin = torch.randn(tokens, rotary), torch.randn(tokens, rotary)
    exact_q, exact_k = q.double(), k.double()
    reference.rope_(exact_q, exact_k, cos.double(), sin.double())
    kernels.rope_(q, k, cos, sin)
    assert near(q, exact_q)
    assert near(k, exact_k)


# --- invariance ---------------------------------------------------------------------------------


def test_rows_do_not_depend_on_the_batch_when_tiles_are_fixed(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_fixed", True)
    weight = make_weight(40, 512)
    x, y = torch.randn(70, 512), torch.randn(70, 40)
    pool = Pool([(0, 70, 5, 1, 1.0)], 512, 40)
    together, adapted = kernels.linear_forward(x, weight), pool.add(kernels, y, x)
    for first, last in ((0, 1), (3, 9), (5, 70)):
        assert torch.equal(kernels.linear_forward(x[first:last], weight), together[first:last])
        pool.table[0, 1] = last - first
        assert torch.equal(pool.add(kernels, y[first:last], x[first:last]), adapted[first:last])


def test_rows_of_experts_do_not_depend_on_the_batch_when_tiles_are_fixed(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "_fixed", True)
    weights, counts = make_experts(3, 40, 128), torch.tensor([2, 0, 18])
    x = torch.randn(20, 128)
    together = kernels.grouped_forward(x, weights, counts)
    for first, last, own in ((0, 1, [1, 0, 0]), (1, 4, [1, 0, 2]), (19, 20, [0, 0, 1])):
        assert torch.equal(kernels.grouped_forward(x[first:last], weights, torch.tensor(own)), together[first:last])


def test_library_products_keep_their_bits_when_tiles_are_fixed(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_fixed", True)
    dense = QuantizedWeight("dense", torch.randn(40, 96).bfloat16(), (40, 96))
    odd = make_weight(24, 96)  # not whole chunks
    for weight, dtype in ((dense, torch.bfloat16), (odd, torch.float32)):
        x, bias = torch.randn(130, 96).to(dtype), torch.randn(weight.shape[0]).to(dtype)
        together = kernels.linear_forward(x, weight, bias)
        assert near(together, product(x, weight, bias))
        for first, last in ((0, 1), (60, 70), (3, 130)):
            assert torch.equal(kernels.linear_forward(x[first:last], weight, bias), together[first:last])


def test_overlapping_segments_are_rounded_once_in_any_batch(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table too large for scratch memory is processed in pieces; no result's bits depend on it."""
    from adapters.kernels.triton import lora

    monkeypatch.setattr(triton, "_fixed", True)
    pool = Pool([(0, 9, 4, 0, 1.0), (2, 9, 3, 1, -1.0), (0, 5, 8, 2, 0.5)], 40, 40)
    x, y = torch.randn(9, 40).half(), torch.randn(9, 40).half()  # not bf16, which the interpreter truncates
    whole = pool.add(kernels, y, x)
    monkeypatch.setattr(lora, "SCRATCH", 1)
    assert torch.equal(pool.add(kernels, y, x), whole)


def test_chunks_of_a_prompt_keep_their_bits_when_tiles_are_fixed(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_fixed", True)
    requests = Requests(kernels, [90, 77], 4, 2, 32, 16)
    whole = requests.attend([(0, 0, 90)], 50)[0]
    first, second, _ = requests.attend([(0, 0, 67), (0, 67, 90), (1, 70, 77)], 50)
    assert torch.equal(torch.cat([first, second]), whole)


def test_a_poisoned_row_stays_alone(kernels: Any) -> None:
    weight = make_weight(32, 128)
    pool = Pool([(0, 2, 4, 0, 1.0), (2, 20, 4, 1, 1.0)], 128, 32)
    x, y = torch.randn(20, 128), torch.randn(20, 32)
    clean, adapted = kernels.linear_forward(x, weight), pool.add(kernels, y, x)
    x[3] = torch.nan
    keep = [row for row in range(20) if row != 3]
    assert torch.equal(kernels.linear_forward(x, weight)[keep], clean[keep])
    assert torch.equal(pool.add(kernels, y, x)[keep], adapted[keep])


def test_only_tensors_of_the_device_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2)
    assert triton.supports(x, x.bfloat16())
    assert not triton.supports(x, x.double())
    monkeypatch.setenv("LORAKEET_TRITON", "0")
    assert not triton.supports(x)
