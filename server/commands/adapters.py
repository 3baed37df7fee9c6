"""`lorakeet push`, `pull`, `list`, `rm`, `pin`, `unpin`: adapters of a running server, as PEFT directories."""

from contextlib import ExitStack
from pathlib import Path
from typing import IO, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from server.commands.listing import AsJson, show_json, show_rows
from server.commands.remote import (
    DEFAULT_URL,
    ApiKey,
    CommandError,
    Url,
    adapter_path,
    checked,
    connect,
    get_json,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OPTIONAL_FILES = {"tokenizer": "tokenizer.json", "chat_template": "chat_template.jinja"}  # optional

Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name.")]


def push(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The adapter's name; an existing one gets a new version.")
    ],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory written by PEFT's save_pretrained.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Upload an adapter. It can be requested as soon as the command returns."""
    for file in (CONFIG, WEIGHTS):
        if not (directory / file).is_file():
            pickled = " (adapter_model.bin is not accepted: save it again with PEFT's save_pretrained)"
            hint = pickled if (directory / "adapter_model.bin").exists() else ""
            raise CommandError(f"{directory / file}: no such file; a PEFT adapter has {CONFIG} and {WEIGHTS}{hint}")
    with (
        connect(url, api_key) as client,
        _progress() as progress,
        ExitStack() as open_files,
        (directory / CONFIG).open("rb") as config,
        progress.open(directory / WEIGHTS, "rb", description=f"Uploading {name}") as weights,
    ):
        files: dict[str, tuple[str, IO[bytes], str]] = {
            "config": (CONFIG, config, "application/json"),
            "weights": (WEIGHTS, weights, "application/octet-stream"),
        }
        for part, file in OPTIONAL_FILES.items():
            if (directory / file).is_file():
                files[part] = (file, open_files.enter_context((directory / file).open("rb")), "text/plain")
        response = checked(client.post("/v1/adapters", data={"name": name}, files=files))
    receipt = response.json()
    state = "is now" if response.status_code == 201 else "was already"
    print(
        f"{name} {state} {_short(receipt['digest'])}: rank {receipt['rank']}, "
        f"{receipt['modules_matched']} modules, {receipt['parameters']:,} parameters, {_size(receipt['bytes'])}"
    )


def pull(
    name: Name,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The target directory; made if missing.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter in DIR.")] = False,
) -> None:
    """Download an adapter. PEFT's from_pretrained reads DIR."""
    targets = [directory / CONFIG, directory / WEIGHTS]
    if not force and (existing := next((path for path in targets if path.exists()), None)):
        raise CommandError(f"{existing} exists; --force replaces it")
    directory.mkdir(parents=True, exist_ok=True)
    with _progress() as progress, connect(url, api_key) as client:
        # Both files come from one version, even if the name is replaced in between.
        digest = get_json(client, adapter_path(name))["digest"]
        pinned = f"{name.partition('@')[0]}@{digest.removeprefix('sha256:')}"
        parts = [path.with_name(f".{path.name}.part") for path in targets]
        try:
            for part, kind in zip(parts, ("config", "weights"), strict=True):
                with client.stream("GET", adapter_path(pinned, kind)) as response, part.open("wb") as file:
                    length = int(checked(response).headers.get("Content-Length", 0)) or None
                    task = progress.add_task(f"Downloading {kind}", total=length)
                    for chunk in response.iter_bytes():
                        file.write(chunk)
                        progress.advance(task, len(chunk))
            for part, target in zip(parts, targets, strict=True):
                part.replace(target)
        finally:
            for part in parts:
                part.unlink(missing_ok=True)
    print(f"{name} ({_short(digest)}) is in {directory}")


def list_adapters(as_json: AsJson = False, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Show the server's adapters."""
    with connect(url, api_key) as client:
        adapters = get_json(client, "/v1/adapters")["data"]
    if as_json:
        show_json(adapters)
        return
    if not adapters:
        print("No adapters yet; `lorakeet push NAME DIR` uploads one.")
        return
    numbers = ("RANK", "MODULES", "PARAMETERS", "SIZE")
    rows = [
        (
            adapter["name"],
            _short(adapter["digest"]),
            str(adapter["rank"]),
            str(adapter["modules_matched"]),
            f"{adapter['parameters']:,}",
            _size(adapter["bytes"]),
            "yes" if adapter["pinned"] else "",
        )
        for adapter in adapters
    ]
    show_rows(("NAME", "DIGEST", *numbers, "PINNED"), rows, right=numbers)


def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="The adapters' names.")],
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
) -> None:
    """Delete adapters. Running requests finish with the weights they started with."""
    with connect(url, api_key) as client:
        for name in names:
            checked(client.delete(adapter_path(name)))
            print(f"{name} is deleted")


def pin(name: Name, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Keep an adapter on the device, later versions of its name included."""
    with connect(url, api_key) as client:
        answer = checked(client.post(adapter_path(name, "pin"))).json()
    print(f"{name} is pinned: {_size(answer['bytes_on_device'])} of device memory")


def unpin(name: Name, url: Url = DEFAULT_URL, api_key: ApiKey = None) -> None:
    """Let an adapter leave the device when others need its memory."""
    with connect(url, api_key) as client:
        checked(client.delete(adapter_path(name, "pin")))
    print(f"{name} is no longer pinned")


def _progress() -> Progress:
    """A progress bar for bytes on standard error, on a terminal only, removed when done."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _short(digest: str) -> str:
    return digest[: len("sha256:") + 12]


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
