"""A program that checks adapters, one after another, for a server that must not share its interpreter with that.

Orders come pickled on standard input and answers go out on standard output; it ends with its input. Whoever starts it
is trusted, what it checks is not. `server.children.checker` is the other end.
"""

import dataclasses
import os
import pickle
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.background import Priority, give_way
from adapters.peft_format import packed_rows as rowfile
from adapters.peft_format.conversion import convert
from adapters.peft_format.directory import WEIGHTS_NAME, AdapterSpec, inspect
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.outline import Outline
from adapters.peft_format.sizes import LinearSize
from adapters.peft_format.text import AdapterText


@dataclass(frozen=True)
class Check:
    """What `adapters.peft_format.directory.inspect` wants to know."""

    directory: Path
    linears: Mapping[str, LinearSize]
    model_class: str
    outline: Outline | None
    text: AdapterText

    def run(self) -> AdapterSpec:
        """Convert and inspect the adapter, and lay its rows out beside it. Raises AdapterError, OSError."""
        weights = self.directory / WEIGHTS_NAME
        converted = convert(weights) if weights.is_file() else []
        spec = inspect(self.directory, self.linears, self.model_class, self.outline, self.text)
        spec = dataclasses.replace(spec, warnings=(*converted, *spec.warnings))
        rowfile.make(self.directory, spec)
        return spec


@dataclass(frozen=True)
class Refused:
    """An AdapterError on its way."""

    message: str
    param: str
    code: str | None


Answer = AdapterSpec | Refused | OSError


def answer_to(check: Check) -> Answer:
    """What came of it."""
    try:
        return check.run()
    except AdapterError as fault:
        return Refused(str(fault), fault.param, fault.code)
    except OSError as fault:
        return OSError(fault.errno, fault.strerror)


def main(priority: Priority) -> None:
    """Answer until there is nothing more to read."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; whoever started this decides
    give_way(priority)
    orders, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    while size := orders.read(8):
        content = pickle.dumps(answer_to(pickle.loads(orders.read(int.from_bytes(size, "little")))))
        answers.write(len(content).to_bytes(8, "little") + content)
        answers.flush()


if __name__ == "__main__":
    from adapters.offline import checker  # by its name: what is pickled here is looked for there

    checker.main(sys.argv[1])  # type: ignore[arg-type]  # it comes from a setting that is one
