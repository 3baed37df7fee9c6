"""A trainer over the tiny base."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from server.engine.engine import Engine
from server.model.base import Base
from server.training.trainer import Trainer
from tests.support import offline as engines


@pytest.fixture(scope="module")
def engine(model_dir: Path, cache_dir: Path) -> Engine:
    return engines.load_engine(model_dir, cache_dir)


@pytest.fixture
def base(engine: Engine) -> Base:
    return engine.base


@pytest.fixture
def trainer(base: Base) -> Iterator[Trainer]:
    trainer = Trainer(base)
    yield trainer
    trainer.close()
