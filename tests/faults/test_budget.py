"""No body, however bad, costs more than a little: time in proportion to its size, and nobody waits for it."""

import gc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from server.http.operations import Operation
from server.http.routes import ui
from tests.support.abuse import ADAPTER, ask, cases
from tests.support.scripted import Served, serving

GAP = 0.04  # seconds of the event loop's processor time without a pause
SIZE = 100 * 1024  # `make abuse` takes the largest that are accepted


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, lora_dir=tmp_path) as served:
        await served.add_adapter(tmp_path, ADAPTER)
        yield served
    gc.enable()


async def test_every_body_of_every_operation_keeps_the_budget(served: Served) -> None:
    operations = [route for route in served.app.routes if isinstance(route, Operation)]
    assert len(operations) == len(served.app.routes) - len(ui.routes)
    gc.disable()  # what a collection costs is not the body's, and the server freezes what it has at start
    tried, slow = 0, []
    for case in cases(operations):
        method, path = case.operation.method, case.path
        whole = await ask(served.app, method, path, case.body(SIZE))
        assert 200 <= whole.status < 500, (case, whole)
        assert whole.answer < 20 * SIZE, (case, whole)
        if whole.seconds > 0.1 or whole.gap > GAP:
            half = await ask(served.app, method, path, case.body(SIZE // 2))
            whole = await ask(served.app, method, path, case.body(SIZE))
            if whole.gap > GAP or whole.seconds > 0.2 or whole.seconds > 3 * half.seconds + 0.02:
                slow.append((str(case), half, whole))
        tried += 1
    assert not slow
    assert tried > 300
