"""The lorakeet command: flags from the settings' table, clients against a scripted server, errors in one line."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import server.app
from server import cli
from server.settings import Settings, settings_fields


class ScriptedServer:
    """The few endpoints that the clients use, and what they were asked."""

    def __init__(self) -> None:
        self.adapters: dict[str, dict[str, bytes]] = {}
        self.chats: list[dict[str, object]] = []
        self.keys: list[str | None] = []
        self.stream = ["Hel", "lo 🦜"]
        self.ending = "data: [DONE]\n\n"
        self.url = ""

    def receipt(self, name: str) -> dict[str, object]:
        digest = "sha256:" + self.adapters[name]["weights"].hex().ljust(64, "0")
        return {"name": name, "digest": digest, "rank": 8, "modules_matched": 3, "parameters": 12345, "bytes": 2048}

    async def push(self, request: Request) -> Response:
        self.keys.append(request.headers.get("authorization"))
        async with request.form() as form:
            name = str(form["name"])
            new = {kind: await form[kind].read() for kind in ("config", "weights")}  # type: ignore[union-attr]
        known = self.adapters.get(name) == new
        self.adapters[name] = new
        return JSONResponse(self.receipt(name), 200 if known else 201)

    async def list(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.receipt(name) for name in self.adapters]})

    async def one(self, request: Request) -> Response:
        name, _, pinned = request.path_params["name"].partition("@")
        if name not in self.adapters:
            message = f"The adapter `{name}` does not exist."
            return JSONResponse({"error": {"message": message, "type": "x", "param": "name", "code": "x"}}, 404)
        if kind := request.path_params.get("kind"):
            assert self.receipt(name)["digest"] == f"sha256:{pinned}"
            return Response(self.adapters[name][kind])
        if request.method == "DELETE":
            del self.adapters[name]
            return JSONResponse({"deleted": True})
        return JSONResponse(self.receipt(name))

    async def models(self, request: Request) -> Response:
        return JSONResponse({"data": [{"id": "parrot", "parent": "base"}, {"id": "base", "parent": None}]})

    async def chat(self, request: Request) -> Response:
        self.chats.append(await request.json())

        async def events() -> Iterator[str]:
            for piece in self.stream:
                yield f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}\n\n"
            yield self.ending

        return StreamingResponse(events(), media_type="text/event-stream")

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/adapters", self.push, methods=["POST"]),
                Route("/v1/adapters", self.list),
                Route("/v1/adapters/{name}", self.one, methods=["GET", "DELETE"]),
                Route("/v1/adapters/{name}/{kind}", self.one),
                Route("/v1/models", self.models),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ]
        )


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    script = ScriptedServer()
    listener = socket.create_server(("127.0.0.1", 0))
    uvicorn_server = uvicorn.Server(uvicorn.Config(script.app(), log_level="error", lifespan="off"))
    thread = threading.Thread(target=uvicorn_server.run, kwargs={"sockets": [listener]})
    thread.start()
    script.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    monkeypatch.setenv("LORAKEET_URL", script.url)
    while not uvicorn_server.started:
        time.sleep(0.005)
    yield script
    uvicorn_server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORAKEET_URL", "LORAKEET_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_bytes(b'{"r": 8}')
    (directory / "adapter_model.safetensors").write_bytes(b"\x12\x34\x56\x78")
    return directory


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command's exit status."""
    monkeypatch.setattr(sys, "argv", ["lorakeet", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    code = exit_info.value.code
    return code if isinstance(code, int) else 0


# --- serve -------------------------------------------------------------------------------------------


def test_every_setting_is_a_flag_with_its_explanation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "serve", "--help") == 0
    shown = "".join(capsys.readouterr().out.split())
    for row in settings_fields():
        assert row.flag in shown
        assert "".join(row.help.split()) in shown


def test_flags_become_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    served: list[Settings] = []
    monkeypatch.setattr(server.app, "serve", served.append, raising=False)
    monkeypatch.setenv("LORAKEET_PORT", "9001")
    monkeypatch.setenv("LORAKEET_QUANTIZATION", "int8")
    flags = ["--port", "9002", "--adapter", "a=x", "--adapter", "b=y", "--kv-cache-bytes", "64MiB"]
    assert run(monkeypatch, "serve", *flags, "--no-prefix-caching", "--data-dir", str(tmp_path)) == 0
    (settings,) = served
    assert settings.port == 9002
    assert settings.quantization == "int8"
    assert settings.adapter == ("a=x", "b=y")
    assert settings.kv_cache_bytes == 64 * 1024**2
    assert settings.prefix_caching is False
    assert settings.data_dir == tmp_path
    assert settings.model == Settings().model


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--port", "seven"], "--port"),
        (["--quantization", "gptq"], "--quantization"),
        (["--adapter", "nameless"], "--adapter"),
    ],
)
def test_a_bad_flag_is_one_line_and_status_2(
    arguments: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "serve", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {named}")


def test_help_is_light() -> None:
    code = (
        "import sys; sys.argv = ['lorakeet', '--help']; from server.cli import app; app(standalone_mode=False); "
        "sys.exit(bool({'torch', 'transformers', 'starlette', 'pydantic'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_fetch_prints_the_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    assert run(monkeypatch, "fetch", str(tmp_path)) == 0
    assert capsys.readouterr().out == f"{tmp_path}\n"
    assert run(monkeypatch, "fetch", str(tmp_path / "missing.gguf")) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/missing.gguf: no such file\n"


# --- clients -------------------------------------------------------------------------------------------


def test_an_adapter_goes_there_and_back(
    scripted: ScriptedServer,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "push", "parrot", str(adapter)) == 0
    assert capsys.readouterr().out == (
        "parrot is now sha256:123456780000: rank 8, 3 modules, 12,345 parameters, 2.0 KiB\n"
    )
    assert run(monkeypatch, "push", "parrot", str(adapter)) == 0
    assert "was already" in capsys.readouterr().out

    assert run(monkeypatch, "list") == 0
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "parrot", "sha256:123456780000", "8", "3", "12,345", "2.0", "KiB",
    ]  # fmt: skip

    target = tmp_path / "back"
    assert run(monkeypatch, "pull", "parrot", str(target)) == 0
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in adapter.iterdir()
    }

    assert run(monkeypatch, "rm", "parrot") == 0
    assert not scripted.adapters
    assert run(monkeypatch, "rm", "parrot") == 1
    assert capsys.readouterr().err == "error: The adapter `parrot` does not exist. (HTTP 404)\n"


