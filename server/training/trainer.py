"""Training on the resident base, in pieces short enough to fit between inference steps.

One pass takes the next micro-batch of every running job, packed together: the base is dequantised once for all. The
forward pass runs without gradients and keeps each layer's input; then the head and the loss are computed in chunks;
then each layer, from the top down, is recomputed with gradients and freed. (Mode "keep" keeps the layers' graphs
instead.) The trainer runs one piece and estimates the next; the engine loop decides when it runs.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters import kernels
from server.messages.protocol import Done, Request
from server.messages.training import JobEnded, JobReply, MemoryPlan, ModuleShape, PlanMemory, StartJob, StopJob
from server.model.base import Base
from server.training.layers import LayeredModel, PackedAttention, PackedStates, Untrainable
from server.training.memory import MemoryModel
from server.training.task import MicroBatch, Task
from server.training.trainable import TrainingDeltas, TrainingExperts, TrainingSegment

log = logging.getLogger("lorakeet.finetune")

HEAD_FLOP = {"cpu": 4e9, "cuda": 4e12}  # approximate arithmetic of one chunk of the head
HEAD_LOGITS = 64 << 20  # most logits in one chunk
WIDE = 256  # tokens of every job in a pass from which, on a CPU, torch's part is worth several threads


class Piece(NamedTuple):
    """The next piece of work, announced before it runs."""

    kind: str
    size: int


@dataclass
class _Share:
    """One job's part of a pass."""

    task: Task
    batch: MicroBatch
    start: int  # of its tokens in the pass
    end: int
    loss: list[Tensor] = field(default_factory=list)  # sums over labels, one per chunk
    correct: list[Tensor] = field(default_factory=list)


