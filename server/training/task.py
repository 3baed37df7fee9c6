"""One job inside the engine: its data, parameters, optimiser and position.

The trainer takes micro-batches from it, reports their results to it and has it save; its messages to the API process
collect in `replies`.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace
from torch import Tensor

from adapters.device.experts import ExpertLinear
from adapters.device.lora import LoraLinear
from adapters.disk import is_disk_full
from adapters.peft_format import directory as adapter_format
from server.messages.dataset import Dataset
from server.messages.training import (
    CHECKPOINTS,
    STORAGE_FULL,
    Checkpoint,
    JobEnded,
    JobNote,
    JobReply,
    Metrics,
    StartJob,
    TrainingStep,
)
from server.training import checkpoint
from server.training.checkpoint import Snapshot, State
from server.training.optimizer import AdamW, Update
from server.training.plan import Steps, pack
from server.training.trainable import Dropout, TrainableAdapter

MAX_SKIPPED_IN_A_ROW = 5
AUTOSAVE_SECONDS = 60.0  # most work repeated after a kill


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences of one job, with labels and weight."""

    ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T], from 0 in each sequence
    bounds: list[tuple[int, int]]  # of each sequence
    rows: Tensor  # int64 [n], positions before the tokens trained on
    labels: Tensor  # int64 [n], the tokens trained on
    weight: float  # of one label's loss in the gradient; 0 for an evaluation
    dropout: Dropout | None


@dataclass
class Tally:
    """Sums over the micro-batches of a step or an evaluation."""

    loss: float = 0.0
    correct: int = 0
    labels: int = 0

    @property
    def mean_loss(self) -> float | None:
        """The mean loss per label; None when it is not finite."""
        return self.loss / self.labels if np.isfinite(self.loss) else None

    @property
    def accuracy(self) -> float:
        return self.correct / self.labels


