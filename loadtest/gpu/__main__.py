"""`python -m loadtest.gpu [LETTERS ...]`: run all parts or the given ones, print a verdict per line, keep the result.

Results go to `loadtest/results/gpu-<device>.json` and `.md`; other parts stay there as they are. Exits with 1 unless
every line holds. `--smoke` tries the command on a CPU, in a minute: its figures mean nothing.
"""

import argparse
import sys
import tempfile
import traceback
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from loadtest import machine
from loadtest.gpu.lines import Line, Part, write_results
from loadtest.gpu.models import FULL, SMOKE, Size
from loadtest.gpu.parts import PARTS, Bench

RESULTS = Path(__file__).parent.parent / "results"
NEEDED = ("triton", "transformers", "bitsandbytes", "peft", "msgspec", "safetensors", "psutil", "pytest", "hypothesis")


def main(arguments: list[str]) -> int:
    """Run the requested parts; return the exit status."""
    parser = argparse.ArgumentParser("python -m loadtest.gpu", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="LETTERS", help=f"of {', '.join(PARTS)} [default: all]")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU, nothing kept but under --results")
    parser.add_argument("--models", nargs="+", choices=FULL.models, help="of these shapes only")
    parser.add_argument("--layers", type=int, help="of each model, in place of all: for a GPU that is lent for minutes")
    parser.add_argument("--rounds", type=int, help=f"of each measurement [default: {FULL.rounds}]")
    parser.add_argument("--window", type=float, help=f"seconds of standing load [default: {FULL.window:.0f}]")
    parser.add_argument("--folder", type=Path, help="where models are made, and kept for the next run")
    parser.add_argument("--results", type=Path, help="where results go [default: loadtest/results]")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if not options.smoke and not torch.cuda.is_available():
        print("No NVIDIA GPU that torch can use: nothing was measured.", file=sys.stderr)
        return 2
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(f"Not installed, so that some lines cannot be measured: {', '.join(missing)}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="lorakeet-gpu-") as folder:
        bench = Bench(options.folder or Path(folder), SMOKE if options.smoke else size_of(options))
        parts = [run(name, bench, arguments) for name in options.parts or PARTS]
    results = options.results or (None if options.smoke else RESULTS)
    if results is not None:
        write_results(results / f"gpu-{'-'.join(parts[0].machine['gpu'].lower().split())}", parts)
    return 0 if all(line.held for part in parts for line in part.lines) else 1


def size_of(options: argparse.Namespace) -> Size:
    """Return the full size, changed by the arguments."""
    layers = {} if options.layers is None else {"num_hidden_layers": options.layers}
    return replace(
        FULL,
        models={name: FULL.models[name] | layers for name in options.models or FULL.models},
        rounds=options.rounds or FULL.rounds,
        window=options.window or FULL.window,
    )


def run(name: str, bench: Bench, arguments: list[str]) -> Part:
    """Run one part; its failure becomes a line and does not stop the others."""
    circumstances: dict[str, Any] = machine.describe([sys.executable, "-m", "loadtest.gpu", *arguments])
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    circumstances |= {"gpu": gpu, "cuda": torch.version.cuda}
    bench.raw = {}
    try:
        lines = PARTS[name](bench)
    except Exception as fault:
        traceback.print_exc()
        reason = str(fault).strip().splitlines() or [type(fault).__name__]
        lines = [Line(name, PARTS[name].__name__, "runs", reason[-1][:200], None)]
    for line in lines:
        print(line.text, flush=True)
    return Part(name, circumstances, lines, bench.raw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
