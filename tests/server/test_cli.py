"""The lorakeet command: flags from the settings table, clients against the real application, errors in one line."""

import asyncio
import json
import queue
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
import uvicorn

from server import cli
from server.commands import chat
from server.commands.remote import CommandError
from server.http import serving as serving_module
from server.model_source import DEFAULT
from server.services import TENANT
from server.settings import Settings, settings_fields
from tests.support.harness import write_adapter
from tests.support.scripted import TEXT, Served, encode, serving, unavailable


@contextmanager
def real_api(directory: Path, **settings: Any) -> Iterator[tuple[Served, str]]:
    """The real application with a scripted engine, on a socket in its own thread, and its address."""
    up: queue.Queue[tuple[Served, uvicorn.Server]] = queue.Queue()

    async def run() -> None:
        async with serving(directory, **settings) as served:
            server = uvicorn.Server(uvicorn.Config(served.app, port=0, log_config=None))
            running = asyncio.create_task(server._serve())  # without its signal handlers
            while not server.started:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            up.put((served, server))
            await running

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    served, server = up.get(timeout=30)
    try:
        yield served, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with real_api(tmp_path) as (served, url):
        monkeypatch.setenv("LORAKEET_URL", url)
        yield served


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORAKEET_URL", "LORAKEET_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command and return its exit status."""
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
        assert all(flag in shown for flag in (row.flag, *row.aliases))
        assert "".join(row.help.split()) in shown


def test_flags_become_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    served: list[Settings] = []
    monkeypatch.setattr(serving_module, "serve", served.append, raising=False)
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


def test_vllms_flags_become_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Settings] = []
    monkeypatch.setattr(serving_module, "serve", served.append, raising=False)
    flags = ["--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--kv-cache-memory-bytes", "64MiB"]
    flags += ["--lora-modules", "a=x", "--adapter", "b=y", "--no-enable-prefix-caching"]
    assert run(monkeypatch, "serve", *flags) == 0
    assert run(monkeypatch, "serve", "--enable-prefix-caching") == 0
    assert [settings.prefix_caching for settings in served] == [False, True]
    settings = served[0]
    assert (settings.max_batch_requests, settings.max_batch_tokens, settings.kv_cache_bytes) == (4, 64, 64 * 1024**2)
    assert settings.adapter == ("a=x", "b=y")


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


def test_a_daemon_has_no_streams_and_no_file_stands_for_one(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys; from server.cli import _prepare_streams; _prepare_streams(); "
        f"file = open({str(tmp_path / 'file')!r}, 'w'); print('lost', flush=True); print('lost', file=sys.stderr); "
        "done = subprocess.run([sys.executable, '-c', 'import os; [os.fstat(i) for i in range(3)]']); "
        "file.write(f'{file.fileno() > 2} {done.returncode}')"
    )
    shell = f"exec {shlex.join([sys.executable, '-c', code])} <&- >&- 2>&-"
    subprocess.run(["sh", "-c", shell], check=True)
    assert (tmp_path / "file").read_text() == "True 0"


def test_text_that_a_stream_cannot_show_ends_nothing() -> None:
    code = "from server.cli import _prepare_streams; _prepare_streams(); print(input(), chr(0xE9))"
    command = ["env", "PYTHONIOENCODING=ascii", sys.executable, "-c", code]
    shown = subprocess.run(command, input=b"\xff\n", stdout=subprocess.PIPE, check=True).stdout
    assert shown == b"? ?\n"


def raiser(fault: Exception) -> Any:
    """A function that raises this exception."""

    def fail(*_: object) -> None:
        raise fault

    return fail


def test_a_fault_of_the_system_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], adapter: Path
) -> None:
    monkeypatch.setattr("server.commands.adapters._progress", raiser(PermissionError(13, "Permission denied", "/x")))
    assert run(monkeypatch, "push", "a", str(adapter)) == 1
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: '/x'\n"


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


def test_a_cache_that_cannot_be_written_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert run(monkeypatch, "fetch", "--cache-dir", str(tmp_path / "file/cache")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {DEFAULT} cannot be prepared: ")


def test_a_user_without_a_home_is_told_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", raiser(RuntimeError("Could not determine home directory.")))
    for command in ("serve", "fetch", "doctor"):
        assert run(monkeypatch, command) == 1
        said = "error: this user has no home directory: set HOME, or --data-dir and --cache-dir\n"
        assert capsys.readouterr().err == said


def test_a_tilde_in_a_variable_is_the_home_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In files of variables no shell expands the tilde."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LORAKEET_CACHE_DIR", "~/cache")
    monkeypatch.setenv("LORAKEET_DATA_DIR", "~/data")
    (tmp_path / "data").mkdir()
    assert run(monkeypatch, "doctor") == 0
    prepare = Mock(return_value=tmp_path)
    monkeypatch.setattr(cli, "resolve", prepare)
    assert run(monkeypatch, "fetch") == 0
    assert prepare.call_args.args[1] == tmp_path / "cache"


# --- clients -------------------------------------------------------------------------------------------


def test_no_proxy_leads_to_this_machine(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    proxies = {"http_proxy": "http://127.0.0.1:9", "ALL_PROXY": "socks5://127.0.0.1:9", "SSL_CERT_FILE": "/nowhere.pem"}
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    assert run(monkeypatch, "list") == 0
    assert run(monkeypatch, "list", "--url", "http://far.example") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --url 'http://far.example', or the environment's proxies and certificates: ")


def test_a_key_may_come_with_the_end_of_its_line(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAKEET_API_KEY", "\u00e9 \n")
    assert run(monkeypatch, "list") == 0


def test_an_id_is_no_part_of_a_path(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "tenants", "create", "acme", "--limit", "running=3") == 0
    for id_ in ("acme?", "acme#", "acme?x"):
        assert run(monkeypatch, "tenants", "limit", id_, "--limit", "running=1") == 1
        assert run(monkeypatch, "tenants", "rm", id_) == 1
    assert served.services.tenants.tenant("acme").limits.running == 3


def test_an_adapter_goes_there_and_back(
    served: Served, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "push", "parrot", str(adapter)) == 0
    digest = served.services.store.get(TENANT, "parrot").digest[:19]
    assert capsys.readouterr().out == (f"parrot is now {digest}: rank 4, 4 modules, 512 parameters, 2.0 KiB\n")
    assert run(monkeypatch, "push", "parrot", str(adapter)) == 0
    assert capsys.readouterr().out.startswith(f"parrot was already {digest}")

    assert run(monkeypatch, "list") == 0
    _, row = capsys.readouterr().out.splitlines()
    assert row.split() == ["parrot", digest, "4", "4", "512", "2.0", "KiB"]

    target = tmp_path / "back[draft]"
    assert run(monkeypatch, "pull", "parrot", str(target)) == 0
    assert capsys.readouterr().out == f"parrot ({digest}) is in {target}\n"
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in adapter.iterdir()
    }

    assert run(monkeypatch, "rm", "parrot") == 0
    capsys.readouterr()
    assert run(monkeypatch, "list") == 0
    assert capsys.readouterr().out.startswith("No adapters yet")
    assert run(monkeypatch, "rm", "parrot") == 1
    assert capsys.readouterr().err == "error: The adapter `parrot` does not exist. (HTTP 404)\n"


def test_a_refused_adapter_says_why(
    served: Served, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(adapter, peft_type="LOHA")
    assert run(monkeypatch, "push", "parrot", str(adapter)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: peft_type")


def test_pull_gets_one_version_and_replaces_nothing_unless_told(
    served: Served, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    older = adapter / "adapter_model.safetensors"
    content = older.read_bytes()
    assert run(monkeypatch, "push", "parrot", str(adapter)) == 0
    digest = served.services.store.get(TENANT, "parrot").digest.removeprefix("sha256:")
    assert run(monkeypatch, "push", "parrot", str(write_adapter(tmp_path / "newer", seed=1))) == 0
    assert run(monkeypatch, "pull", "parrot", str(adapter)) == 1
    assert "--force" in capsys.readouterr().err
    assert older.read_bytes() == content
    assert run(monkeypatch, "pull", "parrot", str(adapter), "--force") == 0
    assert older.read_bytes() == (tmp_path / "newer/adapter_model.safetensors").read_bytes()
    assert run(monkeypatch, "pull", f"parrot@{digest[:8]}", str(adapter), "--force") == 0
    assert older.read_bytes() == content


def test_a_failed_pull_leaves_nothing(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "pull", "nobody", str(tmp_path / "back")) == 1
    assert not list((tmp_path / "back").iterdir())


def test_push_of_no_adapter_names_the_missing_file(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert run(monkeypatch, "push", "parrot", str(adapter)) == 1
    said = capsys.readouterr().err
    assert "adapter_model.safetensors: no such file" in said
    assert "adapter_model.bin is not accepted: save it again" in said


def test_the_first_api_key_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with real_api(tmp_path, api_key=("first", "second")) as (_, url):
        assert run(monkeypatch, "list", "--url", url) == 1
        assert "(HTTP 401)" in capsys.readouterr().err
        monkeypatch.setenv("LORAKEET_API_KEY", "first,second")  # in the format that serve reads
        assert run(monkeypatch, "list", "--url", url) == 0


def test_no_server_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    assert run(monkeypatch, "list", "--url", url) == 1
    assert capsys.readouterr().err == (
        f"error: no server answers at {url}; start one with `lorakeet serve`, or set --url\n"
    )


def test_chat_keeps_history_streams_and_forgets(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["Hi", "", "Again", "/clear", "New", "/quit", "never sent"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run(monkeypatch, "chat", "--system", "Be brief.") == 0
    assert capsys.readouterr().out == f"{TEXT}\n" * 3
    assert [request.prompt for request in served.engine.requests] == [
        encode(f"<|im_start|>system\nBe brief.<|im_end|>\n{turns}<|im_start|>assistant\n")
        for turns in (
            "<|im_start|>user\nHi<|im_end|>\n",
            "<|im_start|>user\nHi<|im_end|>\n"
            f"<|im_start|>assistant\n{TEXT}<|im_end|>\n"
            "<|im_start|>user\nAgain<|im_end|>\n",
            "<|im_start|>user\nNew<|im_end|>\n",
        )
    ]


def test_chat_with_an_adapter_that_fails(
    served: Served, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: "Hi")
    assert run(monkeypatch, "chat", "--adapter", "parrot") == 1
    assert capsys.readouterr().err == "error: The model `parrot` does not exist. (HTTP 404)\n"

    assert run(monkeypatch, "push", "parrot", str(adapter)) == 0
    served.engine.fail = {2: unavailable()}
    capsys.readouterr()
    assert run(monkeypatch, "chat", "--adapter", "parrot") == 1
    printed = capsys.readouterr()
    assert "engine stopped" in printed.err
    assert TEXT.startswith(printed.out.strip("\n"))
    assert served.engine.requests[-1].adapters[0].digest == served.services.store.get(TENANT, "parrot").digest


def test_a_stream_that_breaks_off_is_no_answer() -> None:
    whole = 'data: {"choices": []}\n\n: a comment\n\ndata: [DONE]\n\n'
    assert list(chat._events(httpx.Response(200, text=whole))) == [{"choices": []}]
    with pytest.raises(CommandError, match="broke off"):
        list(chat._events(httpx.Response(200, text='data: {"choices": []}\n\n')))


def test_keys_and_tenants(served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "keys", "create", "--role", "admin") == 0
    secret = capsys.readouterr().out.strip()
    assert run(monkeypatch, "keys", "list") == 1
    assert "(HTTP 401)" in capsys.readouterr().err
    monkeypatch.setenv("LORAKEET_API_KEY", secret)
    assert run(monkeypatch, "tenants", "create", "acme", "--limit", "running=4") == 0
    assert run(monkeypatch, "tenants", "list") == 0
    assert "running=4" in capsys.readouterr().out
    assert run(monkeypatch, "tenants", "limit", "acme", "--limit", "x") == 1
    assert "--limit x: expected NAME=NUMBER" in capsys.readouterr().err
    assert run(monkeypatch, "tenants", "limit", "acme") == 0
    assert run(monkeypatch, "keys", "create", "--tenant", "acme", "--adapter", "one", "--days", "30") == 0
    acme = capsys.readouterr().out.split()[-1]
    id_ = acme[: len("lk-01234567")]
    assert run(monkeypatch, "keys", "list", "--tenant", "acme") == 0
    listed = capsys.readouterr().out
    assert listed.split("\n")[1].split("\t")[:5] == [id_, "acme", "", "serve", "one"]
    assert acme not in listed
    assert run(monkeypatch, "tenants", "list", "--json") == 0
    assert [tenant["id"] for tenant in json.loads(capsys.readouterr().out)] == ["default", "acme"]
    assert run(monkeypatch, "keys", "revoke", id_) == 0
    assert run(monkeypatch, "keys", "list") == 0
    assert "revoked" in capsys.readouterr().out
    assert run(monkeypatch, "tenants", "rm", "acme") == 0
    assert run(monkeypatch, "keys", "list", "--tenant", "acme") == 1
    assert "No such tenant: acme" in capsys.readouterr().err
