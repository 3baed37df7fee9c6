"""A frozen base linear's weight, in the storage of its library, and how to decode it.

bitsandbytes' 4-bit and 8-bit tensors and plain dense ones, all by reference: nothing is copied or repacked, so the
base's bytes stay unchanged.
"""

import logging
from dataclasses import dataclass, replace
from typing import Literal

import torch

# Otherwise its import warns, on some CPUs, that one of its kernels is missing, which is never called here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Its import also passes functions to torch.compile that are never called here. That alone imports the compiler, which
# takes two seconds of every start.
_compile, torch.compile = torch.compile, lambda function, **options: function  # type: ignore[assignment]
try:
    from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
finally:
    torch.compile = _compile

from torch import Tensor, nn  # noqa: E402

WeightKind = Literal["nf4", "fp4", "int8", "dense"]


# The 16 codes times this, rounded, are integers up to 127; of all factors, this makes them most nearly proportional to
# the codes.
_LEVEL_STEPS = {"nf4": 111.75, "fp4": 119.5}

_SKETCH_ROWS = 1024  # outputs at a time, so that temporaries stay small
_NORM_MARGIN = 1.0001  # factor on norms, which makes up for their own rounding
_TINY = 1e-35  # small, but with a finite inverse and full precision


@dataclass(frozen=True, eq=False)
class Int8Copy:
    """A copy of a 4-bit weight as integers: `levels[nibble] * unit * absmax`, laid out for 8-bit dot products.

    `data` is uint8 `[groups of 16 outputs, blocks of 64 inputs, 512 + 64]`: four bytes of each of 16 outputs at a time,
    byte j with input j of eight in the high nibble and j + 4 in the low one; then the outputs' `unit * absmax` as fp32.
    Missing outputs of the last group are zeros.
    """

    data: Tensor
    levels: Tensor  # int8 [16]

    @property
    def scales(self) -> Tensor:
        """`unit * absmax`, fp32 `[groups * 16, blocks]`."""
        return self.data[:, :, 512:].contiguous().view(torch.float32).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Sketch:
    """A screening copy of a dense weight: each output's row rounded to eight bits, with bounds on the error.

    `data` is int8 `[groups of 16 outputs, in / 4, 16, 4]`: four inputs of each of 16 outputs at a time; times `scale`
    it is the rounded weight, with rows of length `norm`. An fp32 product of the weight's own row and any x differs from
    the rounded row's exact one by at most `error * |x|`. All three are fp32 `[groups * 16]`, and undefined for missing
    outputs of the last group.
    """

    data: Tensor
    scale: Tensor
    norm: Tensor
    error: Tensor
    greatest_norm: float  # of the weight's own rows


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """The weight of one linear, `[out, in]`, as stored.

    `data` is packed uint8 `[out * in / 2, 1]` (4-bit: two weights per byte, the earlier one in the high nibble), int8
    `[out, in]`, or floating `[out, in]` (dense). 4-bit weights are `code[nibble] * absmax[flat index // blocksize]`;
    under double quantisation absmax itself is `nested_code[absmax] * nested_absmax[index // nested_blocksize] +
    offset`. int8 weights are `data * absmax / 127` with one absmax per output row.
    """

    kind: WeightKind
    data: Tensor
    shape: tuple[int, int]  # (out, in)
    absmax: Tensor | None = None  # 4-bit: uint8 (double quantised) or fp32 [blocks]; int8: fp32 [out]
    code: Tensor | None = None  # fp32 [16]
    blocksize: int = 0
    nested_absmax: Tensor | None = None  # fp32 [blocks / nested_blocksize]
    nested_code: Tensor | None = None  # fp32 [256]
    nested_blocksize: int = 0
    offset: float = 0.0
    int8: Int8Copy | None = None  # for products with inputs rounded to int8; see `with_int8_inputs`
    sketch: Sketch | None = None  # to rule out outputs that cannot be the greatest; see `with_sketch`

    @classmethod
    def from_linear(cls, module: nn.Module) -> "QuantizedWeight":
        """Describe a `Linear4bit`, a `Linear8bitLt` (already quantised) or an `nn.Linear`.

        Raises:
            TypeError: another kind of module.
            ValueError: a bitsandbytes module that is not quantised yet, or has a weight repacked for AVX512-BF16.
        """
        if isinstance(module, Linear4bit):
            return cls._from_4bit(module)
        if isinstance(module, Linear8bitLt):
            return cls._from_8bit(module)
        if isinstance(module, nn.Linear):
            out_features, in_features = module.weight.shape
            return cls(kind="dense", data=module.weight.detach(), shape=(out_features, in_features))
        raise TypeError(f"no base weight known for {type(module).__name__}")

    @classmethod
    def _from_4bit(cls, module: Linear4bit) -> "QuantizedWeight":
        weight: Params4bit = module.weight  # type: ignore[assignment]
        state = weight.quant_state
        if state is None:
            raise ValueError("Linear4bit is not quantised yet: move it to its device first")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError("Linear4bit was repacked for AVX512-BF16: turn support_avx512bf16_for_cpu off before use")
        out_features, in_features = state.shape
        nested = state.state2 if state.nested else None
        return cls(
            kind=state.quant_type,
            data=weight.detach(),
            shape=(out_features, in_features),
            absmax=state.absmax,
            code=state.code,
            blocksize=state.blocksize,
            nested_absmax=None if nested is None else nested.absmax,
            nested_code=None if nested is None else nested.code,
            nested_blocksize=0 if nested is None else nested.blocksize,
            offset=0.0 if nested is None else float(state.offset),
        )

    @classmethod
    def _from_8bit(cls, module: Linear8bitLt) -> "QuantizedWeight":
        # The first LLM.int8 forward moves CB and SCB from the weight to the module's state.
        weight: Int8Params = module.weight  # type: ignore[assignment]
        data = weight.CB if weight.CB is not None else module.state.CB
        absmax = weight.SCB if weight.SCB is not None else module.state.SCB
        if data is None or absmax is None:
            raise ValueError("Linear8bitLt is not quantised yet: move it to its device first")
        out_features, in_features = data.shape
        return cls(kind="int8", data=data, shape=(out_features, in_features), absmax=absmax)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored data; some routers read it."""
        return self.data.dtype

    def with_int8_inputs(self) -> "QuantizedWeight":
        """Return the same weight for products by `reference.int8_linear`: faster on a CPU, but not exact.

        Raises:
            ValueError: not 4-bit, or not in whole blocks of a multiple of 64 inputs.
        """
        levels, unit = self.int8_levels()
        out_features, blocks = self.shape[0], self.shape[1] // 64
        scales = (self.block_scales(64) * unit).view(out_features, blocks)
        groups = -(-out_features // 16)
        data = torch.zeros(groups * 16, blocks, 9, 4, dtype=torch.uint8)  # [out, blocks, fours of bytes, 4]
        nibbles = torch.stack((self.data >> 4, self.data & 15), -1).view(out_features, blocks, 8, 2, 4)
        data[:out_features, :, :8] = nibbles[..., 0, :] << 4 | nibbles[..., 1, :]
        data[:out_features, :, 8] = scales[..., None].view(torch.uint8)
        data = data.view(groups, 16, blocks, 9, 4).permute(0, 2, 3, 1, 4).reshape(groups, blocks, 576)
        return replace(self, int8=Int8Copy(data, levels))

    def int8_levels(self) -> tuple[Tensor, float]:
        """Return the levels of a 4-bit weight's int8 copy, int8 `[16]`, and their unit: code = level * unit, nearly.

        Raises:
            ValueError: not 4-bit, or not in whole blocks of a multiple of 64 inputs.
        """
        if self.kind not in ("nf4", "fp4") or self.blocksize % 64 or self.shape[1] % self.blocksize:
            raise ValueError(
                f"no int8 inputs for a {self.kind} weight of shape {self.shape} in blocks of {self.blocksize}"
            )
        assert self.code is not None
        levels = (self.code * _LEVEL_STEPS[self.kind]).round()
        unit = float(levels @ self.code / (levels @ levels))  # the least-squares fit
        return levels.to(torch.int8), unit

    def with_sketch(self) -> "QuantizedWeight":
        """Return the same weight with a sketch, with which `kernels.output_argmax` reads half as many bytes.

        Raises:
            ValueError: not dense, not finite, or not of whole blocks of 64 inputs, at most 65536.
        """
        out_features, in_features = self.shape
        if self.kind != "dense" or in_features % 64 or in_features > 2**16:
            raise ValueError(f"cannot make a screening copy of a {self.kind} weight of shape {self.shape}")
        groups = -(-out_features // 16)
        data = torch.zeros(groups * 16, in_features, dtype=torch.int8)
        scale, norm, error = torch.zeros(3, groups * 16)
        for first in range(0, out_features, _SKETCH_ROWS):
            part = slice(first, min(first + _SKETCH_ROWS, out_features))
            rows = self.data[part].float()
            scale[part] = (rows.abs().amax(1) / 127).clamp(min=_TINY)  # a smaller row's loss counts in its error
            codes = (rows / scale[part, None]).round()
            data[part] = codes.to(torch.int8)
            rounded = codes * scale[part, None]
            norm[part] = rounded.double().norm(dim=1)
            error[part] = (rows - rounded).double().norm(dim=1)
        # fp32 sums of this many products, on both sides: each addition rounds by at most 2**-24 of the total.
        error += norm * (in_features + 32) * 2.0**-24
        norm, error = norm * _NORM_MARGIN, (error * _NORM_MARGIN).clamp(min=_TINY)
        if not error.isfinite().all():
            raise ValueError("the weight is not finite")
        data = data.view(groups, 16, in_features // 4, 4).transpose(1, 2).contiguous()
        return replace(self, sketch=Sketch(data, scale, norm, error, float((norm + error).max())))

    def block_scales(self, blocksize: int | None = None) -> Tensor:
        """Return a 4-bit weight's scales, with double quantisation decoded, fp32 `[blocks]`.

        Args:
            blocksize: for blocks of this size, a divisor of the weight's own.
        """
        if blocksize not in (None, self.blocksize):
            return self.block_scales().repeat_interleave(self.blocksize // blocksize)
        assert self.absmax is not None
        if self.nested_absmax is None:
            return self.absmax
        assert self.nested_code is not None
        decoded: Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(
            self.absmax, self.nested_absmax, self.nested_code, self.nested_blocksize, torch.float32
        )
        return decoded.add_(self.offset)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight as a dense `[out, in]` tensor; a dense weight of that dtype is returned itself."""
        if self.kind == "dense":
            return self.data.to(dtype)
        if self.kind == "int8":
            assert self.absmax is not None
            return (self.data * (self.absmax / 127.0).unsqueeze(1)).to(dtype)
        dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
            self.data, self.block_scales(), self.blocksize, self.kind, self.shape, dtype
        )
        return dense
