"""The frame of a program that carries out one order for a server: JSON in, JSON out, an exit code that tells the rest.

`adapters.offline.mix` and `adapters.offline.merge` are such programs; `server.children.worker` starts them.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from adapters.disk import is_full
from adapters.peft_format.fields import AdapterError

REFUSED = 3  # exit code: the order is at fault, and the answer says how
DISK_FULL = 4  # exit code
_NICENESS = 10  # whoever serves goes first


def carry_out(work: Callable[[Mapping[str, Any]], Any]) -> None:
    """Read an order from standard input, do the work, write its answer to standard output."""
    os.nice(_NICENESS)
    try:
        answer = work(json.load(sys.stdin))
    except AdapterError as refusal:
        json.dump({"message": str(refusal), "param": refusal.param, "code": refusal.code}, sys.stdout)
        sys.exit(REFUSED)
    except Exception as fault:
        if not is_full(fault):
            raise
        sys.exit(DISK_FULL)
    json.dump(answer, sys.stdout)
