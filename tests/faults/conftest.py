"""One server for the whole folder, with three adapters, if possible on its own small disk."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.support.running import RunningServer
from tests.support.tiny import tiny_adapter, tiny_model

DISK_MIB = 24
DRAIN_SECONDS = 60
ADAPTERS = ("red", "green", "blue")


@dataclass(frozen=True)
class Files:
    """The model and adapters made for these tests."""

    model: Path
    adapters: dict[str, Path]

    def upload(self, server: RunningServer, name: str, content: str) -> httpx.Response:
        """Upload one of the adapters under a name."""
        directory = self.adapters[content]
        files = {
            "config": (directory / "adapter_config.json").read_bytes(),
            "weights": (directory / "adapter_model.safetensors").read_bytes(),
        }
        return httpx.post(f"{server.url}/v1/adapters", data={"name": name}, files=files, timeout=180)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("made")
    model = tiny_model(root / "model")
    adapters = {name: tiny_adapter(root / name, model, seed=seed) for seed, name in enumerate(ADAPTERS, start=1)}
    return Files(model, adapters)


@pytest.fixture(scope="session")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A file system of `DISK_MIB`; None if this user may not mount one."""
    path = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        yield None
        return
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="session")
def running(made: Files, small_disk: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("server")
    server = RunningServer(made.model, root, small_disk or root / "data", "--drain-seconds", str(DRAIN_SECONDS))
    yield server
    server.stop()


@pytest.fixture
def server(running: RunningServer, made: Files) -> RunningServer:
    """The server, ready, with the three adapters under their own names."""
    running.ensure()
    for name in ADAPTERS:
        response = made.upload(running, name, name)
        assert response.status_code in (200, 201), response.text
    return running