class Trainer:
    """All training on one base.

    Args:
        base: the resident model; its bytes never change.

    Attributes:
        handles: the types of its messages.
        tasks: the jobs by id, in order of arrival.
        piece: the next piece of `run_piece`.
    """

    handles = (StartJob, StopJob, PlanMemory)

    def __init__(self, base: Base) -> None:
        self._base = base
        self.tasks: dict[str, Task] = {}
        self.piece: Piece | None = None
        self._group: list[Task] = []  # the jobs of the current piece
        self._native = kernels.runs_natively(base.device, base.dtype)
        self._wide = False  # the current pass
        self._replies: list[JobReply | MemoryPlan | Done] = []
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._seconds: dict[tuple[str, int], float] = {}  # moving average by kind and size of piece
        self._pieces = self._work()

    # Created for the first job: a base that cannot be trained is still served.

    @cached_property
    def _model(self) -> LayeredModel:
        return LayeredModel(self._base)

    @cached_property
    def _head_rows(self) -> int:
        """Rows of the head computed at once."""
        out, width = self._base.model.get_output_embeddings().weight.shape
        rows = int(min(HEAD_FLOP[self._base.device.type] / (6 * out * width), HEAD_LOGITS / out))
        return max(8, rows // 8 * 8)

    @cached_property
    def _memory(self) -> MemoryModel:
        return MemoryModel(self._base, self._model, self._head_rows)

    # --- interface to the engine loop (a `GapWorker`) -----------------------------------------------------------

    def handle(self, message: Request) -> None:
        """Start or stop a job, or answer with a `MemoryPlan`."""
        match message:
            case StartJob():
                self.start(message)
            case StopJob():
                self.stop(message)
            case PlanMemory():
                self._replies.append(self._plan(message))

    def start(self, message: StartJob) -> None:
        """Start or resume a job; a fault is reported as the job's end."""
        try:
            self._check(message.modules)
            self.tasks[message.id] = Task(message, self._base.trainable, self._base.device)
        except Exception as fault:
            code, text = _reason(fault, "start_failed")
            self._replies.append(JobEnded(id=message.id, outcome="failed", code=code, message=text))

    def plan_memory(self, message: PlanMemory) -> MemoryPlan:
        """Return a job's memory, and the memory free now. Raises Untrainable, and faults of the measured layers."""
        self._check(message.modules)
        return self._memory.plan(message)

    def _plan(self, message: PlanMemory) -> MemoryPlan | Done:
        try:
            return self.plan_memory(message)
        except Exception as fault:
            code, text = _reason(fault, "training_failed")
            return Done(id=message.id, error=text, code=code)

    def _check(self, modules: Mapping[str, ModuleShape]) -> None:
        """Raise Untrainable unless all modules are linears inside the layers, which are run one by one."""
        inside = {linear.name for linear in self._base.trainable if linear.index in self._model.layer_of}
        if outside := sorted({shape.of(name) for name, shape in modules.items()} - inside):
            raise Untrainable(f"{outside[0]} is outside its layers; leave it out of target_modules")

    def stop(self, message: StopJob) -> None:
        """Pause or cancel; unknown jobs are ignored."""
        if task := self.tasks.get(message.id):
            task.stop = "pause" if message.save else "cancel"

    @property
    def idle(self) -> bool:
        """Whether there is no job."""
        return not self.tasks

    @property
    def ready(self) -> bool:
        """Whether there is a piece to run now."""
        if self.piece is not None and self.piece.kind != "nothing":
            return True
        tasks = [task for task in self.tasks.values() if not task.over]
        return any(task.stop == "cancel" or task.can_save or task.next is not None for task in tasks)

    @property
    def next_seconds(self) -> float:
        """Estimated duration of the next piece; 0 when no similar piece has run yet."""
        return 0.0 if self.piece is None else self._seconds.get(_bucket(self.piece), 0.0)

    def run_piece(self) -> float:
        """Run the next piece; return its seconds. A fault ends only the job that caused it.

        Raises device faults, after which the device is unusable: jobs continue after the engine's restart.
        """
        began = time.monotonic()
        piece = self.piece
        try:
            with kernels.one_torch_thread() if self._native and not self._wide else nullcontext():
                self.piece = next(self._pieces)
            if self._base.device.type == "cuda":  # launches are asynchronous: wait for the piece
                torch.cuda.current_stream(self._base.device).synchronize()
        except Exception as fault:
            self._recover(fault)
        seconds = time.monotonic() - began
        if piece is not None:
            key = _bucket(piece)
            self._seconds[key] = 0.7 * self._seconds.get(key, seconds) + 0.3 * seconds
        for task in self._group:
            task.busy_seconds += seconds / len(self._group)
        return seconds

    def take_replies(self) -> list[JobReply | MemoryPlan | Done]:
        """Return the messages since the last call."""
        for task in list(self.tasks.values()):
            task.poll()
            self._replies += task.replies
            if task.ended:
                del self.tasks[task.id]
            task.replies = []
        replies, self._replies = self._replies, []
        return replies

    def close(self) -> None:
        self._writer.shutdown(wait=False, cancel_futures=True)

    # --- pieces -----------------------------------------------------------------------------------------------

    def _work(self) -> Iterator[Piece]:
        """Yield pieces without end: each is announced, and runs when the next one is requested."""
        while True:
            tasks = [task for task in self.tasks.values() if not task.over]
            for task in tasks:
                if task.stop == "cancel":
                    task.cancel()
            self._group = [task for task in tasks if task.can_save][:1]
            if self._group:
                yield Piece("save", len(self._group[0].adapter.values))
                self._group[0].save(self._writer)
                continue
            waiting = [(task, task.next) for task in tasks if task.next is not None]
            evaluations = [(task, batch) for task, batch in waiting if batch.weight == 0.0]
            chosen = evaluations or waiting
            self._group = [task for task, _ in chosen]
            if not chosen:
                yield Piece("nothing", 0)
                continue
            yield from self._pass(_packed(chosen), train=not evaluations)
            for task, _ in chosen:
                self._group = [task]
                yield from self._finish_pass(task, train=not evaluations)

    def _pass(self, shares: Sequence["_Share"], *, train: bool) -> Iterator[Piece]:
        """Run one micro-batch of each job through the model; gradients are added to the jobs' own."""
        tokens = shares[-1].end
        # Products of fewer rows differ in their last bits with torch's threads; a job's must not depend on other jobs.
        self._wide = min(len(share.batch.ids) for share in shares) >= WIDE
        adapted = {index for share in shares for index in share.task.adapter.linears}
        lowest = min(self._model.layer_of[index] for index in adapted)  # no layer below is trained
        keep = train and all(share.task.plan.memory == "keep" for share in shares)
        yield Piece("embed", tokens)
        calls = self._model.calls(_joined([s.batch.ids for s in shares]), _joined([s.batch.positions for s in shares]))
        hidden = calls.hidden  # [..., T, H]: [1, T, H] in most families, more dimensions for several streams
        inputs: list[Tensor] = []  # of the layers from `lowest` on
        outputs: list[Tensor] = []  # of these layers, with their graphs, in mode "keep"
        for layer in range(len(self._model)):
            yield Piece("forward", tokens)
            with self._as_current_step(shares), torch.set_grad_enabled(keep and layer >= lowest):
                if train and layer >= lowest:
                    hidden = hidden.detach().requires_grad_(keep and layer > lowest)
                    inputs.append(hidden)
                hidden = self._model.run(layer, hidden, calls)
                if keep and layer >= lowest:
                    outputs.append(hidden)
        hidden = hidden.detach()
        gradient = torch.zeros_like(hidden) if train else None
        for share in shares:
            for rows, labels in zip(
                (share.batch.rows + share.start).split(self._head_rows),
                share.batch.labels.split(self._head_rows),
                strict=True,
            ):
                yield Piece("head", len(rows))
                self._loss(share, hidden, rows, labels, gradient)
        del hidden
        for layer in reversed(range(lowest, len(self._model))) if train else ():
            yield Piece("backward", tokens)
            with self._as_current_step(shares), torch.enable_grad():
                below = inputs.pop()
                if keep:
                    above = outputs.pop()
                else:
                    below = below.requires_grad_(layer > lowest)
                    above = self._model.run(layer, below, calls)
                calls.shared.backward(layer, above, gradient)
                gradient = below.grad
                del above, below
        yield Piece("count", len(shares))
        for share in shares:
            share.task.finish_micro_batch(float(sum(share.loss)), int(sum(share.correct)))

    def _loss(self, share: "_Share", hidden: Tensor, rows: Tensor, labels: Tensor, gradient: Tensor | None) -> None:
        """Add the loss of some tokens of `hidden` [..., T, H] to the share, and write its gradient into `gradient`."""
        with torch.set_grad_enabled(gradient is not None):
            picked = hidden[..., rows, :].requires_grad_(gradient is not None)  # [..., n, H]
            logits = self._model.logits(picked).float()  # [n, V]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            share.loss.append(loss.detach())
            share.correct.append((logits.detach().argmax(-1) == labels).sum())
            if gradient is not None:
                (loss * share.batch.weight).backward()
                assert picked.grad is not None
                gradient[..., rows, :] = picked.grad.to(gradient.dtype)

    def _finish_pass(self, task: Task, *, train: bool) -> Iterator[Piece]:
        """Finish a job's step after its last pass: clip, update, count; or finish its evaluation."""
        if task.over or task.next is not None:
            return
        if not train:
            task.finish_evaluation()
            return
        yield Piece("clip", len(task.adapter.values))
        applied = task.clip()
        if applied:
            for update, learning_rate in task.updates():
                yield Piece("update", update.size)
                update.run(learning_rate)
        task.finish_step(applied=applied)

    @contextmanager
    def _as_current_step(self, shares: Sequence["_Share"]) -> Iterator[None]:
        """Make the pass the model's current step within the context."""
        slot = self._base.slot
        segments = [TrainingSegment(s.start, s.end, s.task.adapter, s.batch.dropout) for s in shares]
        bounds = [(s.start + start, s.start + end) for s in shares for start, end in s.batch.bounds]
        slot.deltas, slot.experts = TrainingDeltas(segments), TrainingExperts(segments)
        slot.attention, slot.states = PackedAttention(bounds), PackedStates(bounds)
        try:
            yield
        finally:
            slot.deltas = slot.experts = slot.attention = slot.states = None

    # --- faults -------------------------------------------------------------------------------------------------

    def _recover(self, fault: Exception) -> None:
        """End the newest job of the failed piece; the others restart their step, which changes no result."""
        code, text = _reason(fault, "training_failed")
        self._pieces, self.piece = self._work(), None
        *others, blamed = self._group or list(self.tasks.values())
        blamed.fail(code, text)
        for task in others:
            if task.over:
                continue
            try:
                task.begin_step()
            except Exception as another:
                task.fail(*_reason(another, "training_failed"))
        if self._base.device.type == "cuda":
            torch.cuda.empty_cache()


def _packed(chosen: Sequence[tuple[Task, MicroBatch]]) -> list[_Share]:
    shares: list[_Share] = []
    for task, batch in chosen:
        start = shares[-1].end if shares else 0
        shares.append(_Share(task, batch, start, start + len(batch.ids)))
    return shares


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _bucket(piece: Piece) -> tuple[str, int]:
    """Return the key of pieces with about the same cost: of one kind, and within a power of two of size."""
    return piece.kind, piece.size.bit_length()


def _reason(fault: Exception, code: str) -> tuple[str, str]:
    """Return the code and message of a job's failure; `code` for unknown kinds of fault. Raises device faults."""
    if _is_device_fault(fault):
        raise fault
    log.error("a fine-tuning job failed", exc_info=fault)
    if _is_out_of_memory(fault):
        return "out_of_memory", "Not enough memory for this job's passes: lower micro_batch_tokens or max_seq_len."
    if isinstance(fault, Untrainable):
        return "not_trainable", f"This base cannot be trained: {fault}."
    text = " ".join(str(fault).split())[:300]
    return code, f"Training failed: {type(fault).__name__}: {text}"


def _is_device_fault(fault: Exception) -> bool:
    """Whether a fault makes the device unusable, such as an illegal access. Out of memory leaves tensors valid."""
    texts = ("CUDA error", "Triton Error [CUDA]")  # of faults raised as plain RuntimeErrors
    return isinstance(fault, torch.AcceleratorError) or any(text in str(fault) for text in texts)


def _is_out_of_memory(fault: Exception) -> bool:
    text = str(fault)
    return isinstance(fault, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text
