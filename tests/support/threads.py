"""Calls that begin at the same time."""

import threading
from collections.abc import Callable
from typing import Any


def together(*works: Callable[[], object]) -> list[Any]:
    """What each did, or the fault that it met, all at once."""
    results: list[Any] = [None] * len(works)
    barrier = threading.Barrier(len(works))

    def run(i: int) -> None:
        barrier.wait()
        try:
            results[i] = works[i]()
        except Exception as fault:
            results[i] = fault

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
