"""What many tests share: one tiny model, one cache, engines over them."""

from pathlib import Path

import pytest

from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of quantised bases and self-check results for the whole run."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama."""
    return tiny_model(tmp_path_factory.mktemp("tiny"))
