"""A tiny engine that trains, and a server in front of it."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from server.engine.engine import Engine
from tests.support import offline as engines
from tests.support.site import TrainingEngine, TuningSite, tuning_site


@pytest.fixture(scope="module")
def tiny_engine(model_dir: Path, cache_dir: Path) -> Engine:
    return engines.load_engine(model_dir, cache_dir)


@pytest.fixture
def engine(tiny_engine: Engine) -> Iterator[TrainingEngine]:
    engine = TrainingEngine(tiny_engine)
    yield engine
    engine.close()


@pytest.fixture
async def site(tmp_path: Path, engine: TrainingEngine) -> AsyncIterator[TuningSite]:
    async with tuning_site(tmp_path / "data", engine) as site:
        yield site