class Task:
    """A running job.

    Raises OSError, ValueError or KeyError for missing or invalid files.
    """

    def __init__(self, start: StartJob, linears: Sequence[LoraLinear | ExpertLinear], device: torch.device) -> None:
        self.id = start.id
        self.plan = start.plan
        self.replies: list[JobReply] = []
        self.busy_seconds = 0.0  # device time since the last report
        self.stop: Literal["pause", "cancel"] | None = None
        self._start = start
        self._device = device
        self._train = Dataset.load(Path(start.train_data))
        self._valid = None if start.valid_data is None else Dataset.load(Path(start.valid_data))
        self.steps = Steps(self.plan, self._train.lengths.tolist())
        self.adapter = TrainableAdapter(
            linears,
            start.modules,
            device=device,
            seed=self.plan.seed,
            init=self.plan.init,
            scale_vector=self.plan.scale_vector,
        )
        self._optimizer = AdamW(
            self.adapter.values,
            self.adapter.grads,
            decayed=self.adapter.decayed,
            kind=self.plan.optimizer,
            weight_decay=self.plan.weight_decay,
        )
        self.state = State(step=0, trained_tokens=0)
        if start.resume is not None:
            self.state, values, optimizer = checkpoint.read(Path(start.resume))
            self.adapter.values.copy_(values)
            self._optimizer.load(optimizer)
        elif start.initial is not None:
            self.adapter.load(adapter_format.load_pairs(Path(start.initial)))
        self._reported_at = self._saved_at = time.monotonic()
        self._metrics = Metrics(step=self.state.step)
        self._grad_norm = 0.0
        self._rate = 0.0
        self._tally = Tally()
        self._queue: deque[MicroBatch] = deque()
        self._outcome: Literal["succeeded", "paused"] | None = None
        self._last: JobEnded | None = None
        self._to_save: Literal["checkpoint", "state", "final"] | None = None
        self._writing: tuple[Future[None], Checkpoint] | None = None
        if self.state.step < self.steps.total:
            self.begin_step()
        else:  # killed between the last step's checkpoint and its report
            self._to_save, self._outcome = "final", "succeeded"

    # --- micro-batches ---------------------------------------------------------------------------------

    @property
    def next(self) -> MicroBatch | None:
        """The job's micro-batch for the next pass, the same until `finish_micro_batch` is called.

        None while a checkpoint is due: training would run past its step while the one before is still being written.
        """
        return self._queue[0] if self._queue and not self.must_save and not self.over else None

    def begin_step(self) -> None:
        """Queue all micro-batches of the current step, and zero the gradients."""
        step = self.state.step
        groups = self.steps.micro_batches(step)
        labels = sum(int(self._train.sequence(index)[1].sum()) for group in groups for index in group)
        self.adapter.grads.zero_()
        self._tally = Tally()
        self._queue.clear()
        for number, group in enumerate(groups):
            dropout = None
            if self.plan.lora_dropout:
                dropout = Dropout(self.plan.lora_dropout, (self.plan.seed, "dropout", step, number))
            self._queue.append(self._micro_batch(self._train, group, 1.0 / labels, dropout))

    def finish_micro_batch(self, loss: float, correct: int) -> None:
        """Count a finished micro-batch, with sums over its labels."""
        done = self._queue.popleft()
        self._tally.loss += loss
        self._tally.correct += correct
        self._tally.labels += len(done.labels)

    def _micro_batch(self, data: Dataset, group: list[int], weight: float, dropout: Dropout | None) -> MicroBatch:
        sequences = [data.sequence(index) for index in group]
        ends = np.cumsum([len(ids) for ids, _ in sequences]).tolist()
        bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        ids = np.concatenate([ids for ids, _ in sequences]).astype(np.int64)
        labelled = np.flatnonzero(np.concatenate([trained for _, trained in sequences]))  # never a sequence's first

        def tensor(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(self._device)

        return MicroBatch(
            ids=tensor(ids),
            positions=tensor(np.concatenate([np.arange(end - start) for start, end in bounds])),
            bounds=bounds,
            rows=tensor(labelled - 1),
            labels=tensor(ids[labelled]),
            weight=weight,
            dropout=dropout,
        )

    # --- end of a step ------------------------------------------------------------------------------------

    def clip(self) -> bool:
        """Clip the gradient's norm. False when the loss or gradient is not finite: it must not be applied then."""
        self._grad_norm = float(torch.linalg.vector_norm(self.adapter.grads))
        self._rate = self.steps.learning_rate(self.state.step)
        limit = self.plan.max_grad_norm
        if 0.0 < limit < self._grad_norm:
            self.adapter.grads.mul_(limit / (self._grad_norm + 1e-6))
        return bool(np.isfinite(self._grad_norm)) and self._tally.mean_loss is not None

    def updates(self) -> Iterator[tuple[Update, float]]:
        """Return the optimiser's pieces of this step, each with the learning rate."""
        return ((update, self._rate) for update in self._optimizer.updates())

    def finish_step(self, *, applied: bool) -> None:
        """Count the step, and queue an evaluation when one is due."""
        step = self.state.step
        self._metrics = Metrics(
            step=step + 1, train_loss=self._tally.mean_loss, train_mean_token_accuracy=self._tally.accuracy
        )
        tokens = sum(int(self._train.lengths[index]) for index in self.steps.batch(step))
        self.state = replace(
            self.state,
            step=step + 1,
            trained_tokens=self.state.trained_tokens + tokens,
            skipped_in_a_row=0 if applied else self.state.skipped_in_a_row + 1,
        )
        if not applied:
            message = f"Step {step + 1}: the loss or a gradient was not finite; the step was skipped."
            self.replies.append(JobNote(self.id, "warn", message))
        if self._valid is not None and self.steps.evaluates(step):
            lengths = self._valid.lengths.tolist()
            groups = pack(range(len(lengths)), lengths, self.plan.micro_batch_tokens)
            self._queue.extend(self._micro_batch(self._valid, group, 0.0, None) for group in groups)
            self._tally = Tally()
        else:
            self._close_step()

    def finish_evaluation(self) -> None:
        """Add a finished evaluation's results to the step."""
        loss, accuracy = self._tally.mean_loss, self._tally.accuracy
        self._metrics = replace(
            self._metrics,
            valid_loss=loss,
            valid_mean_token_accuracy=accuracy,
            full_valid_loss=loss,
            full_valid_mean_token_accuracy=accuracy,
        )
        best = self.state.best_valid_loss
        gained = loss is not None and (best is None or loss < best)
        self.state = replace(
            self.state,
            best_valid_loss=loss if gained else best,
            evaluations_without_gain=0 if gained else self.state.evaluations_without_gain + 1,
        )
        self._close_step()

    def _close_step(self) -> None:
        """Report the step, and schedule a checkpoint, the end, or the next step."""
        now = time.monotonic()
        self.replies.append(
            TrainingStep(
                id=self.id,
                metrics=self._metrics,
                total_steps=self.steps.total,
                learning_rate=self._rate,
                grad_norm=self._grad_norm,
                trained_tokens=self.state.trained_tokens,
                seconds=now - self._reported_at,
                busy_seconds=self.busy_seconds,
            )
        )
        self._reported_at, self.busy_seconds = now, 0.0
        if self.state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            message = f"The loss or a gradient was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row."
            self.fail("non_finite_loss", f"{message} A lower learning rate may help.")
            return
        patience = self.plan.early_stopping
        if stalled := 0 < patience <= self.state.evaluations_without_gain:
            message = f"Stopped early: no better validation loss in {patience} evaluations."
            self.replies.append(JobNote(self.id, "info", message))
        if stalled or self.state.step == self.steps.total:
            self._to_save, self._outcome = "final", "succeeded"
        elif self.steps.saves(self.state.step - 1):
            self._to_save = "checkpoint"
        elif self.stop == "pause" or now - self._saved_at > AUTOSAVE_SECONDS:
            self._to_save = "state"
        if self.stop == "pause" and self._outcome is None:
            self._outcome = "paused"
        if self._outcome is None:
            self.begin_step()

    # --- saving and ending -----------------------------------------------------------------------------------

    @property
    def must_save(self) -> bool:
        """Whether a checkpoint is due; nothing else may be computed for this job before it is taken."""
        return self._to_save is not None and not self.over

    @property
    def can_save(self) -> bool:
        """Whether a checkpoint is due and none is being written."""
        return self.must_save and self._writing is None

    @property
    def over(self) -> bool:
        """Whether computing for the job is finished; it has ended once no checkpoint is being written either."""
        return self._last is not None

    @property
    def ended(self) -> bool:
        """Whether the last reply, `JobEnded`, has been queued."""
        return bool(self.replies) and isinstance(self.replies[-1], JobEnded)

    def save(self, writer: Executor) -> None:
        """Copy the state, and have `writer` write it while training continues."""
        assert self._to_save is not None
        snapshot = Snapshot(
            state=self.state,
            adapter={name: (a.clone(), b.clone()) for name, (a, b) in self.adapter.tensors().items()},
            values=self.adapter.values.clone(),
            optimizer=self._optimizer.state(),
        )
        directory = Path(self._start.directory) / CHECKPOINTS / f"step-{self.state.step}"
        reply = Checkpoint(
            id=self.id,
            metrics=self._metrics,
            directory=str(directory),
            trained_tokens=self.state.trained_tokens,
            kind=self._to_save,
        )
        future = writer.submit(checkpoint.write, directory, snapshot, self._start.config)
        self._writing, self._to_save = (future, reply), None
        self._saved_at = time.monotonic()

    def poll(self) -> None:
        """Report a written checkpoint, and the end after the last one."""
        if self._writing is not None and self._writing[0].done():
            (future, reply), self._writing = self._writing, None
            if fault := future.exception():
                code = STORAGE_FULL if is_disk_full(fault) else "checkpoint_not_written"
                self.fail(code, f"A checkpoint could not be written: {fault}")
            else:
                self.replies.append(reply)
                if self._outcome is not None and not self.must_save:
                    self._end(JobEnded(id=self.id, outcome=self._outcome))
        # `JobEnded` allows the job's directory to be removed, so it waits for a checkpoint being written.
        if self._last is not None and self._writing is None and not self.ended:
            self.replies.append(self._last)

    def cancel(self) -> None:
        self._end(JobEnded(id=self.id, outcome="cancelled"))

    def fail(self, code: str, message: str) -> None:
        self._end(JobEnded(id=self.id, outcome="failed", code=code, message=message))

    def _end(self, reply: JobEnded) -> None:
        self._last = self._last or reply
