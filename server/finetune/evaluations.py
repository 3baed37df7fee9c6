"""Evaluations: an adapter compared with the base on held-out examples, through the engine that serves requests.

Loss is computed from prompt log-probabilities, so it is the loss in serving, not in training. Exact match generates
each example's last trained turn greedily and compares the text.
"""

import asyncio
import contextlib
import logging
import math
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np
from msgspec.structs import replace

from adapters.background import run_in
from adapters.disk import StorageFull
from adapters.storage.database import DatabaseBusy
from adapters.storage.versions import RemoteUnavailable
from adapters.strict_json import encode_line
from server.client.engine import EngineClient, EngineDied, wait_until_ready
from server.errors import EngineUnavailable, InternalError, ModelNotFound, as_error
from server.finetune import hyperparameters
from server.finetune.dataset import load_dataset
from server.finetune.evaluation_store import (
    Evaluation,
    EvaluationStateError,
    EvaluationStore,
    Score,
)
from server.finetune.files import FileStore, UnknownFileError
from server.finetune.jobs import JobError, JobFailedError
from server.finetune.manager import MAX_DEATHS, SPACE_SECONDS
from server.finetune.rows import DatasetError
from server.finetune.tokenizer import TrainingTokenizer
from server.finetune.worker import Worker
from server.messages.dataset import Dataset
from server.messages.protocol import AdapterRef, Generate, Output, Ready, Sampling
from server.registry.open import Registry
from server.tenants.caller import Caller
from server.text.processor import TextProcessor

log = logging.getLogger("lorakeet.finetune")

RESULTS = "evaluation-results"
_RETRIED = (503, 507)  # statuses of temporary faults: an unavailable store, a full disk
SPARE_TOKENS = 8  # beyond the expected answer, to detect longer ones


class Answer(msgspec.Struct, frozen=True):
    """A model's result on one example: the mean loss of its trained tokens, and the greedy answer."""

    loss: float
    answer: str | None  # None: a text, without an answer to compare
    exact_match: bool | None


class Row(msgspec.Struct, frozen=True):
    """A line of the result file."""

    example: int
    prompt: str
    expected: str
    base: Answer
    adapter: Answer | None


@dataclass(frozen=True)
class _Model:
    """The evaluated model, and the tenant, for its own prefix cache."""

    tenant: str
    adapters: list[AdapterRef]
    stops: set[int]


@dataclass(frozen=True)
class _Example:
    """A sequence with its trained positions, and its last trained turn as prompt and answer."""

    tokens: list[int]
    trained: list[int]
    prompt: list[int]
    answer: list[int]


