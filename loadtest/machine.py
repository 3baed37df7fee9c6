"""The circumstances of a result: machine, versions, command, date."""

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "peft", "numpy", "uvicorn", "starlette", "httptools")


def describe(command: list[str] | None = None) -> dict[str, Any]:
    """Return the circumstances of a run, as JSON values. `command` defaults to this process's own."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(command if command is not None else ["python", "-m", "loadtest", *sys.argv[1:]]),
        "commit": _commit(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "vector_extensions": _vector_extensions(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def cpu_model() -> str:
    """Return the processor's name from the system."""
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def slug(machine: dict[str, Any]) -> str:
    """Return a part of a file name for a machine: `amd-epyc-2-cores`."""
    return re.sub(r"[^a-z0-9]+", "-", f"{machine['cpu']} {machine['cores']} cores".lower()).strip("-")


def busy_cores(seconds: float) -> float:
    """Measure the machine's load over the next seconds, in busy cores (Linux; elsewhere 0)."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0

    def busy() -> float:
        user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, stat.read_text().split("\n", 1)[0].split()[1:])
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")

    before, start = busy(), time.monotonic()
    time.sleep(seconds)
    return (busy() - before) / max(time.monotonic() - start, 1e-9)


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _vector_extensions() -> list[str]:
    flags = set(_cpuinfo().split())
    return [name for name in ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if name in flags]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the checkout's commit, with `+` if files differ from it; None outside of a checkout."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None
