"""Orders and answers between this server and its helper processes: bytes with their length, over pipes.

Needs nothing but the standard library, as the program does that renders templates which nobody vouches for.
"""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable

PREFIX_BYTES = 8
_PR_SET_PDEATHSIG = 1


def frame(content: bytes) -> bytes:
    """The content as it is sent."""
    return len(content).to_bytes(PREFIX_BYTES, "little") + content


def serve(answer: Callable[[bytes], bytes]) -> None:
    """Send an empty frame, and answer orders from standard input until that ends, or whoever sends them does."""
    end_with_parent()
    orders, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    answers.write(frame(b""))
    answers.flush()
    while prefix := orders.read(PREFIX_BYTES):
        answers.write(frame(answer(orders.read(int.from_bytes(prefix, "little")))))
        answers.flush()


def within(kind: int, wanted: int) -> int:
    """A limit as wanted, or as low as the system has set it for us: nobody may ask for more."""
    hard = resource.getrlimit(kind)[1]
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)


def end_with_parent() -> None:
    """Let the kernel kill this process when the one that started it has gone, even in the middle of its work."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
