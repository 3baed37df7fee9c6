"""Orders and answers between this server and its helper processes: bytes with their length, over pipes.

Imports the standard library only, since the renderer of untrusted templates uses it.
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
    """Return the content with its length in front."""
    return len(content).to_bytes(PREFIX_BYTES, "little") + content


def serve(answer: Callable[[bytes], bytes]) -> None:
    """Send an empty frame, then answer orders from standard input until it or the parent process ends."""
    end_with_parent()
    orders, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # keeps the prints of libraries out of the answers
    answers.write(frame(b""))
    answers.flush()
    while prefix := orders.read(PREFIX_BYTES):
        answers.write(frame(answer(orders.read(int.from_bytes(prefix, "little")))))
        answers.flush()


def capped(kind: int, wanted: int) -> int:
    """Return the wanted limit, or this process's hard limit if that is lower, since it cannot be raised."""
    hard = resource.getrlimit(kind)[1]
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)


def end_with_parent() -> None:
    """Have the kernel kill this process when its parent ends, even in the middle of its work."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
