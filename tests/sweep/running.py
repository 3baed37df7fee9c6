"""Runs every type in its own process, with a time limit and bounded memory, forked from one with loaded libraries."""

import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SECONDS = 180  # for one type
MEMORY = 6 << 30  # bytes of one child's data


def child(model_type: str, directory: str) -> None:
    """Judge one type and write the verdict to a file; output of libraries goes to a log beside it."""
    path = Path(directory)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    log = os.open(path / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    warnings.simplefilter("ignore")
    import torch

    from tests.sweep.verdict import judge

    torch.set_num_threads(1)
    verdict = judge(model_type, path)
    (path / "verdict.json").write_text(json.dumps(verdict))


def sweep(types: list[str], workers: int) -> dict[str, tuple[str, str]]:
    """The verdicts by type, in the order of `types`; each is printed when it is known."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.sweep.verdict"])

    def judged(model_type: str) -> tuple[str, str]:
        started = time.monotonic()
        directory = tempfile.mkdtemp(prefix="lorakeet-sweep-")
        process = context.Process(target=child, args=(model_type, directory))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            verdict = ("unclear", f"no verdict after {SECONDS} s")
        else:
            try:
                word, reason = json.loads((Path(directory) / "verdict.json").read_text())
                verdict = (word, reason)
            except OSError:
                said = (Path(directory) / "log").read_text(errors="replace").strip().splitlines()[-1:]
                verdict = ("unclear", f"the process ended with {process.exitcode}: {' '.join(said)}")
        shutil.rmtree(directory, ignore_errors=True)
        print(f"{model_type:28} {verdict[0]:8} {time.monotonic() - started:5.1f} s  {verdict[1]}", flush=True)
        return verdict

    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(types, pool.map(judged, types), strict=True))
