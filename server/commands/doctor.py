"""`lorakeet doctor`: items set aside in a server's data directory, and verification of its files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from server.commands.remote import CommandError
from server.model_source import default_data_dir


def doctor(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID...]", help="Items that were set aside.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", envvar="LORAKEET_DATA_DIR", help="As for serve.")
    ] = None,
    restore: Annotated[bool, typer.Option("--restore", help="Move these items back and register them.")] = False,
    remove: Annotated[bool, typer.Option("--remove", help="Delete these items.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="With --restore or --remove: all listed items.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Read all files; exit with 1 if any is damaged.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
) -> None:
    """Show items that a server set aside because no database knows them; restore or remove them, or verify the rest.

    Works on the data directory itself. Restoring and removing need the server to be stopped.
    """
    from server import doctor as maintenance  # late, since it imports every store

    root = (data_dir or default_data_dir()).expanduser()
    if not root.is_dir():
        raise CommandError(f"--data-dir: {root} is not a directory")
    if restore and remove:
        raise CommandError("give --restore or --remove, not both")

    def show(entry: maintenance.LostItem | maintenance.Fault, line: str) -> None:
        typer.echo(json.dumps(asdict(entry)) if as_json else line)

    if restore or remove:
        try:
            chosen = maintenance.restore_or_remove(root, ids or [], everything=everything, restoring=restore)
        except maintenance.DoctorError as reason:
            raise CommandError(str(reason)) from None
        for item in chosen:
            show(item, f"{item.id} {'is restored' if restore else 'is deleted'}")
        return
    for item in maintenance.lost_items(root):
        show(item, f"{item.id}  {item.kind}  {', '.join(item.names) or '-'}  {item.path}")
    faults = list(maintenance.faults(root, verify=verify))
    for fault in faults:
        show(fault, f"{fault.path}: {fault.fault}; {fault.remedy}")
    if verify and faults:
        raise typer.Exit(1)
