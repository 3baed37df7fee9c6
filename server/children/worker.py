"""Heavy arithmetic in a process of its own: torch stays out of this one, and whoever waits can stop waiting.

The other end is `adapters.offline.worker`.
"""

import asyncio
import errno
import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from adapters.offline.worker import DISK_FULL, REFUSED
from adapters.peft_format.fields import AdapterError

log = logging.getLogger(__name__)


class WorkerFailed(RuntimeError):
    """The worker broke down; its log says why."""


class WorkerTooSlow(TimeoutError):
    """The worker did not come to an end in time, and was ended."""


async def run_worker(module: str, order: Mapping[str, Any], seconds: float) -> Any:
    """Let `python -m module` carry out an order; its answer. Cancelling ends the process.

    Raises:
        AdapterError: the worker refused the order.
        OSError: the disk is full.
        WorkerTooSlow, WorkerFailed.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
    )
    try:
        async with asyncio.timeout(seconds):
            answer, errors = await process.communicate(json.dumps(order).encode())
    except TimeoutError:
        raise WorkerTooSlow(f"not done within {seconds:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode == REFUSED:
        raise AdapterError(**json.loads(answer))
    if process.returncode == DISK_FULL:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if process.returncode:
        log.error("%s ended with %d: %s", module, process.returncode, errors.decode(errors="replace")[-2000:])
        raise WorkerFailed(f"{module} ended with {process.returncode}")
    return json.loads(answer)
