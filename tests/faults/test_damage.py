"""Files whose bytes changed on disk: mended, or a 502 that names the adapter."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from adapters.peft_format.directory import CONFIG_NAME, SPEC_NAME, WEIGHTS_NAME
from adapters.peft_format.packed_rows import ROWS_NAME
from adapters.peft_format.record import RECORD_NAME
from tests.faults.conftest import Files
from tests.faults.test_faults import body, complete
from tests.support.running import RunningServer, eventually

pytestmark = pytest.mark.timeout(900)  # engines start slowly on a busy machine


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def lose(path: Path) -> None:
    path.unlink()


def forgotten(server: RunningServer) -> None:
    """Start a new engine, which has to read everything from disk."""
    old = server.engine_pid
    os.kill(old, signal.SIGKILL)
    # For a moment no engine runs, and `/ready` does not know it yet.
    eventually(lambda: server.wait_ready()["engine_pid"] not in (old, None), 180, "a new engine")


def directory_of(server: RunningServer, name: str) -> Path:
    digest = server.get(f"/v1/adapters/{name}").json()["digest"]
    return server.data_dir / "adapters" / "versions" / digest.removeprefix("sha256:")


def test_damaged_derived_files_are_mended_and_outputs_stay_the_same(server: RunningServer) -> None:
    before = {name: complete(server, name)["choices"][0]["text"] for name in ("red", "green", "blue")}
    damages: list[tuple[str, Callable[[Path], None], str]] = [
        ("red", flip, ROWS_NAME),
        ("green", cut, ROWS_NAME),
        ("blue", flip, SPEC_NAME),
    ]
    for name, damage, file in damages:
        damage(directory_of(server, name) / file)
    forgotten(server)
    assert {name: complete(server, name)["choices"][0]["text"] for name in before} == before
    for name, damage, file in (("red", lose, RECORD_NAME), ("green", flip, RECORD_NAME), ("blue", lose, SPEC_NAME)):
        damage(directory_of(server, name) / file)
    assert server.get("/v1/adapters/blue").status_code == 200
    forgotten(server)
    assert httpx.post(f"{server.url}/v1/adapters/red/warm", timeout=180).status_code == 200
    assert {name: complete(server, name)["choices"][0]["text"] for name in before} == before


@pytest.mark.parametrize("file", [WEIGHTS_NAME, CONFIG_NAME])
def test_damaged_originals_are_a_502_until_uploaded_again(server: RunningServer, made: Files, file: str) -> None:
    before = complete(server, "red")["choices"][0]["text"]
    directory = directory_of(server, "red")
    flip(directory / ROWS_NAME)
    flip(directory / file)
    forgotten(server)
    for _ in range(2):
        response = httpx.post(f"{server.url}/v1/completions", json=body("red"), timeout=180)
        assert response.status_code == 502, response.text
        error = response.json()["error"]
        assert error["code"] == "adapter_damaged"
        assert "`red`" in error["message"]
        assert directory.name in error["message"]
    assert server.get("/v1/adapters/red/weights").status_code == 502
    assert complete(server, "green")
    assert made.upload(server, "red", "red").status_code == 200
    assert complete(server, "red")["choices"][0]["text"] == before
    assert server.get("/v1/adapters/red/weights").status_code == 200
