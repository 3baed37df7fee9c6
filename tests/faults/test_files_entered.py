"""The number of our files that one request enters: those listed in docs/architecture.md, in all processes together."""

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
import pytest

from tests.faults.conftest import Files
from tests.support import interpreter
from tests.support.running import REPOSITORY, RunningServer
from tests.support.tiny import tiny_adapter

pytestmark = pytest.mark.skipif(interpreter.DEVICE == "cuda", reason="the list is a CPU's: a GPU has other kernels")

PAGE = REPOSITORY / "docs/architecture.md"
HEARTBEAT = 1.2  # seconds within which an idle engine reports


def chat(server: RunningServer) -> None:
    """Send one request on an adapter that has answered before."""
    body = {"model": "red", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 8}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=180)
    assert response.status_code == 200, response.text


def listed(files: Mapping[str, set[str]]) -> str:
    """A line per process: the number of files, and the files by folder."""
    lines = []
    for part, names in files.items():
        folders: dict[str, list[str]] = {}
        for name in sorted(names):
            folder, _, file = name.rpartition("/")
            folders.setdefault(folder, []).append(file.removesuffix(".py"))
        lines.append(f"- {part}, {len(names)}: " + "; ".join(f"{at}: {', '.join(of)}" for at, of in folders.items()))
    return "\n".join(lines) + "\n"


def check(
    block: str, made: Callable[[], Mapping[str, set[str]]], beside: Mapping[str, set[str]]
) -> Mapping[str, set[str]]:
    """Check that the list in the page equals the files entered, without those that an idle server enters (`beside`).

    Mismatches are retried, and only files entered in every try count, since some work runs only every minute.
    """
    begin, end = f"<!-- {block}: begin -->\n", f"<!-- {block}: end -->"
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
    old, _, tail = rest.partition(end)
    entered = made()
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(head + begin + listed(entered) + end + tail, encoding="utf-8")
        return entered
    known: dict[str, set[str]] = {}
    for part, names in re.findall(r"- (\w+), \d+: (.*)", old):
        folders = [folder.split(": ") for folder in names.split("; ")]
        known[part] = {f"{at}/{name}.py" for at, files in folders for name in files.split(", ")}

    def unlike() -> dict[str, set[str]]:
        differing = {part: files ^ known.get(part, set()) for part, files in entered.items()}
        return {part: files - beside.get(part, set()) for part, files in differing.items()}

    for _ in range(2):
        if any(unlike().values()):
            again = made()
            entered = {part: files & again.get(part, set()) for part, files in entered.items()}
    assert {part: files for part, files in unlike().items() if files} == {}, "run with UPDATE_DOCS=1"
    return entered


@pytest.fixture
def beside(server: RunningServer) -> dict[str, set[str]]:
    chat(server)
    return server.files_entered(lambda: time.sleep(HEARTBEAT))


def test_a_chat_request_enters_few_files(server: RunningServer, beside: dict[str, set[str]]) -> None:
    def made() -> dict[str, set[str]]:
        entered = server.files_entered(lambda: chat(server))
        assert "server/http/routes/chat.py" in entered["API"]
        assert "server/engine/scheduler.py" in entered["engine"]
        entered["API"].discard("server/history.py")  # it samples now and then
        return {part: files for part, files in entered.items() if files}

    assert len(set.union(*check("files of a chat request", made, beside).values())) <= 56


def test_an_upload_enters_few_files(
    server: RunningServer, beside: dict[str, set[str]], made: Files, tmp_path: Path
) -> None:
    contents = [f"new-{i}" for i in range(3)]
    directories = [tiny_adapter(tmp_path / name, made.model, seed=77 + i) for i, name in enumerate(contents)]
    files, coming = Files(made.model, dict(zip(contents, directories, strict=True))), iter(contents)

    def upload() -> None:
        assert files.upload(server, "new", next(coming)).status_code == 201

    def entered() -> dict[str, set[str]]:
        found = server.files_entered(upload)
        server.delete("/v1/adapters/new")
        assert "adapters/peft_format/layout.py" in found["checker"]
        return {part: names for part, names in found.items() if part != "engine"}

    files_of_api = check("files of an upload", entered, beside)["API"]
    assert len(files_of_api - {"server/client/process.py", "server/metrics.py"}) <= 37  # these run with heartbeats
