"""The `lorakeet` command: `serve` and `fetch` here, clients of a running server in `server.commands`.

Imports stay light, so that help is instant: the server itself is imported by `serve`.
"""

import importlib.metadata
import inspect
import io
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from server.commands import adapters, chat, doctor, finetune, tenants
from server.commands.remote import CommandError
from server.model_source import DEFAULT, ModelError, default_cache_dir, resolve
from server.setting_kinds import Setting
from server.settings import SettingError, Settings, settings_fields

app = typer.Typer(
    name="lorakeet",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: two columns, readable on 80 characters
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorakeet {importlib.metadata.version('lorakeet')}")
        raise typer.Exit


@app.callback()
def lorakeet(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Serve many LoRA adapters from one quantised base model.

    Start with `lorakeet serve`; then, in another terminal, `lorakeet push NAME DIR` and `lorakeet chat --adapter NAME`.
    The API is OpenAI's, with an adapter's name as the model.
    """


# --- commands on the server's machine ---------------------------------------------------------------


def _flag(row: Setting) -> inspect.Parameter:
    """One setting as a parameter from which typer makes an option; None: not given."""
    metavar = None if row.is_bool else "|".join(row.choices or ["VALUE"])
    option = typer.Option(
        *row.declarations, help=f"{row.help} [default: {row.default_text}]", metavar=metavar, show_default=False
    )
    kind: Any = bool if row.is_bool else list[str] if row.repeatable else str
    return inspect.Parameter(
        row.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def serve(**flags: Any) -> None:
    """Start the server.

    Every flag can also be set in the environment: --max-model-len is LORAKEET_MAX_MODEL_LEN. The flag wins.
    Sizes are written like 512MiB or 2GiB.
    """
    settings = Settings.load(flags, os.environ)
    from server.http.serving import serve as run

    run(settings)


serve.__signature__ = inspect.Signature([_flag(row) for row in settings_fields()])  # type: ignore[attr-defined]
app.command()(serve)


@app.command()
def fetch(
    ref: Annotated[str, typer.Argument(metavar="[REF]", help="As --model for serve.", show_default=True)] = DEFAULT,
    cache_dir: Annotated[Path | None, typer.Option(envvar="LORAKEET_CACHE_DIR", help="As for serve.")] = None,
) -> None:
    """Fetch a base model ahead of serve. Prints its directory."""
    notes = Console(stderr=True, highlight=False)
    cache = (cache_dir or default_cache_dir()).expanduser()
    typer.echo(resolve(ref, cache, lambda line: notes.print(line, soft_wrap=True)))


app.command("doctor")(doctor.doctor)


# --- clients of a running server -------------------------------------------------------------------

app.command("push")(adapters.push)
app.command("pull")(adapters.pull)
app.command("list")(adapters.list_adapters)
app.command("rm")(adapters.remove)
app.command("pin")(adapters.pin)
app.command("unpin")(adapters.unpin)
app.command("chat")(chat.chat)
app.command("finetune")(finetune.finetune)
app.command("jobs")(finetune.jobs)
app.command("eval")(finetune.evaluate)
app.add_typer(tenants.keys)
app.add_typer(tenants.tenants)


def _prepare_streams() -> None:
    """Open missing standard streams, as of a daemon, so that no file opened later takes their place. Have them replace
    characters that they cannot encode."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, stream := open(os.devnull, mode))  # noqa: PTH123, SIM115
            os.set_inheritable(stream.fileno(), True)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def main() -> None:
    """Run the command. Errors that the user can fix are printed in one line, without a traceback."""
    _prepare_streams()
    try:
        app()
    except (CommandError, ModelError, SettingError, OSError, UnicodeError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print("[red]error:[/red]", escape(str(error)))
        raise SystemExit(2 if isinstance(error, SettingError) else 1) from None
