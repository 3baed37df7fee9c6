"""Fixtures of the engine's tests: a single-layer version of the tiny model for Triton's interpreter."""

from pathlib import Path

import pytest

from tests.support import interpreter
from tests.support.tiny import tiny_model


@pytest.fixture(scope="session")
def shallow_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama; with one layer for the interpreter, for tests that run many steps."""
    if interpreter.whole_suite():
        return tiny_model(tmp_path_factory.mktemp("shallow"), num_hidden_layers=1)
    return model_dir
