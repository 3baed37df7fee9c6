"""Imported by every Python process with this folder on its path: makes an engine's steps fail on request, and records
the files that a request enters.

When the file named by FAULT_FILE appears, the next step (or piece of training, for a kind that begins with "training")
deletes it and raises the fault that it names. While it contains "slow", each step is delayed instead, and none
begins while it contains "held", so that a test can observe work in progress.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import preloaded

ROOT = f"{Path(__file__).parent.parent.parent.parent}/"
PRODUCT = (f"{ROOT}server/", f"{ROOT}adapters/")
SLOW_SECONDS = 0.05  # added to a step, or to a layer in training


def illegal_access() -> None:
    """A real one: the device reports it at the next synchronisation, and nothing works afterwards."""
    import torch
    import triton
    import triton.language as tl

    @triton.jit
    def poke(where):  # type: ignore[no-untyped-def]  # Triton would take types for code
        tl.store(where + (1 << 44), 1)

    poke[(1,)](torch.zeros(1, dtype=torch.int32, device="cuda"))


def fail(kind: str) -> None:
    """Raise a fault."""
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


def _content(file: Path) -> str:
    """The text of a file; empty if it does not exist or is about to be written."""
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def failing(work: Callable[..., Any], prefix: str) -> Callable[..., Any]:
    """`work`, preceded by a check of the file."""

    def look_first(*args: Any, **kwargs: Any) -> Any:
        if (name := os.environ.get("FAULT_FILE")) is None:
            return work(*args, **kwargs)
        file = Path(name)
        while (kind := _content(file)) == "held":
            time.sleep(SLOW_SECONDS)
        if kind.removeprefix("training ") == "slow":
            if kind.startswith("training") == (prefix == "training"):
                time.sleep(SLOW_SECONDS)
        elif kind and kind.startswith("training") == (prefix == "training"):
            file.unlink()
            fail(kind)
        return work(*args, **kwargs)

    return look_first


def make_fail() -> None:
    """Make every step and every piece of training check the file first."""
    from server.engine.runner import Runner
    from server.training.layers import LayeredModel

    Runner.submit = failing(Runner.submit, "serving")  # type: ignore[method-assign]
    LayeredModel.run = failing(LayeredModel.run, "training")  # type: ignore[method-assign]


class Visits:
    """The product's files whose functions this process enters between SIGUSR1 and SIGUSR2.

    Reports through files in its directory: `PID.begun`, and `PID.files` with one name per line.
    """

    def __init__(self, directory: Path, pid: int) -> None:
        self._directory = directory
        self._pid = pid
        self._seen: dict[str, None] | None = None
        signal.signal(signal.SIGUSR1, self._begin)
        signal.signal(signal.SIGUSR2, self._end)
        threading.setprofile(self._note)  # for future threads: running threads cannot be changed

    def _begin(self, *_: object) -> None:
        self._seen = {}
        sys.setprofile(self._note)
        (self._directory / f"{self._pid}.begun").touch()

    def _end(self, *_: object) -> None:
        sys.setprofile(None)
        whole = self._directory / f"{self._pid}.tmp"
        whole.write_text("".join(f"{name.removeprefix(ROOT)}\n" for name in self._seen or ()))
        whole.rename(whole.with_suffix(".files"))
        self._seen = None

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        seen, code = self._seen, frame.f_code
        if seen is None or event != "call" or code.co_filename in seen or not code.co_filename.startswith(PRODUCT):
            return
        if code.co_code[frame.f_lasti + 1] == 0 and code.co_name != "<module>":  # called, not resumed after a yield
            seen[code.co_filename] = None


def prepare(pid: int) -> None:
    """Record the files that this process enters, if requested, under the id `pid`."""
    if "VISITS" in os.environ:
        Visits(Path(os.environ["VISITS"]), pid)


if preloaded.PROGRAM in sys.orig_argv:
    if "PRELOADED" in os.environ:
        preloaded.stand_for_one(os.environ["PRELOADED"])
    make_fail()
elif preloaded.HELPER in sys.orig_argv and "PRELOADED_HELPERS" in os.environ:
    preloaded.stand_for_one(os.environ["PRELOADED_HELPERS"])
prepare(os.getpid())
