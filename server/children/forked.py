"""A loop for programs with unbounded work: each order is carried out in a forked child, within limits.

The child limits itself, works and exits, so orders share no state, and an endless loop or exhausted memory ends only
its child. Imports the standard library only, since the template renderer uses it.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from server.children.frames import capped, end_with_parent, serve

STACK_BYTES = 4 << 20  # less than in any thread that does the same work later
_LIMIT = json.dumps({"limit": "takes too long, or too much memory"}).encode()
_LATE = json.dumps({"late": "takes too long"}).encode()


def serve_forked(run_order: Callable[[Any], dict[str, Any]]) -> None:
    """Answer orders; see `server.children.helper`. The program's arguments: wall seconds, CPU seconds, bytes."""
    seconds, cpu_seconds, memory = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    serve(partial(_fork_and_run, run_order, seconds, cpu_seconds, memory))


def _fork_and_run(
    run_order: Callable[[Any], dict[str, Any]], seconds: float, cpu_seconds: int, memory: int, order: bytes
) -> bytes:
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(source)
            end_with_parent()
            _set_limits(seconds, cpu_seconds, memory)
            answer = json.dumps(run_order(json.loads(order)), ensure_ascii=False).encode()
            with os.fdopen(sink, "wb") as pipe:
                pipe.write(answer)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(sink)
    with os.fdopen(source, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status == 0:
        return answer
    return _LATE if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else _LIMIT


def _set_limits(seconds: float, cpu_seconds: int, memory: int) -> None:
    """Limit this process from now on; the kernel ends it beyond the limits."""
    with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123
        used = int(statm.read().split()[0]) * resource.getpagesize()
    for kind, wanted in ((resource.RLIMIT_AS, used + memory), (resource.RLIMIT_CPU, cpu_seconds)):
        resource.setrlimit(kind, (capped(kind, wanted),) * 2)
    stack = capped(resource.RLIMIT_STACK, STACK_BYTES), resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, stack)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
