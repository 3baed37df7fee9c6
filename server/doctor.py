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
from server.data_dir import locked, restore_names
from server.finetune import files, restore
from server.finetune.database import open_database

FOLDERS = {"versions": Path("adapters", "versions"), "files": Path("files"), "jobs": Path("jobs")}


class DoctorError(Exception):
    """An order that cannot be carried out; the message is one line for the operator."""


@dataclass(frozen=True)
class LostItem:
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


def lost_items(root: Path) -> Iterator[LostItem]:
    """Yield the items in `lost+found`."""
    for kind in FOLDERS:
        for path in lost.entries(root / lost.LOST_AND_FOUND / kind):
            if kind == "versions":
                names = [entry["name"] for entry in entries.read(path)]
            elif kind == "files":
                names = [row["filename"]] if (row := files.read_record(root / FOLDERS[kind], path.name)) else []
            else:
                names = [path.name] if (path / restore.JOB).exists() else []
            yield LostItem(path.name, kind, names, str(path))


def restore_or_remove(root: Path, ids: list[str], *, everything: bool, restoring: bool) -> list[LostItem]:
    """Restore or remove items, while no server uses the directory. Raises DoctorError, SettingError."""
    with locked(root):
        chosen = _chosen(root, ids, everything=everything)
        (_restore if restoring else _remove)(root, chosen)
    return chosen


def faults(root: Path, *, verify: bool) -> Iterator[Fault]:
    """Yield databases that were set aside; with `verify`, also everything damaged, after reading every byte."""
    yield from _damaged_databases(root)
    if verify:
        yield from _verify_databases(root)
        yield from _verify_versions(root)
        yield from _verify_files(root)


def _chosen(root: Path, ids: list[str], *, everything: bool) -> list[LostItem]:
    if everything == bool(ids):
        raise DoctorError("give the ids that `lorakeet doctor` lists, or --all")
    by_id = {item.id: item for item in lost_items(root)}
    if unknown := [id_ for id_ in ids if id_ not in by_id]:
        raise DoctorError(f"{unknown[0]}: no item of this id was set aside")
    return [by_id[id_] for id_ in ids] if ids else list(by_id.values())


def _remove(root: Path, chosen: list[LostItem]) -> None:
    for item in chosen:
        lost.remove(Path(item.path))
        if item.kind == "files":
            lost.remove(files.record_path(root / FOLDERS["files"], item.id))


def _restore(root: Path, chosen: list[LostItem]) -> None:
    """Move items back to their places, then write their rows."""
    moves = {Path(item.path): root / FOLDERS[item.kind] / item.id.partition("~")[0] for item in chosen}
    for item in chosen:
        if not item.names:
            raise DoctorError(f"the name of {item.id} is not recorded; upload it again from {item.path}")
        if moves[Path(item.path)].exists():
            raise DoctorError(f"{item.id} already exists in its place: delete this copy with --remove")
    for path, target in moves.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    moved = {kind: [moves[Path(item.path)] for item in chosen if item.kind == kind] for kind in FOLDERS}
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
    recreate = "the next start sets it aside and makes a new one"
    from_backup = "restore it from a backup: it has the tenants and keys, and no server starts without it"
    for name, remedy in (("adapters.db", recreate), ("finetuning.db", recreate), ("tenants.db", from_backup)):
        if (root / name).exists() and (fault := find_damage(root / name)):
            yield Fault(str(root / name), fault, remedy)


def _verify_versions(root: Path) -> Iterator[Fault]:
    for path in lost.entries(root / FOLDERS["versions"]):
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
    for path in lost.entries(root / FOLDERS["files"]):
        if path.is_file() and not files.is_intact(path):
            yield Fault(str(path), "its content differs from the upload", "upload it again")
