"""A loop for programs whose work may explode: each order is carried out in a child of its own, within limits.

One order a line on standard input, one answer a line on standard output, in JSON; an empty line says that it is ready.
The child limits itself, works and is gone, so no order meets another one's, and what loops or explodes takes only its
child with it: then the answer is null. `server.text.sandbox` is the other end.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

STACK_BYTES = 4 << 20  # less than any thread has that does the same work later


def serve(carry_out: Callable[[Any], Any]) -> None:
    """Serve until standard input ends. Arguments: wall seconds, CPU seconds, bytes of memory."""
    seconds, cpu_seconds, memory = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides
    sys.stdout.buffer.write(b"\n")  # ready
    sys.stdout.buffer.flush()
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(_in_a_child(carry_out, line, seconds, cpu_seconds, memory) + b"\n")
        sys.stdout.buffer.flush()


def _in_a_child(carry_out: Callable[[Any], Any], line: bytes, seconds: float, cpu_seconds: int, memory: int) -> bytes:
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(source)
            _limit(seconds, cpu_seconds, memory)
            answer = json.dumps(carry_out(json.loads(line))).encode()
            with os.fdopen(sink, "wb") as pipe:
                pipe.write(answer)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(sink)
    with os.fdopen(source, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    return answer if status == 0 else b"null"


def _limit(seconds: float, cpu_seconds: int, memory: int) -> None:
    """What this process may use from now on; who exceeds it is ended by the kernel."""
    with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, resource.getrlimit(resource.RLIMIT_STACK)[1]))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
