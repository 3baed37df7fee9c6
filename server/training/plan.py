"""A job's examples and learning rate in each step: pure arithmetic, fixed when the job starts.

A step's examples depend on (seed, epoch) alone and its micro-batches on their lengths alone, so that a restarted job
computes exactly the same as an uninterrupted one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from server.messages.training import TrainingPlan


@dataclass(frozen=True)
class Steps:
    """The steps of a job over sequences of these lengths."""

    plan: TrainingPlan
    lengths: Sequence[int]  # tokens of each sequence

    @property
    def per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.plan.batch_size)

    @property
    def total(self) -> int:
        return self.per_epoch * self.plan.n_epochs

    def batch(self, step: int) -> list[int]:
        """Return a step's sequence indices (steps from 0). Each epoch has every sequence once, in a new order."""
        epoch, position = divmod(step, self.per_epoch)
        order = np.random.Generator(np.random.Philox(key=[self.plan.seed, epoch])).permutation(len(self.lengths))
        first = position * self.plan.batch_size
        return [int(index) for index in order[first : first + self.plan.batch_size]]

    def micro_batches(self, step: int) -> list[list[int]]:
        """Return the step's sequences, split into passes."""
        return pack(self.batch(step), self.lengths, self.plan.micro_batch_tokens if self.plan.packing else 0)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint follows this step (the last step is always saved)."""
        every = self.plan.checkpoint_every or self.per_epoch
        return (step + 1) % every == 0 or step + 1 == self.total

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation on the whole validation set follows this step."""
        every = self.plan.eval_every
        return self.saves(step) or (every > 0 and (step + 1) % every == 0)

    def learning_rate(self, step: int) -> float:
        """Return a step's learning rate: warm-up to the peak, then constant or decreasing to zero at the end."""
        peak, warmup = self.plan.learning_rate, self.plan.warmup_steps
        if step < warmup:
            return peak * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.total - warmup)
        match self.plan.lr_scheduler:
            case "linear":
                return peak * (1.0 - progress)
            case "cosine":
                return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
            case "constant":
                return peak


def pack(indices: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group sequences so that each group has at most `max_tokens` tokens (a longer sequence is a group of its own).

    First fit, longest first: few groups, and the same groups for the same lengths.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(indices, key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        fitting = next((group for group, left in enumerate(room) if left >= length), None)
        if fitting is None:
            groups.append([index])
            room.append(max_tokens - length)
        else:
            groups[fitting].append(index)
            room[fitting] -= length
    return groups
