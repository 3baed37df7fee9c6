"""A program that renders chat templates which nobody vouches for, each in a child of its own.

One order a line on standard input, one answer a line on standard output, in JSON. For each order it forks: the child
limits itself, renders and is gone, so no template meets another one's messages, and what loops or explodes takes only
its child with it. `server.text.sandbox` is the other end.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from typing import Any

import jinja2

from server.text.chat_template import ChatTemplate, TemplateRefusal

Answer = dict[str, Any]  # "text", or "error" and "param"


def main() -> None:
    """Serve until standard input ends. Arguments: wall seconds, CPU seconds, bytes of memory."""
    seconds, cpu_seconds, memory = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(_in_a_child(line, seconds, cpu_seconds, memory) + b"\n")
        sys.stdout.buffer.flush()


def _in_a_child(line: bytes, seconds: float, cpu_seconds: int, memory: int) -> bytes:
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(source)
            _limit(seconds, cpu_seconds, memory)
            answer = json.dumps(_carry_out(json.loads(line))).encode()
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
    return json.dumps({"error": "The adapter's chat template takes too long, or too much memory."}).encode()


def _limit(seconds: float, cpu_seconds: int, memory: int) -> None:
    """What this process may use from now on; who exceeds it is ended by the kernel."""
    with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123
        taken = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)


def _carry_out(order: dict[str, Any]) -> Answer:
    with contextlib.suppress(MemoryError):
        try:
            template = ChatTemplate(order["source"], order["special_tokens"])
            return {"text": template.render(order["messages"], **order["options"]) if "messages" in order else ""}
        except TemplateRefusal as refusal:
            return {"error": refusal.message, "param": refusal.param}
        except jinja2.TemplateError as fault:
            return {"error": f"The chat template is not valid: {fault}", "param": "chat_template"}
        except RecursionError:
            return {"error": "The chat template is nested too deep.", "param": "chat_template"}
    return {"error": "The adapter's chat template takes too much memory."}


if __name__ == "__main__":
    main()
