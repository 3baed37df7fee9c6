"""Norm, rotation and activation compared with transformers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb


@pytest.mark.parametrize("width", [576, 64, 33, 5])
def test_rms_norm(kernels: Any, width: int) -> None:
    norm = LlamaRMSNorm(width, eps=1e-5)
    norm.weight.data.normal_()
    x = torch.randn(50, width)
    y = kernels.rms_norm(x, norm.weight.detach(), 1e-5)
    torch.testing.assert_close(y, norm(x).detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(kernels.rms_norm(x[7:8], norm.weight.detach(), 1e-5), y[7:8])


def test_silu_mul(kernels: Any) -> None:
    gate = torch.cat([torch.randn(3, 37) * 10, torch.tensor([[-200.0, -88.0, 0.0, 88.0, 200.0] + [1.0] * 32])])
    up = torch.randn_like(gate)
    torch.testing.assert_close(kernels.silu_mul(gate, up), F.silu(gate) * up, rtol=1e-5, atol=1e-6)
    gate[0, 0] = torch.nan
    assert kernels.silu_mul(gate, up)[0, 0].isnan()


@pytest.mark.parametrize(("dim", "rotary"), [(64, 64), (16, 16), (20, 20), (32, 16)])
def test_rope(kernels: Any, dim: int, rotary: int) -> None:
    q, k = torch.randn(21, 6, dim), torch.randn(21, 2, dim)
    angles = torch.arange(21)[:, None] * torch.rand(rotary // 2)
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))
    turned = apply_rotary_pos_emb(
        q[None, ..., :rotary].transpose(1, 2), k[None, ..., :rotary].transpose(1, 2), cos[None], sin[None]
    )
    expected = [torch.cat([t[0].transpose(0, 1), x[..., rotary:]], dim=-1) for t, x in zip(turned, (q, k), strict=True)]
    kernels.rope_(q, k, cos, sin)
    torch.testing.assert_close(q, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(k, expected[1], rtol=1e-5, atol=1e-6)
