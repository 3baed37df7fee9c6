"""The engine: base, KV blocks, adapter rows, scheduler and runner put together.

`Engine` turns requests into outputs one step at a time. It has no thread and no socket of its own, so tests and offline
runs drive it directly; loop.py drives it from messages.
"""

import os
import time
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from adapters import kernels
from adapters.device.cache import AdapterCache
from adapters.device.loader import AdapterLoader
from adapters.device.pool import RowPool
from adapters.kernels.reference import KEY_GROUP
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.sizes import EXTRAS, EXTRAS_UNIT
from server.engine.batch import InFlightStep, WorkResult
from server.engine.block_pool import BlockCounts, BlockPool
from server.engine.blocks import BlockGroups
from server.engine.grammar import Compiled, Grammars, InvalidGrammar
from server.engine.memory_plan import BLOCK_SIZE, DevicePlan, exact_kv_dtype
from server.engine.merged_registry import MergedRegistry
from server.engine.report import Reporter
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.sequence import AdapterKey, Sequence, Step, Work
from server.engine.state_slots import StateSlots
from server.messages import protocol
from server.messages.protocol import EngineConfig, Generate, Output, Ready, Stats, TokenLogprob
from server.model.attention import KVCache, block_bytes
from server.model.base import Base
from server.model.states import StateCache

# Extra tokens that double the time of a decode step. CPU: measured with the default model, 6 ms and 2 ms more per
# token. A GPU's step is bound by launches and weights for longer.
DOUBLING_TOKENS = {"cpu": 3, "cuda": 64}


@dataclass
class _Live:
    """The engine's own state of one sequence."""

    adapter: AdapterKey = ()
    constrained: bool = False
    announced: bool = False  # the first output, with cached tokens and queue time, has been sent


