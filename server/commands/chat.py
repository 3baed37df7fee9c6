"""`lorakeet chat`: a conversation with the base or an adapter, streamed to the terminal."""

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from server.commands.remote import DEFAULT_URL, ApiKey, CommandError, Url, checked, connect, get_json

Message = dict[str, str]


def chat(
    adapter: Annotated[str | None, typer.Option(help="Whom to talk to; the base when not given.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2)] = 0.7,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Chat with the base or an adapter. /clear forgets the conversation, /quit ends it."""
    console = Console(highlight=False)
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    with connect(url, api_key) as client:
        model = adapter or _base(client)
        options = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        if sys.stdin.isatty():
            console.print(f"[dim]Talking to {model}. /clear forgets, /quit ends, Ctrl-C stops an answer.[/dim]")
        history = list(opening)
        for line in _lines():
            if line == "/quit":
                return
            if line == "/clear":
                history = list(opening)
                continue
            history.append({"role": "user", "content": line})
            history.append({"role": "assistant", "content": _answer(client, options, history)})


def _base(client: httpx.Client) -> str:
    """The name of the model that every adapter belongs to."""
    models = get_json(client, "/v1/models")["data"]
    return str(next(model["id"] for model in models if not model.get("parent")))


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


def _answer(client: httpx.Client, options: dict[str, Any], messages: list[Message]) -> str:
    """Print the answer as it comes; Ctrl-C ends it early and keeps the text so far."""
    pieces: list[str] = []
    body = {**options, "messages": messages, "stream": True}
    with contextlib.suppress(KeyboardInterrupt), client.stream("POST", "/v1/chat/completions", json=body) as response:
        for event in _events(checked(response)):
            if error := event.get("error"):
                raise CommandError(error["message"])
            for choice in event["choices"]:
                piece = choice["delta"].get("content") or ""
                pieces.append(piece)
                print(piece, end="", flush=True)
    print()
    return "".join(pieces)


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
