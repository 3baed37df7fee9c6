"""`lorakeet chat`: a conversation with the base or an adapter, streamed to the terminal."""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer
from rich.cells import cell_len
from rich.console import Console

from server.commands.remote import DEFAULT_URL, ApiKey, CommandError, Url, base_name, checked, connect, get_json

Message = dict[str, str]

MAX_TOKENS = 512  # small models sometimes never stop
_HELP = """/adapter NAME  talk to another adapter, or without NAME to the base; the conversation continues
/clear         forget the conversation
/help          show this
/quit          end (so does Ctrl-D); Ctrl-C ends an answer"""

_PARTS = re.compile(r"\n|[^\S\n]*\S+|[^\S\n]+")  # ends of lines; words with their leading spaces


def chat(
    adapter: Annotated[str | None, typer.Option(help="The adapter to talk to; by default the base.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = MAX_TOKENS,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Chat with the base or an adapter. /help shows the commands within a chat."""
    with connect(url, api_key) as client:
        _Chat(client, adapter, system, {"temperature": temperature, "max_tokens": max_tokens}).run()


class _Chat:
    """One conversation, with one model after another."""

    def __init__(self, client: httpx.Client, adapter: str | None, system: str | None, options: dict[str, Any]) -> None:
        self._client = client
        self._options = options
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self._history = list(self._opening)
        self._notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._model = self._existing_model(adapter)

    def run(self) -> None:
        if sys.stdin.isatty():
            self._notes.print(f"Talking to {self._model}. /help shows the commands.", style="dim")
        for line in _lines():
            command, _, argument = line.partition(" ")
            match command:
                case "/quit":
                    return
                case "/clear":
                    self._history = list(self._opening)
                case "/help":
                    self._notes.print(_HELP)
                case "/adapter":
                    self._switch(argument.strip() or None)
                case _ if re.fullmatch(r"/[a-z]+", command):
                    self._notes.print(f"There is no {command}; /help shows the commands.")
                case _:
                    self._history.append({"role": "user", "content": line})
                    self._history.append({"role": "assistant", "content": self._answer()})

    def _existing_model(self, adapter: str | None) -> str:
        """The adapter's name, after checking that it exists; the base's for None. Raises CommandError."""
        if adapter is None:
            return base_name(self._client)
        get_json(self._client, f"/v1/models/{quote(adapter, safe='')}")
        return adapter

    def _switch(self, adapter: str | None) -> None:
        try:
            self._model = self._existing_model(adapter)
        except CommandError as error:
            self._notes.print(f"{error}; still talking to {self._model}.")
        else:
            self._notes.print(f"Talking to {self._model}.", style="dim")

    def _answer(self) -> str:
        """Print the answer as it comes; Ctrl-C ends it early and keeps the text so far."""
        pieces: list[str] = []
        finish = None
        body = {**self._options, "model": self._model, "messages": self._history, "stream": True}
        console = Console()
        printer = _Wrapped(console.width if console.is_terminal else None)
        with contextlib.suppress(KeyboardInterrupt), self._stream(body) as response:
            for event in _events(response):
                if error := event.get("error"):
                    printer.end()
                    raise CommandError(error["message"])
                for choice in event["choices"]:
                    piece = choice["delta"].get("content") or ""
                    finish = choice.get("finish_reason") or finish
                    pieces.append(piece)
                    printer.write(piece)
        printer.end()
        if finish == "length":
            self._notes.print(f"[cut at the limit of tokens: --max-tokens {body['max_tokens']}]", style="dim")
        return "".join(pieces)

    @contextlib.contextmanager
    def _stream(self, body: dict[str, Any]) -> Iterator[httpx.Response]:
        """Stream the answer to a request. If `max_tokens` does not fit into the context, send it again without."""
        with contextlib.ExitStack() as stack:
            for attempt in (body, {name: value for name, value in body.items() if name != "max_tokens"}):
                response = stack.enter_context(self._client.stream("POST", "/v1/chat/completions", json=attempt))
                if response.status_code != 400 or b"context_length_exceeded" not in response.read():
                    break
            yield checked(response)


class _Wrapped:
    """A printer for streamed text, which wraps lines between words.

    Args:
        width: the terminal's, in cells; None: no wrapping.
    """

    def __init__(self, width: int | None) -> None:
        self._width = width
        self._column = 0
        self._held = ""  # the last part, which may be incomplete

    def write(self, piece: str) -> None:
        if self._width is None:
            print(piece, end="", flush=True)
            return
        *complete, self._held = _PARTS.findall(self._held + piece) or [""]
        for part in complete:
            self._put(part)
        sys.stdout.flush()

    def end(self) -> None:
        """Print the rest, and end the line."""
        self._put(self._held)
        self._held, self._column = "", 0
        print(flush=True)

    def _put(self, part: str) -> None:
        if part == "\n":
            self._column = 0
        elif self._width is not None:
            if self._column and self._column + cell_len(part) > self._width:
                part = f"\n{part.lstrip()}"
                self._column = 0
            self._column += cell_len(part.lstrip("\n"))
        print(part, end="")


def _lines() -> Iterator[str]:
    """The user's lines, without the empty ones, until end of file."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # editing and history, where the platform has them
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if line:
            yield line


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, up to `[DONE]`.

    Raises:
        CommandError: the stream ends without it, so the answer is incomplete.
    """
    for line in response.iter_lines():
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    raise CommandError("the stream broke off before the end of the answer; is the server still running?")