class Engine:
    """One base, one device.

    Args:
        base: the loaded model.
        plan: the division of the device's memory.
        depth: steps that may be in flight when the next is scheduled, 0 or 1; None: the device's default.
        planned: whether our planned kernels may run the decoder; otherwise transformers' modules do.
    """

    def __init__(
        self,
        base: Base,
        plan: DevicePlan,
        config: EngineConfig,
        *,
        depth: Literal[0, 1] | None = None,
        planned: bool = True,
    ) -> None:
        self.base = base
        self.max_model_len = plan.max_model_len
        self.max_batch_requests = config.max_batch_requests
        self.cache = cache = KVCache(
            base.layers, plan.blocks, BLOCK_SIZE, plan.kv_dtype, exact_kv_dtype(base), base.device
        )
        pools = [BlockPool(count, BLOCK_SIZE, config.prefix_caching) for count in plan.blocks]
        slots = StateSlots(plan.state_slots, BLOCK_SIZE, config.prefix_caching) if base.states else None
        self.blocks = BlockGroups(pools, cache.windows, plan.max_batch_tokens, KEY_GROUP, slots)
        states = StateCache(base.states, plan.state_slots, base.device) if base.states else None
        sizes = base.linear_sizes
        capacity = {size.kind: plan.pool_units for size in sizes.values()} | {EXTRAS: plan.extra_bytes // EXTRAS_UNIT}
        self.pool = RowPool(sizes, capacity, base.device)
        loader = AdapterLoader(base.model, base.linears, base.device)
        self.adapter_cache = AdapterCache(self.pool, loader, config.adapter_host_bytes, config.background_priority)
        self.runner = Runner(base, cache, self.pool, plan.max_model_len, planned=planned, states=states)
        self.merges = MergedRegistry(self.runner, self.adapter_cache, plan.merged_bytes)
        self.scheduler = Scheduler(
            self.blocks,
            self.merges,
            max_batch_tokens=plan.max_batch_tokens,
            max_batch_requests=config.max_batch_requests,
            max_model_len=plan.max_model_len,
            eos_token_ids=base.eos_token_ids,
            find_adapter_starts=self._adapter_starts,
            doubling_tokens=DOUBLING_TOKENS.get(base.device.type, 3),
            background_seconds=config.batch_wait_seconds,
        )
        self.grammars = Grammars(
            Path(config.model), base.vocab_size, base.eos_token_ids, config.grammar_bytes, config.background_priority
        )
        self._compiling: dict[str, tuple[Sequence, Future[Compiled]]] = {}  # by id; only these wait for their grammars
        self._num_constrained = 0  # sequences with a grammar
        self.base_digest = base.digest()
        self.int8_drift: protocol.Drift | None = None  # see `activations`, also for `kv_drift`
        self.kv_drift: protocol.Drift | None = None
        # On a CPU the step is finished when `submit` returns.
        self._depth = int(base.device.type == "cuda") if depth is None else depth
        self._in_flight: InFlightStep | None = None
        self._waited_seconds = 0.0  # seconds spent in `wait`
        self._unattributed_seconds = 0.0  # seconds of a turn that collected nothing, not yet attributed to sequences
        self._live: dict[str, _Live] = {}
        self._warming: list[tuple[protocol.Warm, float]] = []
        self._done: list[protocol.Done] = []
        self._reporter = Reporter(self.scheduler, self.blocks, self.adapter_cache, self.merges)

    def ready(self) -> Ready:
        """Return the description of the engine and its base that the API process needs."""
        base = self.base
        return Ready(
            pid=os.getpid(),
            base_digest=self.base_digest,
            architecture=base.architecture,
            vocab_size=base.vocab_size,
            max_model_len=self.max_model_len,
            eos_token_ids=base.eos_token_ids,
            linears=base.linear_sizes,
            block_size=BLOCK_SIZE,
            num_blocks=self.blocks.capacity,
            pool_rows=self.pool.capacity,
            device=str(base.device),
            dtype=str(base.dtype).removeprefix("torch."),
            kernels=kernels.implementation(base.device, base.dtype),
            int8_drift=self.int8_drift,
            kv_cache=self._kv_info(),
            tied=base.tied,
            embedding=base.embedding,
            head=base.head,
            aside=base.aside,
            experts=base.expert_sizes,
            renamed=base.renamed,
            norms=base.norms,
            routers=base.routers,
            by_token=base.by_token,
            opaque_embedding=base.opaque_embedding,
            transposed=base.transposed,
        )

    def _kv_info(self) -> protocol.KVInfo:
        sizes = block_bytes(self.base.layers, BLOCK_SIZE, self.cache.dtype)
        groups = zip(self.blocks.pools, self.cache.windows, sizes, strict=True)
        slot = sum(state.bytes for state in self.base.states.values())
        return protocol.KVInfo(
            dtype=str(self.cache.dtype).removeprefix("torch."),
            bytes=sum(pool.num_blocks * size for pool, size in zip(self.blocks.pools, sizes, strict=True)),
            groups=[protocol.KVGroup(window, pool.num_blocks, size // BLOCK_SIZE) for pool, window, size in groups],
            drift=self.kv_drift,
            states=None if self.blocks.states is None else protocol.StateSlotsInfo(self.blocks.states.num_slots, slot),
        )

    # --- requests ------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether nothing is running, waiting or in flight."""
        return self.scheduler.idle and not self._compiling

    @property
    def busy(self) -> bool:
        """Whether the next step probably has work."""
        scheduler = self.scheduler
        has_work = scheduler.running or self._in_flight is not None
        return bool(has_work) or (bool(scheduler.waiting) and not self.adapter_cache.loading)

    @property
    def loading(self) -> bool:
        """Whether an adapter is being loaded or a grammar compiled."""
        return self.adapter_cache.loading or bool(self._compiling)

    def add(self, request: Generate) -> None:
        """Queue a request's sequence."""
        key = self.merges.acquire_key(tuple((adapter.digest, adapter.weight) for adapter in request.adapters))
        if not self.merges.has(key):
            for adapter in request.adapters:
                self.adapter_cache.register(adapter.digest, adapter.path, adapter.owner)
                self.adapter_cache.prefetch(adapter.digest)
        sequence = Sequence(
            id=request.id,
            prompt=request.prompt,
            sampling=request.sampling,
            adapter=key,
            tenant=request.tenant,
            weight=request.weight,
            priority=request.priority,
            cache_salt=request.cache_salt,
            arrival=time.monotonic(),
            background=request.background,
        )
        self._live[request.id] = _Live(key, request.sampling.grammar is not None)
        self._reporter.add_sequence(key)
        if request.sampling.grammar is None:
            self.scheduler.add(sequence)
        else:
            self._num_constrained += 1
            self._compiling[request.id] = sequence, self.grammars.compile(request.sampling.grammar, request.adapters)

    def abort(self, id: str) -> None:  # noqa: A002
        """Drop a sequence; unknown ids are ignored."""
        if self._compiling.pop(id, None) is None:
            self.scheduler.abort(id)
        self._end(id)

    def _end(self, id: str) -> None:  # noqa: A002
        live = self._live.pop(id, None)
        if live is not None:
            self._num_constrained -= live.constrained
            self.merges.release_key(live.adapter)
            self._reporter.remove_sequence(live.adapter)

    def warm(self, request: protocol.Warm) -> None:
        """Start making an adapter resident; `take_done` returns the answer once it is."""
        self.adapter_cache.register(request.adapter.digest, request.adapter.path, request.adapter.owner)
        self._warming.append((request, time.monotonic()))

    def pin(self, request: protocol.Pin) -> None:
        """Pin these adapters to the device, instead of those of the previous request."""
        self.adapter_cache.pin({adapter.digest: adapter.path for adapter in request.adapters})

    def forget(self, request: protocol.Forget) -> None:
        """Drop an adapter, and its merge, once unused."""
        self.merges.forget(request.digest)
        self.adapter_cache.forget(request.digest)
        self._done.append(protocol.Done(id=request.id))

    def inspect(self, id: str) -> protocol.Inspection:  # noqa: A002
        """Return the counts of all blocks, slots and rows, and a fresh hash of the base."""
        counts, states = self.blocks.counts, self.blocks.states
        slots = BlockCounts(0, 0, 0) if states is None else states.counts
        return protocol.Inspection(
            id=id,
            base_digest=self.base.digest(),
            num_blocks=self.blocks.num_blocks,
            free_blocks=counts.free,
            cached_blocks=counts.cached,
            state_slots=slots.free + slots.cached + slots.used,
            free_slots=slots.free,
            cached_slots=slots.cached,
            free_rows=self.pool.free,
            resident_rows=self.pool.resident,
        )

    # --- a step ----------------------------------------------------------------------------------------------

    def step(self) -> tuple[list[Output], Stats]:
        """Schedule a step, submit it to the device, and collect one: the same at depth 0, the previous one at depth 1.

        Returns the sequences' outputs and the step's statistics.
        """
        started = time.monotonic()
        self.adapter_cache.poll()
        self._poll_warming()
        outputs = self._queue_compiled() if self._compiling else []
        step = self.scheduler.schedule(started)
        if self._num_constrained and step is not None:
            self._prepare_masks(step)
        submitted = None if step is None else self.runner.submit(step, self._in_flight)
        collected, self._in_flight = (self._in_flight, submitted) if self._depth else (submitted, None)
        if collected is not None:
            outputs += self._collect(collected, started)
        elif submitted is not None:
            self._unattributed_seconds = time.monotonic() - started
        for sequence in self.scheduler.take_failed():
            self._end(sequence.id)
            outputs.append(Output(id=sequence.id, error=sequence.error, code=sequence.code))
        waited, self._waited_seconds = self._waited_seconds, 0.0
        stats = self._reporter.stats(
            requests=0 if collected is None else len(collected.step.works),
            adapters=0 if collected is None else collected.step.num_adapters,
            seconds=waited + time.monotonic() - started,
        )
        return outputs, stats

    def wait(self) -> None:
        """Wait until the device is idle, so that the next piece of gap work has it alone and can be timed."""
        if self._in_flight is not None and self.base.device.type == "cuda":
            started = time.monotonic()
            torch.cuda.current_stream(self.base.device).synchronize()
            self._waited_seconds += time.monotonic() - started

    def take_done(self) -> list[protocol.Done]:
        """Return the answers to `warm` and `forget` since the last call."""
        done, self._done = self._done, []
        return done

    def _queue_compiled(self) -> list[Output]:
        """Queue the sequences with compiled grammars; return the outputs of those that failed."""
        failed = []
        for id_, (sequence, compiled) in list(self._compiling.items()):
            if not compiled.done():
                continue
            del self._compiling[id_]
            try:
                sequence.constraint = compiled.result().constraint(sequence.sampling)
            except (InvalidGrammar, AdapterError, OSError) as fault:
                self._end(id_)
                invalid = isinstance(fault, InvalidGrammar)
                code = protocol.INVALID_GRAMMAR if invalid else protocol.LOAD_FAILED
                failed.append(Output(id=id_, error=str(fault), code=code))
            else:
                self.scheduler.add(sequence)
        return failed

    def _prepare_masks(self, step: Step) -> None:
        constrained = [
            (work.sequence.constraint, work.drafts, work.skipped)
            for work in step.works
            if work.samples and work.sequence.constraint is not None
        ]
        if constrained:
            self.grammars.prepare(constrained)

    def _collect(self, in_flight: InFlightStep, started: float) -> list[Output]:
        """Read a step's results, and divide the time of the turn begun at `started` among sequences by their tokens."""
        works, results = in_flight.step.works, in_flight.results()
        seconds, self._unattributed_seconds = (
            self._unattributed_seconds + self._waited_seconds + time.monotonic() - started,
            0.0,
        )
        each = seconds / sum(work.count for work in works)
        for work in works:
            work.sequence.device_seconds += each * work.count
        outputs = (self._process_result(*pair) for pair in zip(works, results, strict=True))
        return [output for output in outputs if output is not None]

    def _process_result(self, work: Work, result: WorkResult) -> Output | None:
        sequence = work.sequence
        if result.failed and not sequence.ended:
            if sequence.constraint is not None and sequence.constraint.error is not None:
                message = f"The grammar cannot be followed any further: {sequence.constraint.error}"
                self.scheduler.fail(sequence.id, message, protocol.INVALID_GRAMMAR)
            else:
                message = "The model's logits are not finite for this request."
                self.scheduler.fail(sequence.id, message, protocol.NON_FINITE)
        if sequence.ended:
            self.scheduler.advance(work)
            return None
        live = self._live[sequence.id]
        kept = self.scheduler.advance(work, result.tokens)
        if not work.samples and not result.prompt_logprobs and sequence.finish_reason is None:
            return None
        if sequence.finish_reason is not None:
            self._end(sequence.id)
        first = not live.announced
        live.announced = True
        seconds, sequence.device_seconds = sequence.device_seconds, 0.0
        unscored: list[TokenLogprob | None] = [None] if first and sequence.sampling.prompt_logprobs is not None else []
        return Output(
            id=sequence.id,
            tokens=kept,
            logprobs=result.logprobs[: len(kept)],
            prompt_logprobs=[*unscored, *result.prompt_logprobs],
            scores=result.scores,
            finish_reason=sequence.finish_reason,
            stop_token=sequence.stop_token,
            cached_tokens=sequence.cached_tokens if first else 0,
            queue_seconds=(sequence.first_scheduled or 0.0) - sequence.arrival if first else 0.0,
            drafted_tokens=0 if work.forced else len(work.drafts),
            accepted_tokens=0 if work.forced else max(0, min(len(kept), len(result.tokens)) - 1),
            device_seconds=seconds,
        )

    def _poll_warming(self) -> None:
        waiting = []
        for request, started in self._warming:
            key = ((request.adapter.digest, 1.0),)
            match self.adapter_cache.acquire(key):
                case "ready":
                    self.adapter_cache.release(key)
                    self._done.append(protocol.Done(id=request.id, seconds=time.monotonic() - started))
                case "failed":
                    error = self.adapter_cache.error(key)
                    self._done.append(protocol.Done(id=request.id, error=error, code=protocol.LOAD_FAILED))
                case _:
                    waiting.append((request, started))
        self._warming = waiting

    def _adapter_starts(self, key: AdapterKey, prompt: Seq[int]) -> dict[str, int]:
        """Return the positions in a prompt where activated adapters come into force; beyond its end if they do not."""
        adapters = ((digest, self.pool.adapter(digest)) for digest, _ in key)
        return {digest: adapter.start_in(prompt) for digest, adapter in adapters if adapter and adapter.invocation}
