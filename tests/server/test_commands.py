"""The command line's lists, chats and watches, with responses scripted by the tests."""

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer

from server import cli
from server.commands import adapters, chat, finetune, remote, tenants

Answer = Callable[[httpx.Request], httpx.Response]
LONG = "ft:smollm2-135m-instruct:customer-support:0123456789abcdef"
JOBS = [
    {
        "id": f"ftjob-{number:032x}",
        "status": "running",
        "step": number,
        "total_steps": 300,
        "model": "smollm2-135m-instruct",
        "fine_tuned_model": LONG,
    }
    for number in range(3)
]
KEY: dict[str, Any] = {"id": "lk-01234567", "tenant": "acme", "name": "", "roles": ["serve"], "adapters": None}
KEY |= {"revoked_at": None, "expires_at": None, "last_used_at": 0}
TENANT = {"id": "acme", "created_at": 0, "limits": {"running": 4}}
ADAPTER = {
    "name": LONG,
    "digest": "sha256:" + "ab" * 32,
    "rank": 16,
    "modules_matched": 210,
    "parameters": 4_884_480,
    "bytes": 19_537_920,
    "pinned": False,
}


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], None]:
    """Install a function that answers the commands' requests."""

    def install(answer: Answer) -> None:
        @contextlib.contextmanager
        def connect(url: str, api_key: str | None) -> Iterator[httpx.Client]:
            with httpx.Client(base_url="http://server", transport=httpx.MockTransport(answer)) as client:
                yield client

        for module in (adapters, chat, finetune, tenants):
            monkeypatch.setattr(module, "connect", connect)

    return install


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output is a terminal of 40 columns."""
    for name, value in {"TTY_COMPATIBLE": "1", "TERM": "xterm", "COLUMNS": "40"}.items():
        monkeypatch.setenv(name, value)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lorakeet", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    code = exit_info.value.code
    return code if isinstance(code, int) else 0


def plain(printed: str) -> list[str]:
    """The lines without escape sequences."""
    return re.sub(r"\x1b\[[0-9;]*m", "", printed).splitlines()


def lists(request: httpx.Request) -> httpx.Response:
    """Two pages of jobs, one adapter, a key and a tenant."""
    if request.url.path == "/v1/admin/keys":
        return httpx.Response(200, json={"data": [KEY]})
    if request.url.path == "/v1/admin/tenants":
        return httpx.Response(200, json={"data": [TENANT]})
    if request.url.path == "/v1/adapters":
        return httpx.Response(200, json={"data": [ADAPTER], "has_more": False})
    if request.url.path.endswith("/events"):
        return httpx.Response(200, json={"data": [{"created_at": 0, "message": "created"}], "has_more": False})
    first = "after" not in request.url.params
    return httpx.Response(200, json={"data": JOBS[:2] if first else JOBS[2:], "has_more": first})


# --- lists -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["terminal", "pipe"])
def test_ids_are_never_folded(
    place: str,
    answering: Callable[[Answer], None],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    if place == "terminal":
        request.getfixturevalue("terminal")
    answering(lists)
    assert run(monkeypatch, "jobs") == 0
    heading, *rows = plain(capsys.readouterr().out)
    assert heading.split() == ["ID", "STATUS", "STEP", "MODEL", "RESULT"]
    assert [row.split() for row in rows] == [
        [job["id"], "running", f"{job['step']}/300", "smollm2-135m-instruct", LONG] for job in JOBS
    ], "one line for each job, also of the second page"
    assert run(monkeypatch, "list") == 0
    _, row = plain(capsys.readouterr().out)
    assert row.split() == [LONG, "sha256:abababababab", "16", "210", "4,884,480", "18.6", "MiB"]
    assert ("\t" in row) == (place == "pipe")


def test_every_list_comes_as_json(
    answering: Callable[[Answer], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(lists)
    for arguments, expected in (
        (("list", "--json"), [ADAPTER]),
        (("jobs", "--json"), JOBS),
        (("jobs", JOBS[0]["id"], "--json"), [{"created_at": 0, "message": "created"}]),
        (("keys", "list", "--json"), [KEY]),
        (("tenants", "list", "--json"), [TENANT]),
    ):
        assert run(monkeypatch, *map(str, arguments)) == 0
        assert json.loads(capsys.readouterr().out) == expected


def test_every_command_that_shows_something_can_show_json() -> None:
    def commands(group: Any, words: str = "") -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from commands(command, f"{name} ")
            else:
                yield words + name, command

    found = dict(commands(typer.main.get_command(cli.app)))
    showing = {name for name, command in found.items() if command.help.startswith(("Show", "Compare"))}
    assert showing == {"list", "jobs", "eval", "doctor", "keys list", "tenants list"}
    for name in showing:
        assert "--json" in {flag for option in found[name].params for flag in option.opts}, name


def test_an_evaluation_comes_as_a_table_or_as_json(
    answering: Callable[[Answer], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    score = {"loss": 1.5, "perplexity": 4.48, "exact_match": None}
    results = {"base": score, "adapter": score | {"exact_match": 0.5}}
    found = {"id": "e", "status": "succeeded", "examples": 3, "tokens": 40, "results": results}
    answering(lambda request: httpx.Response(200, json=found))
    (tmp_path / "data.jsonl").touch()
    assert run(monkeypatch, "eval", str(tmp_path / "data.jsonl"), "--adapter", LONG) == 0
    assert [line.split("\t") for line in capsys.readouterr().out.splitlines()] == [
        ["3 examples, 40 tokens", "LOSS", "PERPLEXITY", "EXACT MATCH"],
        ["base", "1.5000", "4.48", "-"],
        [LONG, "1.5000", "4.48", "50.0%"],
    ]
    assert run(monkeypatch, "eval", str(tmp_path / "data.jsonl"), "--adapter", LONG, "--json") == 0
    assert json.loads(capsys.readouterr().out) == found


# --- addresses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://127.0.0.1:8000/v1/", "127.0.0.1:8000/v1"])
def test_an_address_may_be_written_as_people_know_it(url: str) -> None:
    with remote.connect(url, None) as client:
        assert str(client.build_request("GET", "/v1/models").url) == "http://127.0.0.1:8000/v1/models"
    with remote.connect("localhost:8000", None) as client:
        assert str(client.build_request("GET", "/v1/models").url) == "http://localhost:8000/v1/models"


# --- finetune ----------------------------------------------------------------------------------------


def test_ctrl_c_leaves_the_job_running_and_says_so(
    answering: Callable[[Answer], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        if request.url.path.endswith("/events"):
            raise KeyboardInterrupt
        return httpx.Response(200, json={"id": "ftjob-1", "status": "running", "data": [{"id": "base"}]})

    answering(answer)
    (tmp_path / "data.jsonl").touch()
    assert run(monkeypatch, "finetune", str(tmp_path / "data.jsonl"), "--name", "a", "--url", "localhost:1") == 130
    said = capsys.readouterr().err
    assert "The job continues." in said
    assert "`lorakeet jobs ftjob-1 --url localhost:1 --cancel` ends it" in said
    assert not [path for path in asked if path.endswith("/cancel")]


# --- chat --------------------------------------------------------------------------------------------


class Model:
    """A server with a base and one adapter, which returns the same text in every chat."""

    def __init__(self, text: str = "Yes.", finish: str = "stop", context: int = 4096) -> None:
        self.pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
        self.finish = finish
        self.context = context
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "base", "parent": None}]})
        if request.url.path.startswith("/v1/models/"):
            known = request.url.path == "/v1/models/org/parrot"
            return httpx.Response(200 if known else 404, json={"error": {"message": "Unknown."}})
        body = json.loads(request.content)
        self.bodies.append(body)
        if body.get("max_tokens", 0) > self.context:
            return httpx.Response(400, json={"error": {"message": "Long.", "code": "context_length_exceeded"}})
        choices: list[dict[str, Any]] = [{"delta": {"content": piece}} for piece in self.pieces]
        choices.append({"delta": {}, "finish_reason": self.finish})
        events = "".join(f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices)
        return httpx.Response(200, text=events + "data: [DONE]\n\n")


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    left = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def test_an_answer_has_a_limit_unless_told_otherwise(
    answering: Callable[[Answer], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(finish="length")
    answering(model)
    say(monkeypatch, "Hi")
    assert run(monkeypatch, "chat") == 0
    printed = capsys.readouterr()
    assert printed.out == "Yes.\n"
    assert "--max-tokens 512" in printed.err
    say(monkeypatch, "Hi")
    assert run(monkeypatch, "chat", "--max-tokens", "7") == 0
    assert [body["max_tokens"] for body in model.bodies] == [512, 7]


def test_a_limit_beyond_the_context_is_no_error(
    answering: Callable[[Answer], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(context=256)
    answering(model)
    say(monkeypatch, "Hi")
    assert run(monkeypatch, "chat") == 0
    assert capsys.readouterr().out == "Yes.\n"
    assert [body.get("max_tokens") for body in model.bodies] == [512, None]


def test_a_wrong_adapter_is_noticed_before_anything_is_asked(
    answering: Callable[[Answer], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(Model())
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("the user was asked"))
    assert run(monkeypatch, "chat", "--adapter", "nobody") == 1
    assert capsys.readouterr().err == "error: Unknown. (HTTP 404)\n"


def test_commands_within_a_chat(
    answering: Callable[[Answer], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model()
    answering(model)
    say(monkeypatch, "/help", "/adapter nobody", "One", "/adapter org/parrot", "Two", "/adapter", "/claer", "Three")
    assert run(monkeypatch, "chat") == 0
    said = capsys.readouterr().err
    assert all(command in said for command in ("/adapter NAME", "/clear", "/quit"))
    assert "Unknown. (HTTP 404); still talking to base." in said
    assert "There is no /claer" in said
    assert [(body["model"], len(body["messages"])) for body in model.bodies] == [
        ("base", 1),
        ("org/parrot", 3),
        ("base", 5),
    ]


def test_lines_wrap_at_words_on_a_terminal(
    terminal: None,
    answering: Callable[[Answer], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = f"  A parakeet is a small, long-tailed bird; 漢字漢字漢字 are wide.\n\nThe {'x' * 45} end.\n    code()"
    answering(Model(text))
    say(monkeypatch, "Hi")
    assert run(monkeypatch, "chat") == 0
    assert capsys.readouterr().out.splitlines() == [
        "  A parakeet is a small, long-tailed",
        "bird; 漢字漢字漢字 are wide.",
        "",
        "The",
        "x" * 45,
        "end.",
        "    code()",
    ]


def test_a_pipe_gets_the_answer_as_it_is(
    answering: Callable[[Answer], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = "word " * 20
    answering(Model(text))
    say(monkeypatch, "Hi")
    assert run(monkeypatch, "chat") == 0
    assert capsys.readouterr().out == f"{text}\n"
