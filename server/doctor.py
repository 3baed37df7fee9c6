"""The work of `lorakeet doctor`: restore or remove items that were set aside, and verify the data directory."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapters.peft_format import record
from adapters.peft_format.directory import CONFIG_NAME
from adapters.storage import entries, lost, mending
from adapters.storage.database import DatabaseBusy, DatabaseDamaged, NewerLayoutError, find_damage
from adapters.storage.names import LocalNames
from adapters.storage.versions import DamagedAdapter
from server.data_dir import restore_names, taken
from server.finetune import files, restore
from server.finetune.database import open_database

HOMES = {"versions": Path("adapters", "versions"), "files": Path("files"), "jobs": Path("jobs")}


class DoctorError(Exception):
    """An order that cannot be carried out; the message is one line for the operator."""


@dataclass(frozen=True)
class Lost:
    """One item that was set aside. `names`: its names, if its own files tell them."""

    id: str
    kind: str
    names: list[str]
    path: str


@dataclass(frozen=True)
class Fault:
    """One damaged item. `remedy`: the consequence, or advice."""

    path: str
    fault: str
    remedy: str


def found(root: Path) -> Iterator[Lost]:
    """Yield the items in `lost+found`."""
    for kind in HOMES:
        for path in lost.entries(root / lost.LOST_AND_FOUND / kind):
            if kind == "versions":
                names = [entry["name"] for entry in entries.read(path)]
            elif kind == "files":
                names = [row["filename"]] if (row := files.recorded(root / HOMES[kind], path.name)) else []
            else:
                names = [path.name] if (path / restore.JOB).exists() else []
            yield Lost(path.name, kind, names, str(path))


def treat(root: Path, ids: list[str], *, everything: bool, restored: bool) -> list[Lost]:
    """Restore or remove items, while no server uses the directory. Raises DoctorError, SettingError."""
    with taken(root):
        chosen = _chosen(root, ids, everything=everything)
        (_restore if restored else _remove)(root, chosen)
    return chosen


def faults(root: Path, *, verify: bool) -> Iterator[Fault]:
    """Yield databases that were set aside; with `verify`, also everything damaged, after reading every byte."""
    yield from _damaged_databases(root)
    if verify:
        yield from _verify_databases(root)
        yield from _verify_versions(root)
        yield from _verify_files(root)


def _chosen(root: Path, ids: list[str], *, everything: bool) -> list[Lost]:
    if everything == bool(ids):
        raise DoctorError("give the ids that `lorakeet doctor` lists, or --all")
    by_id = {thing.id: thing for thing in found(root)}
    if unknown := [id_ for id_ in ids if id_ not in by_id]:
        raise DoctorError(f"{unknown[0]}: no item of this id was set aside")
    return [by_id[id_] for id_ in ids] if ids else list(by_id.values())


def _remove(root: Path, chosen: list[Lost]) -> None:
    for thing in chosen:
        lost.remove(Path(thing.path))
        if thing.kind == "files":
            lost.remove(files.record_of(root / HOMES["files"], thing.id))


def _restore(root: Path, chosen: list[Lost]) -> None:
    """Move items back to their places, then write their rows."""
    moves = {Path(thing.path): root / HOMES[thing.kind] / thing.id.partition("~")[0] for thing in chosen}
    for thing in chosen:
        if not thing.names:
            raise DoctorError(f"the name of {thing.id} is not recorded; upload it again from {thing.path}")
        if moves[Path(thing.path)].exists():
            raise DoctorError(f"{thing.id} already exists in its place: delete this copy with --remove")
    for path, home in moves.items():
        home.parent.mkdir(parents=True, exist_ok=True)
        path.rename(home)
    moved = {kind: [moves[Path(thing.path)] for thing in chosen if thing.kind == kind] for kind in HOMES}
    try:
        names = LocalNames(root / "adapters.db")
        restore_names(names, moved["versions"])
        names.close()
        database = open_database(root / "finetuning.db")
        list(restore.restore_files(database, moved["files"]))
        list(restore.restore_jobs(database, moved["jobs"]))
        database.close()
    except (DatabaseBusy, DatabaseDamaged, NewerLayoutError, OSError) as fault:
        raise DoctorError(f"{fault}; the next start sets items without a row aside again") from None


# --- verifying -------------------------------------------------------------------------------------


def _damaged_databases(root: Path) -> Iterator[Fault]:
    for path in sorted(root.glob("*.db.damaged-*")):
        if not path.name.endswith(("-wal", "-shm")):
            yield Fault(str(path), "a damaged database, set aside", "`sqlite3 FILE .recover` shows its readable rows")


def _verify_databases(root: Path) -> Iterator[Fault]:
    anew = "the next start sets it aside and makes a new one"
    restored = "restore it from a backup: it has the tenants and keys, and no server starts without it"
    for name, remedy in (("adapters.db", anew), ("finetuning.db", anew), ("tenants.db", restored)):
        if (root / name).exists() and (fault := find_damage(root / name)):
            yield Fault(str(root / name), fault, remedy)


def _verify_versions(root: Path) -> Iterator[Fault]:
    for path in lost.entries(root / HOMES["versions"]):
        try:
            record.check(path)
        except record.DamagedFile as fault:
            remedy = "upload it again"
            with contextlib.suppress(DamagedAdapter):
                mending.verified_spec(path, f"sha256:{path.name}")
                if CONFIG_NAME not in str(fault):
                    remedy = "its weights are undamaged: the server mends it when it is requested"
            yield Fault(str(path), str(fault), remedy)


def _verify_files(root: Path) -> Iterator[Fault]:
    for path in lost.entries(root / HOMES["files"]):
        if path.is_file() and not files.whole(path):
            yield Fault(str(path), "its content differs from the upload", "upload it again")
