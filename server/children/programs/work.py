"""A program that runs functions of modules, one order after another: `{"function": "a.module.function", "order": ...}`.

Whoever sends the orders is trusted; the files that they name need not be. A function takes one argument, whose type
says what the order becomes.
"""

import importlib
import traceback
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from adapters.peft_format.fields import AdapterError
from server.children.frames import serve


class Order(msgspec.Struct):
    """A function by its full name, and its argument."""

    function: str
    order: msgspec.Raw


def answer(content: bytes) -> bytes:
    """The frame's content in answer to another's; see `server.children.helper`."""
    result: Any
    try:
        result = {"answer": _carry_out(msgspec.json.decode(content, type=Order))}
    except AdapterError as refusal:
        result = {"refused": {"message": str(refusal), "param": refusal.param, "code": refusal.code}}
    except MemoryError:
        result = {"limit": "takes too much memory"}
    except Exception as fault:
        result = traceback.format_exc()
        if isinstance(fault, OSError) and fault.errno is not None:
            result = {"system": (fault.errno, fault.strerror)}
    return msgspec.json.encode(result, enc_hook=str)


def _carry_out(order: Order) -> Any:
    module, _, name = order.function.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    hints = {key: hint for key, hint in get_type_hints(function).items() if key != "return"}
    (kind,) = hints.values()
    return function(msgspec.json.decode(order.order, type=kind, dec_hook=_path))


def _path(kind: type, value: Any) -> Any:
    if kind is not Path:
        raise NotImplementedError(kind)
    return Path(value)


if __name__ == "__main__":
    serve(answer)
