"""Compilation of the C++ kernels: at first use, or ahead of time with `python -m adapters.kernels.build`.

One library per instruction set, from plain C++ without torch's headers, so a build takes seconds. A built library is
kept in the user's cache, named by a hash of sources, flags and compiler; if several processes need it, one compiles and
the others wait. Libraries built ahead of time, for all instruction sets, lie beside the sources and are found first.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
PREBUILT = SOURCES / "build"
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off"]
X86 = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "portable": [],
}


class BuildError(Exception):
    """The kernels could not be compiled; the message gives the reason."""


def instruction_sets() -> dict[str, list[str]]:
    """Return the instruction sets of this kind of machine, best first, with their compiler flags."""
    return X86 if platform.machine() in {"x86_64", "AMD64"} else {"portable": []}


@cache
def best_instruction_set() -> str:
    """Return the best instruction set of this CPU; `ATEN_CPU_CAPABILITY` (torch's own switch) can lower it."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability if capability in instruction_sets() else "portable"


def compiled_library(instruction_set: str) -> Path:
    """Return the library for an instruction set: prebuilt, cached, or compiled now.

    Raises:
        BuildError: it must be compiled, and there is no working compiler.
    """
    prebuilt = PREBUILT / f"{_source_hash()}-{instruction_set}.so"
    if prebuilt.exists():
        return prebuilt
    compiler = _compiler()
    key = hashlib.sha256(f"{_source_hash()} {_version(compiler)}".encode()).hexdigest()[:16]
    cached = cache_dir() / f"{key}-{instruction_set}.so"
    if cached.exists():
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cached}.lock"):
            if not cached.exists():
                log.info("compiling the CPU kernels for %s (once)", instruction_set)
                compile_library(instruction_set, cached, compiler)
    except OSError as fault:
        raise BuildError(f"the compiled kernels could not be written: {fault}") from fault
    return cached


def compile_library(instruction_set: str, target: Path, compiler: list[str] | None = None) -> None:
    """Compile for one instruction set, and move the library to `target` atomically. Raises BuildError."""
    compiler = compiler or _compiler()
    flags = FLAGS + instruction_sets()[instruction_set]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
            sources = sorted(SOURCES.glob("*.cpp"))
            objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
            with ThreadPoolExecutor(os.cpu_count()) as executor:
                jobs = zip(sources, objects, strict=True)
                list(executor.map(lambda job: _run([*compiler, *flags, "-c", str(job[0]), "-o", str(job[1])]), jobs))
            library = Path(scratch) / target.name
            _run([*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(library)])
            library.replace(target)
    except OSError as fault:
        raise BuildError(f"the compiled kernels could not be written: {fault}") from fault


def cache_dir() -> Path:
    """Return the directory of compiled kernels. Raises BuildError."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakeet" / "kernels"
    except RuntimeError as fault:  # a user without a name, as in containers, and no HOME
        raise BuildError(f"there is no directory for the compiled kernels: {fault}") from None


def _compiler() -> list[str]:
    """Return the C++ compiler's command: `$CXX`, or the first usual one found. Raises BuildError."""
    if command := os.environ.get("CXX"):
        return shlex.split(command)
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("there is no C++ compiler (g++, c++ or clang++)")


def _version(compiler: list[str]) -> str:
    return _run([*compiler, "--version"])


def _source_hash() -> str:
    """Return a hash of sources and flags; equal hashes mean equal libraries from one compiler."""
    digest = hashlib.sha256(repr((FLAGS, X86, platform.machine())).encode())
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(f"{path.name}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as fault:
        raise BuildError(f"{command[0]}: {fault}") from fault
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise BuildError(f"{command[0]} failed: {first}")
    return done.stdout


def main() -> None:
    """Build all instruction sets of this kind of machine, beside the sources."""
    for instruction_set in instruction_sets():
        target = PREBUILT / f"{_source_hash()}-{instruction_set}.so"
        compile_library(instruction_set, target)
        print(target)


if __name__ == "__main__":
    main()
