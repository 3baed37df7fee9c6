"""A worker process with a protocol of JSON lines: it first reads its settings, and answers once it is ready."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Ask = Callable[[dict[str, Any]], Any]


class WorkerError(RuntimeError):
    """A worker that ended early; the message has the end of its output."""


@contextlib.contextmanager
def worker(
    module: str, settings: dict[str, Any], environment: Mapping[str, str] | None = None
) -> Iterator[tuple[Ask, Any]]:
    """Start `python -m module`; yield a function that sends requests, and the first answer. Raises WorkerError if it
    ends early."""
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=os.environ | (environment or {}),
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        to, back = child.stdin, child.stdout

        def ask(message: dict[str, Any]) -> Any:
            with contextlib.suppress(BrokenPipeError):  # it has ended; the log has the reason
                to.write(json.dumps(message) + "\n")
                to.flush()
            answer = back.readline()
            if not answer:
                log.seek(0)
                raise WorkerError(f"{module} ended: {log.read()[-1500:]}")
            return json.loads(answer)

        try:
            yield ask, ask(settings)
        finally:
            child.kill()
            with contextlib.suppress(BrokenPipeError):
                to.close()
