"""Every program in `examples/` runs as its docstring says, against a real server over a tiny base."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.running import BASE, REPOSITORY, RunningServer
from tests.support.tiny import tiny_adapter, tiny_model

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    return tiny_adapter(root / "adapter", tiny_model(root / "model"), seed=1)


@pytest.fixture(scope="module")
def server(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    root = tmp_path_factory.mktemp("server")
    server = RunningServer(adapter.parent / "model", root, root / "data", "--adapter", f"parrot={adapter}")
    server.ensure()
    yield server
    server.stop()


def run(server: RunningServer, program: str, *arguments: str) -> list[str]:
    """The lines that an example prints."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / program), *arguments]
    environment = os.environ | {"LORAKEET_URL": server.url}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_chat(server: RunningServer) -> None:
    digest = server.get("/v1/adapters/parrot").json()["digest"]
    *_, served = run(server, "chat.py", "parrot", "Hello!")
    assert served == f"answered by {digest}"


def test_upload(server: RunningServer, adapter: Path) -> None:
    uploaded, *_ = run(server, "upload.py", "uploaded", str(adapter))
    assert uploaded == f"uploaded is {server.get('/v1/adapters/uploaded').json()['digest']}"


def test_fine_tune(server: RunningServer, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} is", "completion": f" {n}"}) + "\n" for n in range(8)))
    lines = run(server, "fine_tune.py", str(data), "numbers")
    name = next(line for line in lines if line.startswith("ft:")).partition(": ")[0]
    assert name.startswith(f"ft:{BASE}:numbers:")
    assert server.get(f"/v1/adapters/{name}").status_code == 200


def test_metrics_and_many_adapters(server: RunningServer, adapter: Path) -> None:
    run(server, "upload.py", "second", str(adapter))
    *answers, total = run(server, "many_adapters.py", "The quick brown fox", "parrot", "second")
    assert [line.partition(":")[0] for line in answers] == ["parrot", "second"]
    assert total.startswith("2 adapters, ")
    *adapters, load = run(server, "metrics.py")
    assert {"parrot", "second"} <= {line.partition(":")[0] for line in adapters}
    assert load.startswith("0 running, 0 waiting, ")


def test_every_example_is_run_by_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{program.name}"' in text for program in EXAMPLES.glob("*.py"))
