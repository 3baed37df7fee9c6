"""Starting an engine, for servers, benchmarks and tests alike: load, check, apply rounding, warm up."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from adapters import kernels
from adapters.peft_format.outline import Outline
from server.engine import activations, memory_plan
from server.engine.engine import Engine
from server.engine.loop import Gaps
from server.engine.merge_builder import MergeBuilder
from server.messages.protocol import EngineConfig
from server.model import base as model
from server.training.pacing import Pacer
from server.training.trainer import Trainer


def load(config: EngineConfig, *, depth: Literal[0, 1] | None = None, planned: bool = True) -> Engine:
    """Load the base and build an engine for it, sized for the device. Raises UnservableModel."""
    if config.threads:
        torch.set_num_threads(config.threads)
        kernels.set_threads(config.threads)
    kernels.set_deterministic(config.deterministic)
    how = config.quantization, config.dtype, config.device
    base = model.load(Path(config.model), *how, Path(config.cache_dir), config.max_model_len)
    if config.sketch_head:
        model.sketch_head(base)
    kernels.prepare([linear.weight for linear in base.linears], base.dtype)
    return Engine(base, memory_plan.plan(base, config), config, depth=depth, planned=planned)


def boot(config: EngineConfig, check: Callable[[Engine], object]) -> Engine:
    """Load an engine and make it ready to serve. Raises UnservableModel.

    Args:
        check: called with the engine before any rounding; raises if it must not serve.
    """
    engine = load(config)
    check(engine)
    activations.measure_kv(engine, Path(config.model))
    if config.activations == "int8":
        activations.round_to_int8(engine, Path(config.model))
    engine.runner.warm_up(config.max_batch_requests)
    return engine


def gap_work(engine: Engine, config: EngineConfig) -> Gaps:
    """Return the workers for the gaps between an engine's steps, each with the pacer that the settings give it."""
    stall, base = config.finetune_max_stall_ms / 1e3, engine.base
    files = Outline.read(Path(config.model)).as_loaded(tied=base.tied, renamed=base.renamed)
    return Gaps(
        [
            (Trainer(base), Pacer(stall, config.finetune_share)),
            (MergeBuilder(engine, files), Pacer(stall, config.merge_share)),
        ]
    )
