"""Publication of a job's checkpoints as adapters (synced, published, recorded), the result file and the job's success.

A checkpoint counts once its row, with the hashes of its files, is committed; the files are on disk before.
"""

import asyncio
import contextlib
import csv
import hashlib
import io
import shutil
from collections.abc import Sequence
from pathlib import Path

from adapters.disk import is_disk_full, sync
from adapters.peft_format.directory import CONFIG_NAME, WEIGHTS_NAME
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.text import AdapterText
from server.finetune import restore
from server.finetune.files import FileStore
from server.finetune.jobs import Job, JobFailedError, JobStore, StoredCheckpoint
from server.messages.training import CHECKPOINTS, Checkpoint, Metrics
from server.registry.publish import Publisher

KEPT_CHECKPOINTS = 2  # directories to resume from: the last, and the one before in case the last is damaged
RESULTS = "fine-tune-results"
_COLUMNS = (
    "step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy",
    "full_valid_loss", "full_valid_mean_token_accuracy",
)  # fmt: skip


class CheckpointAdapters:
    """Checkpoints and results of all jobs. `directory` holds the jobs' own directories."""

    def __init__(self, directory: Path, files: FileStore, jobs: JobStore, publisher: Publisher) -> None:
        self._directory = directory
        self._files = files
        self._jobs = jobs
        self._publisher = publisher

    async def keep(self, job: Job, checkpoint: Checkpoint) -> None:
        """Sync a checkpoint, publish it, and only then record it; the final one makes the job succeed.

        Raises:
            JobFailedError: its files cannot be stored or served.
            StorageFull, OSError: the disk is full.
        """
        directory = Path(checkpoint.directory)
        name = None if checkpoint.kind == "state" else f"{job.model_name}:ckpt-step-{checkpoint.metrics.step}"
        try:
            hashes = await asyncio.to_thread(_sync_and_hash, directory)
            await asyncio.to_thread(self._jobs.upload_files, job.id, directory, hashes)
            if name is not None:
                await self._publish(job, name, directory)
            if checkpoint.kind == "final":
                await self._publish(job, job.model_name, directory)
            await asyncio.to_thread(self._commit, job, checkpoint, name, hashes)
        except (AdapterError, OSError) as error:
            if is_disk_full(error):
                raise
            raise JobFailedError("checkpoint_not_kept", f"A checkpoint could not be kept: {error}") from error

    async def _publish(self, job: Job, name: str, directory: Path) -> None:
        """Publish a checkpoint's adapter under a name."""
        async with self._publisher.staging_directory() as staging:
            for file in (CONFIG_NAME, WEIGHTS_NAME):
                await asyncio.to_thread(shutil.copyfile, directory / file, staging / file)
            learned = AdapterText(
                stop_tokens=tuple(job.stop_tokens),
                tool_format=job.tool_format,
                reasoning_format=job.reasoning_format,
            )
            await self._publisher.publish(job.tenant, name, staging, fine_tuned=True, from_training=learned)

    def _commit(self, job: Job, checkpoint: Checkpoint, name: str | None, hashes: dict[str, str]) -> None:
        with self._jobs.grouped_changes():
            self._jobs.add_checkpoint(
                job,
                metrics=checkpoint.metrics,
                name=name,
                directory=checkpoint.directory,
                hashes=hashes,
                trained_tokens=checkpoint.trained_tokens,
            )
            if checkpoint.kind == "final":
                self._succeed(job, checkpoint.trained_tokens)
        resumable = self._jobs.resumable(job.id)
        restore.write_record(Path(checkpoint.directory), restore.CHECKPOINT, resumable[0])
        for old in resumable[KEPT_CHECKPOINTS:]:
            shutil.rmtree(self._local_directory(job, old), ignore_errors=True)
        if checkpoint.kind != "final":
            kept = [kept.hashes for kept in resumable[:KEPT_CHECKPOINTS]]
            self._jobs.delete_files(job.id, [hash_ for files in (*kept, job.inputs) for hash_ in files.values()])

    def _succeed(self, job: Job, trained_tokens: int) -> None:
        """Write the result file and the job's success, in the open transaction."""
        with self._files.staging() as staging:
            results = staging / "step_metrics.csv"
            results.write_text(_as_csv(self._jobs.steps(job.id)))
            id_ = f"file-{job.id.removeprefix('ftjob-')}"  # a fixed id: a repeated end makes no second file
            stored = self._files.add(job.tenant, results, filename=results.name, purpose=RESULTS, file_id=id_)
        self._jobs.add_event(job.id, f"New fine-tuned model created: {job.model_name}")
        self._jobs.move(
            job,
            "succeeded",
            "The job has successfully completed",
            fine_tuned_model=job.model_name,
            trained_tokens=trained_tokens,
            result_files=[stored.id],
        )

    def last_good(self, job: Job) -> str | None:
        """Return the directory of the latest checkpoint with files that match their recorded hashes."""
        for kept in self._jobs.resumable(job.id)[:KEPT_CHECKPOINTS]:
            root, directory = self._directory / job.id, self._local_directory(job, kept)
            at = directory.relative_to(root)
            self._jobs.download_files(job.id, root, {str(at / name): hash_ for name, hash_ in kept.hashes.items()})
            with contextlib.suppress(OSError):
                if {name: file_hash(directory / name) for name in kept.hashes} == kept.hashes:
                    return str(directory)
            self._jobs.add_event(job.id, f"The checkpoint of step {kept.metrics.step} is damaged", level="warn")
        return None

    def remove_spare(self, job: Job) -> None:
        """Remove all checkpoints but the one to resume from: the one before it, and unrecorded ones."""
        last = self.last_good(job)
        for directory in (self._directory / job.id / CHECKPOINTS).glob("*"):
            if str(directory) != last:
                shutil.rmtree(directory, ignore_errors=True)

    def _local_directory(self, job: Job, kept: StoredCheckpoint) -> Path:
        """Return the local directory of a checkpoint, which another server may have written."""
        return self._directory / job.id / Path(*Path(kept.directory).parts[-2:])


def _sync_and_hash(directory: Path) -> dict[str, str]:
    """Sync a checkpoint's files; return file name -> hash of its content."""
    hashes = {}
    for path in sorted(directory.iterdir()):
        sync(path)
        hashes[path.name] = file_hash(path)
    sync(directory)
    sync(directory.parent)
    return hashes


def file_hash(path: Path) -> str:
    """Return the BLAKE2b hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _as_csv(steps: Sequence[Metrics]) -> str:
    """Return the metrics as CSV: a header and one line per step."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for metrics in steps:
        writer.writerow(["" if (value := getattr(metrics, name)) is None else value for name in _COLUMNS])
    return out.getvalue()
