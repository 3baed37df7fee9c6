"""A checkpoint's files: the adapter, the flat parameters, the optimiser's state, the job's position.

The adapter's two files are PEFT's; `state.safetensors` and `state.json` are ours. The API process checks that a
directory is complete, by hashes, and syncs it.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.peft_format import directory as adapter_format

STATE_TENSORS = "state.safetensors"
STATE = "state.json"


class State(msgspec.Struct, frozen=True, kw_only=True):
    """A job's position after `step` optimiser steps. Randomness needs no state: it is a function of the step."""

    step: int
    trained_tokens: int
    skipped_in_a_row: int = 0
    best_valid_loss: float | None = None
    evaluations_without_gain: int = 0


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A copy of the tensors and state to write, independent of further training."""

    state: State
    adapter: dict[str, tuple[Tensor, Tensor]]
    values: Tensor
    optimizer: dict[str, Tensor]


def write(directory: Path, snapshot: Snapshot, config: Mapping[str, Any]) -> None:
    """Write a checkpoint into `directory`, replacing a partial one, or nothing after a fault. Blocks on the disk."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        adapter_format.write(directory, config, snapshot.adapter)
        tensors = {"values": snapshot.values, **{f"optimizer.{name}": t for name, t in snapshot.optimizer.items()}}
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, directory / STATE_TENSORS)
        (directory / STATE).write_bytes(msgspec.json.encode(snapshot.state))
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def read(directory: Path) -> tuple[State, Tensor, dict[str, Tensor]]:
    """Return the state, the flat parameters and the optimiser's tensors of a checkpoint."""
    state = msgspec.json.decode((directory / STATE).read_bytes(), type=State)
    tensors = load_file(directory / STATE_TENSORS)
    values = tensors.pop("values")
    return state, values, {name.removeprefix("optimizer."): tensor for name, tensor in tensors.items()}
