"""Fetching of an adapter's files from the Hugging Face Hub.

Runs in a process of its own: a hub may be slow, and its caller (`server.registry.hub`) ends it after a time limit.
Endpoint and token come from `huggingface_hub`'s own variables (`HF_ENDPOINT`, `HF_TOKEN`).
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.disk import is_disk_full
from adapters.peft_format.fields import AdapterError

UNAVAILABLE = "hub_unavailable"  # error code for faults of the hub or the network


@dataclass(frozen=True)
class Order:
    """The files to fetch from a repository, and their target; files missing there are left out."""

    repository: str
    revision: str | None
    folder: str
    names: Sequence[str]
    target: str
    most_bytes: int


def fetch(order: Order) -> str:
    """Fetch the files and return their commit. Raises AdapterError, OSError for the disk."""
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        EntryNotFoundError,
        HTTPError,  # that of the httpx release in use
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return _fetch(order)
    except (RepositoryNotFoundError, RevisionNotFoundError) as fault:
        message = "the hub has no such repository or revision that this server may read"
        raise AdapterError(message, "", "hub_not_found") from fault
    except (EntryNotFoundError, HTTPError, OSError) as fault:
        if is_disk_full(fault):
            raise
        first = next(iter(str(fault).splitlines()), "") or type(fault).__name__
        raise AdapterError(f"the hub did not deliver it: {first}", "", UNAVAILABLE) from fault


def _fetch(order: Order) -> str:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    info = HfApi().model_info(order.repository, revision=order.revision, files_metadata=True)
    prefix = f"{order.folder}/" if order.folder else ""
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    found = {name: sizes[prefix + name] for name in order.names if prefix + name in sizes}
    if sum(found.values()) > order.most_bytes:
        size = sum(found.values())
        raise AdapterError(f"it has {size} bytes, more than {order.most_bytes} (--max-upload-bytes)", "", "too_large")
    if info.sha is None:
        raise AdapterError("the hub reported no commit", "", UNAVAILABLE)
    target = Path(order.target)
    work = target / ".hub"
    for name in found:
        path = hf_hub_download(order.repository, prefix + name, revision=info.sha, local_dir=work)
        Path(path).rename(target / name)
    shutil.rmtree(work, ignore_errors=True)
    return info.sha
