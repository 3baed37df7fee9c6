"""A program that renders chat templates which nobody vouches for, each in a child of its own.

For each order it forks: the child limits itself, renders and is gone, so no template meets another one's messages, and
what loops or explodes takes only its child with it. `server.text.sandbox` is the other end.
"""

import json
import os
import resource
import signal
import sys
from functools import partial
from typing import Any

import jinja2

from server.children.frames import end_with_parent, serve
from server.text.chat_template import ChatTemplate, TemplateRefusal


def answer(seconds: float, cpu_seconds: int, memory: int, order: bytes) -> bytes:
    """The child's answer, or one in its place."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(source)
            end_with_parent()
            _limit(seconds, cpu_seconds, memory)
            made = json.dumps(_carry_out(json.loads(order)), ensure_ascii=False).encode()
            with os.fdopen(sink, "wb") as pipe:
                pipe.write(made)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(sink)
    with os.fdopen(source, "rb") as pipe:
        made = pipe.read()
    _, status = os.waitpid(child, 0)
    return made if status == 0 else json.dumps({"limit": "takes too long, or too much memory"}).encode()


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


def _carry_out(order: dict[str, Any]) -> dict[str, Any]:
    try:
        template = ChatTemplate(order["source"], order["special_tokens"], order["max_characters"])
        text = template.render(order["messages"], **order["options"]) if order["messages"] is not None else ""
        text.encode()
        return {"answer": text}
    except TemplateRefusal as refusal:
        return _refused(refusal.message, refusal.param)
    except jinja2.TemplateError as fault:
        return _refused(f"The chat template is not valid: {fault}", "chat_template")
    except RecursionError:
        return _refused("The chat template is nested too deep.", "chat_template")
    except UnicodeEncodeError:
        return _refused("The chat template writes half a surrogate pair.", "messages")
    except MemoryError:
        return {"limit": "takes too much memory"}


def _refused(message: str, param: str) -> dict[str, Any]:
    return {"refused": {"message": message, "param": param}}


if __name__ == "__main__":
    serve(partial(answer, float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
