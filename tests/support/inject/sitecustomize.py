"""Imported by every Python process that finds this folder on its path: makes an engine's steps fail when told to.

When the file named by FAULT_FILE appears, the next step (or piece of training, for a kind that begins with "training")
takes it away and meets the fault that it names.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def illegal_access() -> None:
    """A real one: what the device reports is found at the next wait for it, and nothing works after it."""
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def poke(where):  # type: ignore[no-untyped-def]  # Triton would take types for code
        tl.store(where + (1 << 44), 1)

    poke[(1,)](torch.zeros(1, dtype=torch.int32, device="cuda"))


def fail(kind: str) -> None:
    """Meet a fault."""
    import torch

    match kind.removeprefix("training "):
        case "accelerator":
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        case "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        case "illegal access":
            illegal_access()
        case unknown:
            raise AssertionError(unknown)


def failing(work: Callable[..., Any], prefix: str) -> Callable[..., Any]:
    """`work`, after a look at the file."""
    file = Path(os.environ["FAULT_FILE"])

    def look_first(*args: Any, **kwargs: Any) -> Any:
        if file.exists() and file.read_text().startswith("training") == (prefix == "training"):
            kind = file.read_text()
            file.unlink()
            fail(kind)
        return work(*args, **kwargs)

    return look_first


if "server.engine.process" in sys.orig_argv:
    from server.engine.runner import Runner
    from server.training.layers import LayeredModel

    Runner.submit = failing(Runner.submit, "serving")  # type: ignore[method-assign]
    LayeredModel.run = failing(LayeredModel.run, "training")  # type: ignore[method-assign]
