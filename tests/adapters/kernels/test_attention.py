"""Paged attention: equal to SDPA with a mask, independent of chunking, and never reading stale slots."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adapters.kernels import reference

KINDS = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]  # dtypes of caches that round


def in_rows(kernels: Any, cache: Tensor, keys: bool) -> Tensor:
    """The cache in the layout of `reference`: the C++ kernels keep keys by columns, and scales after each block."""
    if kernels is reference:
        return cache
    size, dim = cache.shape[2], reference.head_size(cache)
    numbers, scales = cache.flatten(2).split([size * dim, (cache.shape[3] - dim) * size], dim=-1)
    rows = numbers.unflatten(-1, (dim, size)).mT if keys else numbers.unflatten(-1, (size, dim))
    return torch.cat([rows, scales.unflatten(-1, (size, -1))], dim=-1) if scales.numel() else rows


class Requests:
    """Sequences of given lengths in a paged cache whose other slots are NaN."""

    def __init__(
        self,
        kernels: Any,
        lengths: list[int],
        heads: int,
        kv_heads: int,
        dim: int,
        block_size: int,
        kept: torch.dtype = torch.float32,
    ) -> None:
        self.kernels, self.lengths = kernels, lengths
        self.q = [torch.randn(n, heads, dim) for n in lengths]
        self.k, self.v = ([torch.randn(n, kv_heads, dim) for n in lengths] for _ in range(2))
        width = max(-(-n // block_size) for n in lengths)
        blocks = torch.randperm(width * len(lengths) + 3)[: width * len(lengths)]
        self.tables = blocks.view(len(lengths), width).int()
        shape = (width * len(lengths) + 3, kv_heads, block_size, dim)
        stale = reference.cache_rows(torch.full(shape, torch.nan), kept)
        if kept == torch.int8:
            stale.fill_(-1)  # bytes that are NaN when read as a scale
        self.k_cache, self.v_cache = stale, stale.clone()
        for row, n in enumerate(lengths):
            at = torch.arange(n)
            slots = self.tables[row].long()[at // block_size] * block_size + at % block_size
            kernels.write_kv(self.k[row], self.v[row], self.k_cache, self.v_cache, slots)
        if kept != torch.float32:  # the rounded values are the ones attended to
            self.k, self.v = (
                [reference.cache_numbers(reference.cache_rows(states, kept)) for states in kind]
                for kind in (self.k, self.v)
            )

    def attend(self, spans: list[tuple[int, int, int]], window: int = 0, padding: int = 0, **more: Any) -> list[Tensor]:
        """Attend with queries first..last of the given requests in one call, with padding around and between them."""
        pieces, seqs, at = [torch.full_like(self.q[0][:1], 7.0)] * padding, [], padding
        for request, first, last in spans:
            seqs.append((at, at + last - first, last))
            pieces += [self.q[request][first:last], *[self.q[0][:1]] * padding]
            at += last - first + padding
        tables = self.tables[[request for request, _, _ in spans]]
        out = self.kernels.paged_attention(
            torch.cat(pieces),
            self.k_cache,
            self.v_cache,
            torch.tensor(seqs, dtype=torch.int32),
            tables,
            self.q[0].shape[-1] ** -0.5,
            window,
            **more,
        )
        inside = torch.zeros(len(out), dtype=torch.bool)
        for start, end, _ in seqs:
            inside[start:end] = True
        assert (out[~inside] == 0).all()
        return [out[start:end] for start, end, _ in seqs]

    def expected(self, request: int, window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None) -> Tensor:
        n = self.lengths[request]
        at = torch.arange(n)
        mask = at[None] <= at[:, None]
        if window:
            mask &= at[None] > at[:, None] - window
        q, k, v = (states[request].double().transpose(0, 1)[None] for states in (self.q, self.k, self.v))
        if not softcap and sinks is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            return out[0].transpose(0, 1)
        k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(1, -1, n, 1)], dim=-1)
        return (scores.softmax(-1)[..., :n] @ v)[0].transpose(0, 1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size"), [(9, 3, 64, 16), (4, 2, 16, 128), (2, 2, 80, 4), (3, 1, 10, 64)]
)
@pytest.mark.parametrize("window", [0, 1, 64, 90])
def test_against_sdpa(kernels: Any, heads: int, kv_heads: int, dim: int, block_size: int, window: int) -> None:
    requests = Requests(kernels, [150, 1, 64], heads, kv_heads, dim, block_size)
    outs = requests.attend([(r, 0, n) for r, n in enumerate(requests.lengths)], window, padding=1)
    for request, out in enumerate(outs):
        torch.testing.assert_close(out.double(), requests.expected(request, window), rtol=1e-5, atol=1e-5)


@given(data=st.data(), window=st.sampled_from([0, 5, 64, 90]), block_size=st.sampled_from([16, 64]))
@settings(max_examples=25, deadline=None)
def test_results_do_not_depend_on_chunks_or_other_requests(
    kernels: Any, data: st.DataObject, window: int, block_size: int
) -> None:
    requests = Requests(kernels, [140, 77], 6, 2, 32, block_size)
    whole = [requests.attend([(r, 0, n)], window)[0] for r, n in enumerate(requests.lengths)]
    cut = data.draw(st.integers(1, 139))
    first, second, other = requests.attend([(0, 0, cut), (0, cut, 140), (1, 0, 77)], window)
    assert torch.equal(torch.cat([first, second]), whole[0])
    assert torch.equal(other, whole[1])
    row = data.draw(st.integers(0, 76))
    assert torch.equal(requests.attend([(1, row, row + 1)], window)[0], whole[1][row : row + 1])


@pytest.mark.parametrize("window", [0, 300, 700])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.int8])
def test_pieces_of_many_keys_are_joined_alike(kernels: Any, window: int, kept: torch.dtype) -> None:
    """Threads share the pieces (512 keys) of a single request, but not those of one among many or in long chunks."""
    requests = Requests(kernels, [1500, 513, 512], 6, 2, 24, 16, kept)
    whole = [requests.attend([(r, 0, n)], window)[0] for r, n in enumerate(requests.lengths)]
    for request, out in enumerate(whole):
        torch.testing.assert_close(out.double(), requests.expected(request, window), rtol=1e-5, atol=1e-5)
    for request, row in [(0, 1499), (0, 1024), (0, 1023), (0, 511), (1, 512), (2, 511)]:
        alone = requests.attend([(request, row, row + 1)], window)[0]
        crowd = requests.attend([(request, row, row + 1)] * 40 + [(1, 0, 0)], window)
        assert torch.equal(alone, whole[request][row : row + 1])
        assert all(torch.equal(out, alone) for out in crowd[:-1])


def test_a_row_that_is_not_a_number_anywhere_stays_so(kernels: Any) -> None:
    requests = Requests(kernels, [1100], 2, 1, 16, 16)
    requests.k_cache[int(requests.tables[0, 0])] = torch.nan  # in the first piece; the last one is clean
    assert requests.attend([(0, 1099, 1100)])[0].isnan().all()
    assert requests.attend([(0, 0, 1100)])[0].isnan().all()


@pytest.mark.parametrize("softcap", [0.0, 2.0, 50.0])
@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize("window", [0, 70])
def test_softcap_and_sinks(kernels: Any, softcap: float, sunk: bool, window: int) -> None:
    requests = Requests(kernels, [150, 1, 64], 6, 2, 24, 16)
    # One head's sink takes nearly all weight, another's nothing, and one exceeds the range of exp.
    sinks = torch.tensor([-200.0, -1.0, 0.5, 3.0, 12.0, 200.0]) if sunk else None
    more: dict[str, Any] = {"softcap": softcap, "sinks": sinks}
    outs = requests.attend([(r, 0, n) for r, n in enumerate(requests.lengths)], window, padding=1, **more)
    for request, out in enumerate(outs):
        torch.testing.assert_close(out.double(), requests.expected(request, window, **more), rtol=1e-5, atol=1e-5)
    first, second, _ = requests.attend([(0, 0, 71), (0, 71, 150), (2, 63, 64)], window, **more)
    assert torch.equal(torch.cat([first, second]), outs[0]), "chunks and other requests change nothing"


@pytest.mark.parametrize("kept", KINDS)
@pytest.mark.parametrize(("dim", "block_size"), [(24, 16), (64, 16), (80, 16), (64, 4), (24, 64), (16, 128)])
def test_caches_of_fewer_bits(kernels: Any, kept: torch.dtype, dim: int, block_size: int) -> None:
    requests = Requests(kernels, [150, 1, 64], 6, 2, dim, block_size, kept)
    outs = requests.attend([(r, 0, n) for r, n in enumerate(requests.lengths)], 90, padding=1)
    for request, out in enumerate(outs):
        torch.testing.assert_close(out.double(), requests.expected(request, 90), rtol=1e-5, atol=1e-5)
    first, second, _ = requests.attend([(0, 0, 71), (0, 71, 150), (2, 63, 64)], 90)
    assert torch.equal(torch.cat([first, second]), outs[0]), "chunks and other requests change nothing"


@pytest.mark.parametrize("kept", KINDS)
def test_numbers_are_rounded_alike_everywhere(kernels: Any, kept: torch.dtype) -> None:
    """Including halves between neighbours, subnormal numbers, too large numbers, infinity and NaN."""
    states = torch.cat([torch.randn(4096), torch.randn(4096) * 1e-3, torch.randn(4096) * 300, torch.randn(4096) * 1e-7])
    states[:20] = torch.tensor(
        [0.0, -0.0, 448, 464, -1e6, 65519, 65520, 1.0625, 1.1875, 2**-9, 2**-10, 3 * 2**-10, *[0] * 8]
    )
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0]).repeat(16).view(1, 1, 64)
    rows = torch.cat([states.view(-1, 1, 64), odd])
    cache = reference.cache_rows(torch.zeros(17, 1, 16, 64), kept)
    other = cache.clone()
    kernels.write_kv(rows, -rows, cache, other, torch.arange(len(rows)))
    for held, written in ((in_rows(kernels, cache, True), rows), (in_rows(kernels, other, False), -rows)):
        found = reference.cache_numbers(held.flatten(0, 2)[: len(rows)])
        expected = reference.cache_numbers(reference.cache_rows(written[:, 0], kept))
        assert torch.equal(found[:-1], expected[:-1])
        assert torch.equal(found[-1].isfinite(), expected[-1].isfinite())
        if kept == torch.float8_e4m3fn:
            assert found[-1, :2].abs().eq(448).all(), "too large numbers are clipped"


def test_a_poisoned_request_stays_alone(kernels: Any) -> None:
    requests = Requests(kernels, [70, 70], 4, 2, 16, 16)
    clean = requests.attend([(0, 69, 70), (1, 69, 70)])
    requests.k_cache[int(requests.tables[1, 0])] = torch.nan
    spoilt = requests.attend([(0, 69, 70), (1, 69, 70)])
    assert torch.equal(spoilt[0], clean[0])
    assert spoilt[1].isnan().all()


def test_scores_far_apart(kernels: Any) -> None:
    requests = Requests(kernels, [130], 2, 1, 16, 16)
    requests.q[0] *= 200.0
    torch.testing.assert_close(requests.attend([(0, 0, 130)])[0].double(), requests.expected(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block_size", [4, 16])
def test_caches_hold_what_was_written(kernels: Any, block_size: int) -> None:
    requests = Requests(kernels, [37, 5], 2, 2, 8, block_size)
    caches = in_rows(kernels, requests.k_cache, True), in_rows(kernels, requests.v_cache, False)
    for row, n in enumerate(requests.lengths):
        blocks = requests.tables[row].long()
        for cache, states in zip(caches, (requests.k, requests.v), strict=True):
            kept = cache[blocks].transpose(1, 2).flatten(0, 1)  # [slots, Hkv, D]
            assert torch.equal(kept[:n], states[row])
            assert kept[n:].isnan().all()