def test_pull_replaces_nothing_unless_told(
    scripted: ScriptedServer, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.adapters["parrot"] = {"config": b"{}", "weights": b"new"}
    assert run(monkeypatch, "pull", "parrot", str(adapter)) == 1
    assert "--force" in capsys.readouterr().err
    assert run(monkeypatch, "pull", "parrot", str(adapter), "--force") == 0
    assert (adapter / "adapter_model.safetensors").read_bytes() == b"new"


def test_a_failed_pull_leaves_nothing(
    scripted: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "pull", "nobody", str(tmp_path / "back")) == 1
    assert not list((tmp_path / "back").iterdir())


def test_push_of_no_adapter_is_refused_before_anything_is_sent(
    scripted: ScriptedServer, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert run(monkeypatch, "push", "parrot", str(adapter)) == 1
    assert "adapter_model.safetensors: no such file" in capsys.readouterr().err
    assert not scripted.keys


def test_the_first_api_key_is_sent(scripted: ScriptedServer, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_API_KEY", "first,second")
    assert run(monkeypatch, "push", "parrot", str(adapter)) == 0
    assert scripted.keys == ["Bearer first"]


def test_no_server_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    assert run(monkeypatch, "list", "--url", url) == 1
    assert capsys.readouterr().err == (
        f"error: no server answers at {url}; start one with `lorakeet serve`, or set --url\n"
    )


def test_chat_keeps_history_streams_and_forgets(
    scripted: ScriptedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["Hi", "", "Again", "/clear", "New", "/quit", "never sent"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run(monkeypatch, "chat", "--system", "Be brief.") == 0
    assert capsys.readouterr().out == "Hello 🦜\n" * 3
    system = {"role": "system", "content": "Be brief."}
    answer = {"role": "assistant", "content": "Hello 🦜"}
    assert [chat["messages"] for chat in scripted.chats] == [
        [system, {"role": "user", "content": "Hi"}],
        [system, {"role": "user", "content": "Hi"}, answer, {"role": "user", "content": "Again"}],
        [system, {"role": "user", "content": "New"}],
    ]
    assert {chat["model"] for chat in scripted.chats} == {"base"}


@pytest.mark.parametrize(
    ("ending", "complaint"),
    [
        ('data: {"error": {"message": "The engine was restarted."}}\n\n', "The engine was restarted."),
        ("", "broke off in the middle"),
    ],
)
def test_an_incomplete_answer_is_an_error(
    ending: str,
    complaint: str,
    scripted: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scripted.ending = ending
    monkeypatch.setattr("builtins.input", lambda prompt: "Hi")
    assert run(monkeypatch, "chat", "--adapter", "parrot") == 1
    assert complaint in capsys.readouterr().err
    assert scripted.chats[0]["model"] == "parrot"
