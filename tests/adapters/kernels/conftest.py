"""Fixtures that run every kernel test on each available implementation: plain torch, and C++ per instruction set."""

from collections.abc import Iterator
from typing import Any

import pytest

from adapters.kernels import build, native, reference


def _instruction_sets() -> list[str]:
    names = list(build.instruction_sets())
    return names[names.index(build.best_instruction_set()) :]


def load_native(instruction_set: str) -> native.Kernels:
    kernels = native.load(instruction_set)
    if kernels is None:
        pytest.skip("no C++ compiler, or LORAKEET_NATIVE=0")
    return kernels


@pytest.fixture(scope="session", params=["reference", *_instruction_sets()])
def kernels(request: pytest.FixtureRequest) -> Any:
    """An implementation: `reference`, or `native.Kernels`. Both have the same functions."""
    return reference if request.param == "reference" else load_native(request.param)


@pytest.fixture(scope="session", params=_instruction_sets())
def compiled(request: pytest.FixtureRequest) -> native.Kernels:
    """The C++ kernels."""
    return load_native(request.param)


@pytest.fixture(scope="module", params=[True, False], ids=["vnni", "no vnni"])
def either(request: pytest.FixtureRequest, compiled: native.Kernels) -> Iterator[native.Kernels]:
    """The kernels with and without the CPU's own 8-bit dot products."""
    if compiled.instruction_set != "avx512" and request.param:
        pytest.skip("it has none")
    compiled.set_vnni(request.param)
    yield compiled
    compiled.set_vnni(True)


@pytest.fixture(scope="module", autouse=True)
def several_threads(two_threads: None) -> None:
    """Results must not depend on which thread does a task."""
