"""Compiling the native library: once, safely, and optional: without it the server is only slower."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from adapters import kernels
from adapters.kernels import QuantizedWeight, build, native


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small sources, an empty cache and nothing prebuilt, so that compiling is quick and touches no real files."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.cpp").write_text('extern "C" __attribute__((visibility("default"))) int one() { return 1; }\n')
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "PREBUILT", sources / "build")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return sources


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Reset `native.load`, now and after the test, so that it tries again."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


def test_concurrent_loads_compile_a_library_once(elsewhere: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(4) as executor:
        paths = set(executor.map(build.compiled_library, ["portable"] * 4))
    assert len(paths) == 1
    assert list(build.cache_dir().glob("*.so")) == [paths.pop()]
    assert caplog.text.count("compiling") == 1


def test_changed_sources_are_another_library(elsewhere: Path) -> None:
    before = build.compiled_library("portable")
    (elsewhere / "one.cpp").write_text('extern "C" int one() { return 2; }\n')
    assert build.compiled_library("portable") != before


def test_a_user_without_a_home_has_nowhere_to_keep_it(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(build.BuildError, match="home"):
        build.compiled_library("portable")


def test_prebuilt_needs_no_compiler(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.main()
    assert len(list((elsewhere / "build").iterdir())) == len(build.instruction_sets())
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.compiled_library("portable").parent == elsewhere / "build"


def test_broken_sources_name_the_error(elsewhere: Path) -> None:
    (elsewhere / "one.cpp").write_text("int one() { return }\n")
    with pytest.raises(build.BuildError, match="expected"):
        build.compiled_library("portable")
    assert not any(path.suffix == ".so" for path in build.cache_dir().rglob("*"))


def test_without_a_compiler_one_warning_and_the_twin(
    elsewhere: Path, forgetful: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    weight = QuantizedWeight.from_linear(torch.nn.Linear(8, 4))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert kernels.base_linear(torch.randn(2, 8), weight).shape == (2, 4)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "slower" in caplog.text


def test_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_NATIVE", "0")
    assert native.load() is None


def test_threads_come_from_torch_and_the_process_ends() -> None:
    """Sleeping workers do not keep the process alive, and a caller on another thread does not hang."""
    script = """
import threading, torch
from adapters import kernels
torch.set_num_threads(3)
weight = kernels.QuantizedWeight.from_linear(torch.nn.Linear(512, 512).requires_grad_(False))
x = torch.randn(4, 512)
expected = kernels.base_linear(x, weight)
def work():
    for _ in range(50):
        assert torch.equal(kernels.base_linear(x, weight), expected)
threads = [threading.Thread(target=work) for _ in range(3)]
[t.start() for t in threads]
[t.join() for t in threads]
print("fine")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout == "fine\n"
