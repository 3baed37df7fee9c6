"""Layers that keep a state of fixed size per sequence: short causal convolutions, linear attention with decay.

In plain torch, and as calls of the C++ and Triton kernels. A *run* is consecutive tokens of one sequence, a row of an
int32 tensor `[runs, 4]`: first token, one past the last, the slot of the state before them, the slot of the state after
them. A run without tokens copies. Runs go in order and tokens one by one, so that results do not depend on the cuts
into runs. A sequence's runs are adjacent, each reading the slot written by the one before, and no sequence writes a
slot that another reads or writes.
"""

from ctypes import Structure, c_float, c_int32, c_void_p
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.kernels import native, triton
from adapters.kernels.reference import with_row_gaps

_MAX_KEYS = 1024  # most numbers of a key, as in recurrence.cpp
NORM_EPS = 1e-6


class ConvolutionStruct(Structure):
    """`Convolution` of recurrence.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "taps", "bias", "out", "states", "runs")),
        *((name, c_int32) for name in ("count", "channels", "kernel", "silu")),
    ]


class RecurrenceStruct(Structure):
    """`Recurrence` of recurrence.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "a", "b", "a_log", "dt_bias", "out", "states", "runs")),
        *((name, c_int32) for name in ("count", "key_heads", "heads", "keys", "values")),
        *((name, c_float) for name in ("gain", "low", "high")),
    ]


def _native(*tensors: Tensor) -> "native.Kernels | None":
    return native.load() if all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in tensors) else None


def convolve(x: Tensor, taps: Tensor, bias: Tensor | None, silu: bool, states: Tensor, runs: Tensor) -> Tensor:
    """Return a causal convolution per channel, with the inputs before a run read from its state.

    Args:
        x: [T, channels].
        taps: [kernel, channels], the last one for the token itself.
        silu: whether to apply the activation.
        states: fp32 [slots, kernel - 1, channels], the last inputs of sequences; written.
    """
    if triton.supports(x) and (compiled := triton.load()):
        found: Tensor = compiled.convolve(x, taps, bias, silu, states, runs)
        return found
    kernels = _native(x, taps)
    if kernels is None:
        return convolve_torch(x, taps, bias, silu, states, runs)
    x, out = x.contiguous(), torch.empty(x.shape)
    addresses = map(native.address, (x, taps, bias, out, states, runs))
    kernels.call("lk_convolve", ConvolutionStruct(*addresses, len(runs), x.shape[1], len(taps), silu))
    return out


def convolve_torch(x: Tensor, taps: Tensor, bias: Tensor | None, silu: bool, states: Tensor, runs: Tensor) -> Tensor:
    """See `convolve`; in plain torch."""
    out, kept = torch.empty_like(x), len(taps) - 1
    for begin, end, read, write in runs.tolist():
        inputs = torch.cat([states[read].to(x.dtype), x[begin:end]])
        states[write] = inputs[len(inputs) - kept :]
        out[begin:end] = convolve_sequence(inputs, taps, bias, silu)
    return out


def convolve_sequence(inputs: Tensor, taps: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Return the convolution of one sequence's inputs, from the first one with all inputs before it; differentiable."""
    count = len(inputs) - len(taps) + 1
    y = inputs.new_zeros(()) if bias is None else bias
    for place, tap in enumerate(taps):
        y = y + tap * inputs[place : place + count]
    return F.silu(with_row_gaps(y)) if silu else y


@dataclass(frozen=True)
class Recurrence:
    """Linear attention with a decaying state: the gated delta rule, or, without `b`, Mamba-2.

    For each token and head, with step = softplus(a + dt_bias) within `limits`: the state S decays to
    S * exp(-exp(a_log) * step); then k (outer) u is added, where u = (v - S^T k) * sigmoid(b) * gain, or u = v * step;
    the output is S^T q. The delta rule normalises k and q, and divides q by the square root of its length.

    Args:
        q, k: [T, key heads, keys]; each key head serves equally many consecutive heads.
        v: [T, heads, values].
        a, b: [T, heads].
        a_log, dt_bias: [heads].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor | None
    a_log: Tensor
    dt_bias: Tensor
    gain: float = 1.0
    limits: tuple[float, float] = (0.0, float("inf"))


def recur(r: Recurrence, states: Tensor, runs: Tensor) -> Tensor:
    """Return the output, [T, heads, values] in the dtype of `v`.

    Args:
        states: fp32 [slots, heads, keys, values]; written.
    """
    if triton.supports(r.v) and (compiled := triton.load()):
        found: Tensor = compiled.recur(r, states, runs)
        return found
    kernels = _native(r.q, r.k, r.v, r.a, r.a_log, r.dt_bias) if r.q.shape[2] <= _MAX_KEYS else None
    if kernels is None:
        return recur_torch(r, states, runs)
    # A list, since copies must live until the kernel has read them.
    inputs = [part if part is None else part.contiguous() for part in (r.q, r.k, r.v, r.a, r.b)]
    out = torch.empty(r.v.shape)
    addresses = map(native.address, (*inputs, r.a_log, r.dt_bias, out, states, runs))
    shape = len(runs), r.q.shape[1], r.v.shape[1], r.q.shape[2], r.v.shape[2]
    kernels.call("lk_recur", RecurrenceStruct(*addresses, *shape, r.gain, *r.limits))
    return out


def recur_torch(r: Recurrence, states: Tensor, runs: Tensor) -> Tensor:
    """See `recur`; in plain torch."""
    out, shared, rate = torch.empty_like(r.v), r.v.shape[1] // r.q.shape[1], -r.a_log.float().exp()
    for begin, end, read, write in runs.tolist():
        state = states[read]
        for token in range(begin, end):
            query, key = (part[token].float().repeat_interleave(shared, 0) for part in (r.q, r.k))  # [heads, keys]
            value = r.v[token].float()
            step = F.softplus(r.a[token].float() + r.dt_bias.float()).clamp(*r.limits)
            state = state * (rate * step).exp()[:, None, None]
            if r.b is None:
                update = value * step[:, None]
            else:
                query, key = normalise(query) * query.shape[-1] ** -0.5, normalise(key)
                update = value - (state * key[:, :, None]).sum(1)
                update = update * (r.b[token].float().sigmoid() * r.gain)[:, None]
            state = state + key[:, :, None] * update[:, None]
            out[token] = (state * query[:, :, None]).sum(1).to(out.dtype)
        states[write] = state
    return out


def normalise(x: Tensor) -> Tensor:
    """Return vectors divided by their length."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS)
