"""Conversion of weights in dtypes that are not served: float64 to the nearest float32, float8 exactly to bfloat16.

With numpy only.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from adapters.peft_format.fields import Json
from adapters.peft_format.weights import FORMATS, Format, read_chunks, read_header


def _float32(content: bytes) -> np.ndarray:
    with np.errstate(over="ignore"):  # numbers out of range become infinite, and are refused as such
        return np.frombuffer(content, "<f8").astype("<f4")


def _e4m3() -> np.ndarray:
    """Bits of every F8_E4M3 number as a bfloat16."""
    codes = np.arange(256)
    exponents, fractions = codes >> 3 & 15, (codes & 7) / 8
    values = np.where(exponents == 0, fractions * 2.0**-6, (1 + fractions) * 2.0 ** (exponents - 7.0))
    values[codes & 127 == 127] = np.nan
    return _bfloat16(np.where(codes & 128, -values, values).astype("<f4"))


def _e5m2() -> np.ndarray:
    """Bits of every F8_E5M2 number, the first byte of a float16, as a bfloat16."""
    return _bfloat16((np.arange(256).astype("<u2") << 8).view("<f2").astype("<f4"))


def _bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.view("<u4") >> 16).astype("<u2")


_E4M3, _E5M2 = _e4m3(), _e5m2()
_SOURCES = {"F64": Format("float32", 8, 0), "F8_E4M3": Format("bfloat16", 1, 0), "F8_E5M2": Format("bfloat16", 1, 0)}
_CONVERSIONS: dict[str, tuple[str, Callable[[bytes], np.ndarray]]] = {
    "F64": ("F32", _float32),
    "F8_E4M3": ("BF16", lambda content: _E4M3[np.frombuffer(content, np.uint8)]),
    "F8_E5M2": ("BF16", lambda content: _E5M2[np.frombuffer(content, np.uint8)]),
}


def convert(path: Path) -> list[str]:
    """Rewrite a file of weights with tensors in such dtypes; the other tensors are kept as they are.

    Returns warnings for its owner. Raises AdapterError, OSError.
    """
    with path.open("rb") as file:
        tensors = read_header(file, FORMATS | _SOURCES)
        found = sorted({tensor.dtype for tensor in tensors.values()} & _CONVERSIONS.keys())
        if not found:
            return []
        header: dict[str, Json] = {}
        position = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
            dtype, _ = _CONVERSIONS.get(tensor.dtype, (tensor.dtype, None))
            size = (tensor.end - tensor.start) // (FORMATS | _SOURCES)[tensor.dtype].itemsize * FORMATS[dtype].itemsize
            offsets = [position, position + size]
            header[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": offsets}
            position += size
        raw = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        raw += b" " * (-len(raw) % 8)
        staged = path.with_name(f".{path.name}.converted")
        with staged.open("wb") as target:
            target.write(len(raw).to_bytes(8, "little") + raw)
            for name in header:
                for chunk in read_chunks(file, tensors[name]):
                    converted = _CONVERSIONS.get(tensors[name].dtype)
                    target.write(chunk if converted is None else converted[1](chunk).data)
    staged.replace(path)
    return [f"weights in {dtype} were converted to {_CONVERSIONS[dtype][0]}" for dtype in found]
