"""Triton kernels in tests: on the GPU where there is one, else on CPU tensors in Triton's interpreter.

Triton decides when it is first imported whether it interprets: `prepare` must run before that.
"""

import os
from types import SimpleNamespace

import numpy as np
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def prepare() -> None:
    """Have Triton interpret kernels in this process unless there is a GPU to run them."""
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        _hasten()


def whole_suite() -> bool:
    """Whether every test's tensors go to the interpreter (`make interpret`), and should be few."""
    return os.environ.get("LORAKEET_TRITON") == "interpret"


def switch_on() -> dict[str, str]:
    """Environment variables that send tensors of `DEVICE` to the Triton kernels."""
    return {"LORAKEET_TRITON": "interpret"} if DEVICE == "cpu" else {}


def _hasten() -> None:
    """Spare the interpreter what takes half of its time.

    It replaces all of Triton's language before each launch and each call of a function, and back: here once. For a
    whole engine it need not look for an overflow in every sum of integers either, as it does in the kernels' own
    tests, nor warn of infinities and NaN, as a GPU does not.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    if whole_suite():
        object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
        np.seterr(over="ignore", invalid="ignore")
