"""Triton kernels in tests: on the GPU if there is one, else on CPU tensors in Triton's interpreter.

Triton decides at its first import whether it interprets: `prepare` must run before that.
"""

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def prepare() -> None:
    """Make Triton interpret kernels in this process unless there is a GPU."""
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        _fix_products()
        _hasten()


def whole_suite() -> bool:
    """Whether all tests' tensors go to the interpreter (`make interpret`), and should be few."""
    return os.environ.get("LORAKEET_TRITON") == "interpret"


def switch_on() -> dict[str, str]:
    """Environment variables that send tensors of `DEVICE` to the Triton kernels."""
    return {"LORAKEET_TRITON": "interpret"} if DEVICE == "cpu" else {}


def _fix_products() -> None:
    """Multiply row by row on one thread, so that a row's bits depend on that row alone, as on a GPU.

    The interpreter multiplies with numpy, whose BLAS chooses a kernel for each processor. Some kernels divide rows
    among threads or treat the last few of a tile differently: then a row's bits depend on its neighbours and position.
    """
    from triton.runtime import interpreter

    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # for child processes
    ThreadpoolController().select(internal_api="openblas").limit(limits=1)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        rows = np.matmul(a.data[..., None, :], b.data[..., None, :, :], dtype=d.data.dtype)
        return interpreter.TensorHandle(rows[..., 0, :] + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def _hasten() -> None:
    """Skip work that takes half of the interpreter's time.

    It replaces all of Triton's language before each launch and each function call, and restores it: here once. A whole
    engine also needs neither the overflow check of every integer sum, which the kernels' own tests use, nor warnings
    of infinities and NaN, which a GPU does not give.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    if whole_suite():
        object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
        np.seterr(over="ignore", invalid="ignore")