class Evaluations(Worker[Evaluation]):
    """The worker on evaluations; each starts from its beginning, also after a change of servers.

    Args:
        max_concurrent: most sequences in the engine, of all evaluations together.
    """

    def __init__(
        self,
        store: EvaluationStore,
        files: FileStore,
        registry: Registry,
        engine: EngineClient,
        text: TextProcessor,
        *,
        max_concurrent: int,
    ) -> None:
        super().__init__(store)
        self.store = store
        self._files = files
        self._registry = registry
        self._engine = engine
        self._text = text
        self._slots = asyncio.Semaphore(max_concurrent)

    # --- client operations --------------------------------------------------------------------------------

    async def create(
        self, tenant: str, *, model: str, adapter: str | None, digest: str | None, file: str, max_examples: int | None
    ) -> Evaluation:
        """Record an evaluation and start it."""
        create = partial(self.store.create, tenant, model=model, adapter=adapter, digest=digest, file=file)
        evaluation = await asyncio.to_thread(create, max_examples=max_examples)
        self.enqueue(evaluation)
        return evaluation

    async def delete(self, tenant: str, evaluation_id: str) -> None:
        """Delete an evaluation, stopping it if it runs. Raises UnknownEvaluationError."""
        evaluation = await asyncio.to_thread(self.store.get, tenant, evaluation_id)
        await self.abandon(evaluation_id)
        try:
            await asyncio.to_thread(self._delete_files, evaluation)  # first: its row is the only reference to them
            await asyncio.to_thread(self.store.delete, evaluation_id)
        except BaseException:
            if evaluation.has_work:
                self.enqueue(evaluation)
            raise

    # --- lifecycle -------------------------------------------------------------------------------------------

    async def _work(self, evaluation: Evaluation) -> None:
        try:
            await self._advance(evaluation)
        finally:
            with contextlib.suppress(StorageFull, DatabaseBusy, RemoteUnavailable):
                await run_in(None, partial(self._delete_unneeded_files, evaluation))

    async def _advance(self, evaluation: Evaluation) -> None:
        """Run an evaluation to its end, unless another server takes it over."""
        while True:
            try:
                done = await self._evaluate(evaluation)
            except EngineDied as death:
                evaluation = done = replace(evaluation, deaths=evaluation.deaths + 1)
                if done.deaths >= MAX_DEATHS:
                    done = replace(done, status="failed", error=JobError("engine_died", death.message))
            except JobFailedError as fault:
                done = replace(evaluation, status="failed", error=fault.error)
            except Exception as fault:
                error = as_error(fault)
                if error.status in _RETRIED:
                    log.warning("evaluation %s is retried after a fault: %s", evaluation.id, fault)
                    await asyncio.sleep(SPACE_SECONDS)
                    continue
                if isinstance(error, InternalError):
                    log.exception("evaluation %s failed", evaluation.id)
                done = replace(
                    evaluation, status="failed", error=JobError(error.code or error.type, error.message, error.param)
                )
            if done.status != "running":
                done = replace(done, finished_at=int(time.time()))
            if not await self._save(done) or done.status != "running":
                return

    async def _save(self, evaluation: Evaluation) -> bool:
        """Save an evaluation's state, retrying after outages; return False if its lease is lost or it was deleted."""
        while True:
            try:
                await asyncio.to_thread(self.store.save, evaluation)
                return True
            except EvaluationStateError:
                return False
            except (StorageFull, DatabaseBusy, RemoteUnavailable) as fault:
                log.warning("evaluation %s is retried after a fault: %s", evaluation.id, fault)
            await asyncio.sleep(SPACE_SECONDS)

    def _delete_unneeded_files(self, evaluation: Evaluation) -> None:
        """Delete an evaluation's files if it has failed, or was deleted in the meantime."""
        if not self.store.has_results(evaluation):
            self._delete_files(evaluation)

    def _delete_files(self, evaluation: Evaluation) -> None:
        for file_id in {*evaluation.result_files, _result_file(evaluation)}:
            with contextlib.suppress(UnknownFileError):
                self._files.delete(evaluation.tenant, file_id)

    # --- evaluating --------------------------------------------------------------------------------------------

    async def _evaluate(self, evaluation: Evaluation) -> Evaluation:
        base = await wait_until_ready(self._engine)
        examples = await asyncio.to_thread(self._read, evaluation, base)
        references: list[AdapterRef] = []
        learned: Sequence[int] = ()
        adapted = None
        async with contextlib.AsyncExitStack() as held:
            if evaluation.adapter is not None and evaluation.digest is not None:
                name = f"{evaluation.adapter}@{evaluation.digest.removeprefix('sha256:')}"
                try:
                    version = await held.enter_async_context(self._registry.open(Caller(evaluation.tenant), name))
                except ModelNotFound:
                    message = f"The adapter {evaluation.adapter} no longer has that version."
                    raise JobFailedError("adapter_not_found", message, "model") from None
                references = [AdapterRef(version.digest, str(version.path))]
                learned = version.receipt.get("stop_token_ids", ())
            stops = {*base.eos_token_ids, *self._text.stop_tokens}
            plain = await self._answers(examples, _Model(evaluation.tenant, [], stops))
            if references:
                model = _Model(evaluation.tenant, references, {*stops, *learned})
                adapted = await self._answers(examples, model)
        return replace(
            evaluation,
            status="succeeded",
            base=_score(examples, plain),
            adapted=None if adapted is None else _score(examples, adapted),
            examples=len(examples),
            tokens=sum(len(example.trained) for example in examples),
            result_files=[await self._write_results(evaluation, self._rows(examples, stops, plain, adapted))],
        )

    def _rows(
        self, examples: Sequence[_Example], stops: set[int], base: Sequence[Answer], adapted: Sequence[Answer] | None
    ) -> list[Row]:
        others: Sequence[Answer | None] = adapted or [None] * len(base)
        return [
            Row(
                number,
                self._text.decode(example.prompt, skip_special_tokens=False),
                self._answer_text(example.answer, stops),
                plain,
                other,
            )
            for number, (example, plain, other) in enumerate(zip(examples, base, others, strict=True), start=1)
        ]

    async def _write_results(self, evaluation: Evaluation, rows: Sequence[Row]) -> str:
        """Write the result file, retrying until the disk has space; return its id."""
        tenant, file_id = evaluation.tenant, _result_file(evaluation)

        def write() -> str:
            with self._files.staging() as staging:
                path = staging / "rows.jsonl"
                path.write_bytes(b"".join(encode_line(row) + b"\n" for row in rows))
                return self._files.add(tenant, path, filename=path.name, purpose=RESULTS, file_id=file_id).id

        while True:
            try:
                return await run_in(None, write)  # a cancelled caller waits for the file, and deletes it
            except (OSError, StorageFull, DatabaseBusy, RemoteUnavailable) as fault:
                log.warning("writing the results of an evaluation is retried: %s", type(fault).__name__)
            await asyncio.sleep(SPACE_SECONDS)

    def _read(self, evaluation: Evaluation, base: Ready) -> list[_Example]:
        try:
            path = self._files.fetch(evaluation.tenant, evaluation.file).path
            with path.open("rb") as file:
                tokenizer = TrainingTokenizer(self._text, base.eos_token_ids)
                length = hyperparameters.max_seq_len(hyperparameters.TrainingOptions(), base) - SPARE_TOKENS
                data = load_dataset(file, tokenizer, max_length=length)
        except (UnknownFileError, FileNotFoundError):
            raise JobFailedError("file_not_found", f"The file {evaluation.file} no longer exists.", "file") from None
        except DatasetError as error:
            raise JobFailedError("invalid_file", str(error), "file") from None
        count = min(len(data), evaluation.max_examples or len(data))
        return [_example(data, index) for index in range(count)]

    async def _answers(self, examples: Sequence[_Example], model: _Model) -> list[Answer]:
        """Run one model on all examples."""
        runs = [asyncio.create_task(self._run_example(example, model)) for example in examples]
        try:
            return await asyncio.gather(*runs)
        finally:
            for task in runs:
                task.cancel()

    async def _run_example(self, example: _Example, model: _Model) -> Answer:
        """Run one model on one example."""
        score = Sampling(max_tokens=0, temperature=0.0, prompt_logprobs=0)
        async with self._slots:
            outputs = await self._generate(example.tokens, model, score)
            logprobs = [entry for output in outputs for entry in output.prompt_logprobs]
            loss = -sum(entry.logprob for i in example.trained if (entry := logprobs[i]) is not None)
            loss /= len(example.trained)
            if not example.prompt:
                return Answer(loss, None, None)
            most = len(example.answer) + SPARE_TOKENS
            answer = Sampling(max_tokens=most, temperature=0.0, stop_token_ids=sorted(model.stops))
            outputs = await self._generate(example.prompt, model, answer)
        given = self._answer_text([token for output in outputs for token in output.tokens], model.stops)
        return Answer(loss, given, given == self._answer_text(example.answer, model.stops))

    def _answer_text(self, tokens: Sequence[int], stops: set[int]) -> str:
        """Return an answer's text, without the tokens that end it."""
        return self._text.decode([token for token in tokens if token not in stops], skip_special_tokens=True).strip()

    async def _generate(self, prompt: list[int], model: _Model, sampling: Sampling) -> list[Output]:
        """Return all outputs of one sequence, waiting for an engine. Raises EngineDied, JobFailedError."""
        while True:
            await wait_until_ready(self._engine)
            request = Generate(
                id=f"eval-{uuid.uuid4().hex}",
                prompt=prompt,
                sampling=sampling,
                adapters=model.adapters,
                tenant=model.tenant,
            )
            try:
                async with aclosing(self._engine.generate(request)) as stream:
                    outputs = [output async for output in stream]
            except EngineDied:
                raise
            except EngineUnavailable:
                continue
            if outputs[-1].error is not None:
                raise JobFailedError(outputs[-1].code or "engine_error", outputs[-1].error)
            return outputs


def _result_file(evaluation: Evaluation) -> str:
    """Return a fixed id for the result file: repeating the write after a crash makes no second file."""
    return f"file-{evaluation.id.removeprefix('eval-')}r"


def _example(data: Dataset, index: int) -> _Example:
    ids, mask = data.sequence(index)
    tokens, trained = ids.tolist(), np.flatnonzero(mask).tolist()
    first = last = trained[-1]
    while mask[first - 1]:  # stops at the first token, which is never trained on
        first -= 1
    # A text has no prompt: all tokens but the first are trained on.
    prompt = tokens[:first] if first > 1 else []
    return _Example(tokens, trained, prompt, tokens[first : last + 1])


def _score(examples: Sequence[_Example], answers: Sequence[Answer]) -> Score:
    """Return one model's score over all examples, weighting all tokens equally."""
    lengths = [len(example.trained) for example in examples]
    loss = sum(answer.loss * length for answer, length in zip(answers, lengths, strict=True)) / sum(lengths)
    matches = [answer.exact_match for answer in answers if answer.exact_match is not None]
    return Score(loss, math.exp(min(loss, 700.0)), sum(matches) / len(matches) if matches else None)
