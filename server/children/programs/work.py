"""A program that runs functions of modules, one order after another: `{"function": "a.module.function", "order": ...}`.

The sender of orders is trusted; the files that they name need not be. A function takes one argument; the order is
converted to its type.
"""

import errno
import importlib
import os
import traceback
from typing import Any, get_type_hints

import msgspec

from adapters.disk import is_disk_full
from adapters.peft_format.fields import AdapterError
from server.children.frames import serve


def answer(content: bytes) -> bytes:
    """Return the content of the frame that answers an order's; see `server.children.helper`."""
    result: Any
    try:
        return msgspec.json.encode({"answer": _run_order(**msgspec.json.decode(content))}, enc_hook=str)
    except AdapterError as refusal:
        result = {"refused": {"message": str(refusal), "param": refusal.param, "code": refusal.code}}
    except MemoryError:
        result = {"limit": "takes too much memory"}
    except Exception as fault:
        result = traceback.format_exc()
        if is_disk_full(fault):
            result = {"system": (errno.ENOSPC, os.strerror(errno.ENOSPC))}
        elif isinstance(fault, OSError) and fault.errno is not None:
            result = {"system": (fault.errno, fault.strerror)}
    return msgspec.json.encode(result)


def _run_order(function: str, order: Any) -> Any:
    module, _, name = function.rpartition(".")
    work = getattr(importlib.import_module(module), name)
    kind = next(hint for key, hint in get_type_hints(work).items() if key != "return")
    return work(msgspec.convert(order, kind, dec_hook=lambda kind, value: kind(value)))


if __name__ == "__main__":
    serve(answer)
