"""Address and model of the server that `tests.support.clients` started."""

import os

import pytest


@pytest.fixture(scope="session")
def url() -> str:
    return os.environ["SERVER_URL"]


@pytest.fixture(scope="session")
def api(url: str) -> str:
    return f"{url}/v1"


@pytest.fixture(scope="session")
def model() -> str:
    return os.environ["SERVER_MODEL"]


@pytest.fixture(scope="session")
def model_dir() -> str:
    return os.environ["SERVER_MODEL_DIR"]
