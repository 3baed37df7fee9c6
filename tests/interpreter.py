"""Triton kernels in tests: on the GPU where there is one, else on CPU tensors in Triton's interpreter.

Triton decides when it is first imported whether it interprets: `prepare` must run before that.
"""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def prepare() -> None:
    """Have Triton interpret kernels in this process unless there is a GPU to run them."""
    if DEVICE == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"


def whole_suite() -> bool:
    """Whether every test's tensors go to the interpreter (`make interpret`), and should be few."""
    return os.environ.get("LORAKEET_TRITON") == "interpret"


def switch_on() -> dict[str, str]:
    """Environment variables that send tensors of `DEVICE` to the Triton kernels."""
    return {"LORAKEET_TRITON": "interpret"} if DEVICE == "cpu" else {}
