"""Fixtures shared by many tests: one tiny model, one cache, engines on them."""

import functools
import gc
import logging
import os
import shutil
import ssl
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported: idle threads must sleep, not spin, or two test processes on two cores disturb each other.
# The native kernels spin between jobs, so workers have one thread, except in modules that use `two_threads`.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

from tests.support import interpreter, running

# Bytecode is written once, in any environment, instead of being compiled by every worker and every process of a test.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
interpreter.prepare()

from adapters import kernels  # noqa: E402
from tests.support.loop_guard import guarded  # noqa: E402
from tests.support.tiny import tiny_model  # noqa: E402 - transformers imports Triton

if TYPE_CHECKING:
    from tests.support.buckets import S3Server

# Temporary files are in memory if there is room, since many tests mostly wait for the disk. tests.support.power_cut
# checks, call by call, that data is synced before it is acknowledged.
MEMORY, ROOM = Path("/dev/shm"), 4 << 30
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC:
    tempfile.tempdir = os.environ.setdefault("TMPDIR", str(MEMORY))

gc.disable()  # until everything is imported, since it would scan all of it repeatedly

# Every httpx client, and so every `httpx.get`, reads all certificates: 50 ms, and no test uses TLS.
ssl.create_default_context = functools.cache(ssl.create_default_context)  # type: ignore[assignment]


def seed(number: int) -> None:
    """Seed torch's generators.

    `torch.manual_seed` writes a stack trace for every kind of device that is missing: a millisecond before every test
    and every case.
    """
    if torch.cuda.is_available():
        torch.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


class TorchRandom:
    """torch's generator, seeded by hypothesis before every case, like Python's and numpy's."""

    seed = staticmethod(seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


# Every run draws the same cases, so that a failure is due to a change; HYPOTHESIS_PROFILE=explore draws new ones. No
# deadlines: the time of a case or of its draw depends more on the machine than on the code.
TORCH_RANDOM = TorchRandom()  # hypothesis keeps only a weak reference
hypothesis.register_random(TORCH_RANDOM)
SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("lorakeet", deadline=None, derandomize=True, suppress_health_check=SLOW)
hypothesis.settings.register_profile("explore", deadline=None, suppress_health_check=SLOW)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "lorakeet"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    seed(0)


# The slowest files run first, so that the workers finish at about the same time.
LONGEST = (
    "tests/faults/",
    "tests/adapters/kernels/test_triton.py",
    "tests/server/training/",
    "tests/server/test_model_source.py",
    "tests/sweep/",
    "tests/server/http/test_openapi.py",
    "tests/server/http/test_resident_merges.py",
    "tests/server/http/test_variants.py",
    "tests/server/engine/test_churn.py",
    "tests/server/engine/",
    "tests/examples/",
    "tests/ui/",
    "tests/adapters/kernels/",
    "tests/test_packaging.py",
)


collect_ignore = ["clients"]  # run by `make clients`, in separate environments


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # otherwise xdist would start with the files that have the most tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((i for i, path in enumerate(LONGEST) if item.nodeid.startswith(path)), len(LONGEST))

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Freeze the imported objects, so that the collector does not scan them in every test."""
    gc.freeze()
    gc.enable()
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True  # otherwise pytest adds its handlers to the logger before every phase of a test


@pytest.fixture(autouse=True)
def no_database_on_the_event_loop() -> Iterator[None]:
    with guarded():
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and interpreter.DEVICE != "cuda":
        pytest.skip("needs an NVIDIA GPU")
    if item.get_closest_marker("abuse") and "abuse" not in item.config.option.markexpr:
        pytest.skip("takes minutes: run by make abuse")
    if item.get_closest_marker("ray") and "ray" not in item.config.option.markexpr:
        pytest.skip("needs Ray: run by make ray")
    if item.get_closest_marker("slow") and "slow" not in item.config.option.markexpr:
        pytest.skip("takes long: run by make slow")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of quantised bases and self-check results for the whole run."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama."""
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def forked_engines() -> Iterator[None]:
    """Fork engine processes from one process that has their imports, for a whole module."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in running.forking().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def forked_helpers(forked_engines: None) -> Iterator[None]:
    """Fork helper processes that merge and mix too, since they need torch."""
    with pytest.MonkeyPatch.context() as patch:
        if "PRELOADED" in os.environ:
            patch.setenv("PRELOADED_HELPERS", os.environ["PRELOADED"])
        yield


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """Run torch and the native kernels on two threads, for a whole module."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    kernels.set_threads(2)
    yield
    torch.set_num_threads(before)
    kernels.set_threads(before)


@pytest.fixture(scope="module")
def triton_kernels() -> Iterator[None]:
    """Use the Triton kernels for tensors of `interpreter.DEVICE`, for a whole module."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in interpreter.switch_on().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def s3() -> "Iterator[S3Server]":
    """An S3 server for the tests of a file."""
    from tests.support.buckets import S3Server

    server = S3Server()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3_url(s3: "S3Server", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of a store on that server, for one test; injected faults end with the test."""
    from tests.support.buckets import BUCKET

    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    yield f"s3://{BUCKET}/{tmp_path.name}"
    s3.suffer()


@pytest.fixture(params=["file", "s3"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an object store of each kind."""
    return request.getfixturevalue("s3_url") if request.param == "s3" else f"file://{tmp_path}/bucket"
