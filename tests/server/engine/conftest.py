"""What the engine's tests share beside the tiny model: one of a single layer, where Triton's interpreter runs them."""

from pathlib import Path

import pytest

from tests.support import interpreter
from tests.support.tiny import tiny_model


@pytest.fixture(scope="session")
def shallow_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama; of one layer for the interpreter, for tests that run many steps."""
    if interpreter.whole_suite():
        return tiny_model(tmp_path_factory.mktemp("shallow"), num_hidden_layers=1)
    return model_dir
