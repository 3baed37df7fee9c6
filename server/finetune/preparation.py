"""Preparation of a job: encoding its data, deciding every hyperparameter, asking the engine about memory.

The result, a `StartJob`, is stored with the job and never decided again.
"""

import asyncio
import json
import shutil
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from adapters.disk import sync
from adapters.peft_format import record
from adapters.peft_format.directory import CONFIG_NAME, SPEC_NAME, WEIGHTS_NAME, AdapterSpec
from adapters.peft_format.fields import AdapterError
from server.finetune import hyperparameters
from server.finetune.checkpoints import file_hash
from server.finetune.dataset import load_dataset
from server.finetune.files import FileStore, UnknownFileError
from server.finetune.jobs import Job, JobFailedError, JobStore
from server.finetune.rows import DatasetError
from server.finetune.tokenizer import TrainingTokenizer
from server.messages.dataset import Dataset
from server.messages.protocol import Ready
from server.messages.training import MemoryPlan, ModuleShape, Optimizer, PlanMemory, StartJob
from server.text.processor import TextProcessor

INITIAL = "initial"  # in a job's directory: the adapter to continue from


def copy_initial(version: Path, directory: Path) -> None:
    """Copy the version to continue from: its name may be deleted before the job starts. Raises DamagedFile."""
    files = (CONFIG_NAME, WEIGHTS_NAME, SPEC_NAME)
    record.check(version, files)
    target = directory / INITIAL
    target.mkdir()
    for name in (*files, record.RECORD_NAME):
        shutil.copyfile(version / name, target / name)
        sync(target / name)
    sync(target)


def relocated(start: StartJob, directory: Path) -> StartJob:
    """Return `start` with its files in this directory: another server may have prepared the job."""
    fields = ("train_data", "valid_data", "initial")
    files = {name: str(directory / Path(file).name) for name in fields if (file := getattr(start, name)) is not None}
    return replace(start, directory=str(directory), **files)


class Preparation:
    """Prepares jobs, reading the files of one at a time."""

    def __init__(self, files: FileStore, jobs: JobStore, text: TextProcessor) -> None:
        self._files = files
        self._jobs = jobs
        self._text = text
        self._reading = asyncio.Lock()

    async def start_message(
        self, job: Job, base: Ready, directory: Path, ask_memory: Callable[[PlanMemory], Awaitable[MemoryPlan]]
    ) -> tuple[StartJob, dict[str, Any]]:
        """Return the message for the engine, and the job's fields that follow from the training data.

        Args:
            directory: the job's own; the encoded data is written there.

        Raises:
            JobFailedError: a file is missing or invalid, the adapter is impossible, or the job exceeds the memory.
        """
        spec = job.spec
        async with self._reading:
            train_data = directory / "train.safetensors"
            train = await self._encode(job, base, spec.training_file, "training_file", train_data)
            valid_data = None
            if spec.validation_file is not None:
                valid_data = directory / "valid.safetensors"
                await self._encode(job, base, spec.validation_file, "validation_file", valid_data)
        config, shapes = _adapter(job, base, directory)
        plan = hyperparameters.plan(
            spec.hyperparameters, spec.lora, spec.training, seed=spec.seed, sequences=len(train), base=base
        )
        tokens = int(max(plan.micro_batch_tokens, train.lengths.max()))
        memory = await ask_memory(memory_request(shapes, spec.lora, plan.optimizer, tokens))
        if memory.mode is None:
            needed, available = memory.total("recompute") >> 20, memory.available >> 20
            advice = "lower micro_batch_tokens, max_seq_len or r"
            raise JobFailedError(
                "out_of_memory", f"The job needs {needed} MiB and {available} MiB are available: {advice}."
            )
        start = StartJob(
            id=job.id,
            directory=str(directory),
            train_data=str(train_data),
            valid_data=None if valid_data is None else str(valid_data),
            modules=shapes,
            config=config,
            plan=replace(plan, memory=memory.mode),
            initial=str(directory / INITIAL) if spec.adapter is not None else None,
        )
        files = [train_data] if valid_data is None else [train_data, valid_data]
        inputs = {file.name: await asyncio.to_thread(file_hash, file) for file in files}
        await asyncio.to_thread(self._jobs.upload_files, job.id, directory, inputs)
        formats = {"tool_format": train.tool_format, "reasoning_format": train.reasoning_format}
        return start, {"stop_tokens": list(train.stop_tokens), "inputs": {**job.inputs, **inputs}} | formats

    async def _encode(self, job: Job, base: Ready, file_id: str, param: str, target: Path) -> Dataset:
        """Validate a file and write its token ids to `target`."""
        training = job.spec.training

        def encode() -> Dataset:
            self._jobs.add_event(job.id, f"Validating {param.replace('_', ' ')}: {file_id}")
            with self._files.fetch(job.tenant, file_id).path.open("rb") as file:
                data = load_dataset(
                    file,
                    TrainingTokenizer(self._text, base.eos_token_ids),
                    max_length=hyperparameters.max_seq_len(training, base),
                    completions_only=training.completions_only,
                )
            if data.tokens.max() >= base.vocab_size:
                raise DatasetError("encodes to tokens that the model does not have")
            data.save(target)
            self._jobs.add_event(job.id, f"{file_id}: {data.report}")
            return data

        try:
            return await asyncio.to_thread(encode)
        except (UnknownFileError, FileNotFoundError):
            raise JobFailedError("file_not_found", f"The file {file_id} no longer exists.", param) from None
        except DatasetError as error:
            raise JobFailedError(f"invalid_{param}", str(error), param) from None


def _adapter(job: Job, base: Ready, directory: Path) -> tuple[dict[str, Any], dict[str, ModuleShape]]:
    """Return the adapter's config and shapes: as requested, or those of the adapter to continue from."""
    if job.spec.adapter is not None:
        initial = AdapterSpec.read(directory / INITIAL)
        try:
            shapes = hyperparameters.trained_on(initial)
        except AdapterError as error:
            raise JobFailedError("invalid_adapter", f"The adapter {error}.", "adapter") from None
        return json.loads((directory / INITIAL / CONFIG_NAME).read_bytes()), shapes
    config = hyperparameters.adapter_config(job.spec.lora, job.spec.base, base)
    try:
        return config, hyperparameters.modules(config, base)
    except AdapterError as error:
        raise JobFailedError("invalid_lora", str(error), f"lora.{error.param}") from None


def memory_request(
    shapes: dict[str, ModuleShape], lora: hyperparameters.LoraOptions, optimizer: Optimizer, tokens: int
) -> PlanMemory:
    """Return the request to the engine for a job's memory. `tokens`: of its largest pass."""
    return PlanMemory(
        id=uuid.uuid4().hex,
        modules=shapes,
        optimizer=optimizer,
        scale_vector=lora.scale_vector,
        tokens=tokens,
    )
