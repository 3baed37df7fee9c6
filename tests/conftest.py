"""What many tests share: one tiny model, one cache, engines over them."""

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests import interpreter

interpreter.prepare()

from tests.tiny import tiny_model  # noqa: E402 - transformers imports Triton

# How long a case takes says more about the machine than about the code.
hypothesis.settings.register_profile("lorakeet", deadline=None)
hypothesis.settings.load_profile("lorakeet")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and interpreter.DEVICE != "cuda":
        pytest.skip("needs an NVIDIA GPU")
    if item.get_closest_marker("slow") and "slow" not in item.config.option.markexpr:
        pytest.skip("takes minutes: ask for it with -m slow")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of quantised bases and self-check results for the whole run."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama."""
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def triton_kernels() -> Iterator[None]:
    """Tensors of `interpreter.DEVICE` go to the Triton kernels, for the whole of a module."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in interpreter.switch_on().items():
            patch.setenv(name, value)
        yield
