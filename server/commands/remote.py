"""HTTP from the command line to a running server: its address, the key, and errors in one line."""

import contextlib
import re
from collections.abc import Iterator
from typing import Annotated, Any
from urllib.parse import quote

import httpx
import typer

Url = Annotated[str, typer.Option("--url", envvar="LORAKEET_URL", help="The server; http:// and /v1 are optional.")]
ApiKey = Annotated[str | None, typer.Option("--api-key", envvar="LORAKEET_API_KEY", help="An API key of the server.")]
DEFAULT_URL = "http://127.0.0.1:8000"

_LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|::1")

# Generation and uploads have no time limit; only connecting has.
_TIMEOUT = httpx.Timeout(None, connect=10.0)


class CommandError(Exception):
    """The command failed; the message is one line for the person at the terminal."""


@contextlib.contextmanager
def connect(url: str, api_key: str | None) -> Iterator[httpx.Client]:
    """A client for the server at `url`; turns failures of HTTP inside the block into `CommandError`.

    `url` may lack its scheme and may end in /v1, as for OpenAI's clients. `api_key` may be the comma-separated list
    that `serve` reads from the same variable: its first key is used. Proxies are not used for this machine.
    """
    headers = {b"Authorization": f"Bearer {api_key.split(',')[0].strip()}".encode()} if api_key else {}
    server = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
    try:
        is_local = _LOOPBACK.fullmatch(httpx.URL(server).host)
        direct = httpx.HTTPTransport(verify=server.startswith("https:")) if is_local else None
        client = httpx.Client(base_url=server, headers=headers, timeout=_TIMEOUT, transport=direct)
    except (httpx.InvalidURL, ImportError, OSError, ValueError) as error:  # the last three mostly from variables
        raise CommandError(f"--url {url!r}, or the environment's proxies and certificates: {error}") from None
    try:
        with client:
            yield client
    except (httpx.ConnectError, httpx.ConnectTimeout):
        raise CommandError(f"no server answers at {url}; start one with `lorakeet serve`, or set --url") from None
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise CommandError(f"--url {url!r}: {error}") from None
    except httpx.TransportError as error:
        raise CommandError(f"the connection to {url} broke: {str(error) or type(error).__name__}") from None


def checked(response: httpx.Response) -> httpx.Response:
    """Return the response, if it reports success.

    Raises:
        CommandError: with the API's own message otherwise.
    """
    if response.is_success:
        return response
    response.read()
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.reason_phrase or "no reason given"
    raise CommandError(f"{message} (HTTP {response.status_code})")


def get_json(client: httpx.Client, path: str) -> Any:
    """Return the body of `GET path`."""
    return checked(client.get(path)).json()


def base_name(client: httpx.Client) -> str:
    """Return the base's name: that of the only model without a parent."""
    models = get_json(client, "/v1/models")["data"]
    return str(next(model["id"] for model in models if not model.get("parent")))


def adapter_path(name: str, *rest: str) -> str:
    """Return the path of an adapter's resource, its name percent-encoded."""
    return "/".join(["/v1/adapters", quote(name, safe=""), *rest])
