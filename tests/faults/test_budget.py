"""The cost of bodies is bounded: time in proportion to their size, and no other request waits for them."""

import gc
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.http.operations import Operation
from server.http.routes import ui
from tests.support.abuse import ADAPTER, Seen, ask, cases
from tests.support.scripted import Served, serving

GAP = 0.04  # the longest allowed processor time of the event loop without a pause, in seconds
SIZE = 100 * 1024  # `make abuse` uses the largest accepted sizes


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, lora_dir=tmp_path) as served:
        await served.add_adapter(tmp_path, ADAPTER)
        yield served
    gc.enable()


def pace() -> float:
    """The slowdown of this machine relative to that of the budget; at least 1."""
    tries = []
    for _ in range(3):
        before = time.process_time()
        sum(i for i in range(640_000))
        tries.append(time.process_time() - before)
    return max(1.0, min(tries) / 0.016)


def is_slow(half: Seen, whole: Seen, pace: float) -> bool:
    return whole.gap > GAP * pace or whole.seconds > 0.2 * pace or whole.seconds > 3 * half.seconds + 0.02 * pace


async def test_every_body_of_every_operation_keeps_the_budget(served: Served) -> None:
    operations = [route for route in served.app.routes if isinstance(route, Operation)]
    assert len(operations) == len(served.app.routes) - len(ui.routes)
    gc.disable()  # a collection's cost is not the body's, and the server freezes its objects at start
    tried, slow = 0, []
    for case in cases(operations):
        method, path = case.operation.method, case.path
        whole = await ask(served.app, method, path, case.body(SIZE))
        for _ in range(9):  # a busy machine may be too slow to compile a grammar now
            if whole.status == 503:
                whole = await ask(served.app, method, path, case.body(SIZE))
        assert 200 <= whole.status < 500, (case, whole)
        assert whole.answer < 20 * SIZE, (case, whole)
        if whole.seconds > 0.1 or whole.gap > GAP:
            tries = []
            for _ in range(3):  # processor time also grows with load on the machine
                half, whole = [await ask(served.app, method, path, case.body(size)) for size in (SIZE // 2, SIZE)]
                tries.append((half, whole))
            if all(is_slow(half, whole, pace()) for half, whole in tries):
                slow.append((str(case), tries))
        tried += 1
    assert not slow
    assert tried > 300
