"""Everything on the device side, put together: base, KV blocks, adapter rows, scheduler, runner.

`Engine` turns requests into outputs one step at a time. It has no thread, no socket and no clock of its own, so tests
and offline runs drive it directly; process.py drives it from messages.
"""

import os
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from adapters.device.cache import AdapterCache
from adapters.device.loader import AdapterLoader
from adapters.device.pool import RowPool
from adapters.peft_format.sizes import EXTRAS, EXTRAS_UNIT
from server.engine.blocks import BlockPool
from server.engine.memory_plan import BLOCK_SIZE, DevicePlan
from server.engine.merged_registry import MergedRegistry
from server.engine.report import Reporter
from server.engine.runner import Flight, Runner, WorkResult
from server.engine.scheduler import Scheduler
from server.engine.sequence import AdapterKey, Sequence, Work
from server.messages import protocol
from server.messages.protocol import EngineConfig, Generate, Output, Ready, Stats, TokenLogprob
from server.model.attention import KVCache
from server.model.base import Base

# How many more tokens double the time of a decoding step. CPU: as measured with the default model, 6 ms and 2 ms for
# each token. A GPU's step waits for launches and weights for longer.
FREE_ROWS = {"cpu": 3, "cuda": 64}


@dataclass
class _Live:
    """What the engine remembers of a sequence besides the scheduler's state."""

    adapter: AdapterKey = ()
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    announced: bool = False  # its first output, with cached tokens and queue time, is out


class Engine:
    """One base, one device.

    Args:
        base: the loaded model.
        plan: how much of the device goes where.
    """

    def __init__(self, base: Base, plan: DevicePlan, config: EngineConfig) -> None:
        self.base = base
        self.max_model_len = plan.max_model_len
        self.max_batch_requests = config.max_batch_requests
        blocks = plan.num_blocks
        cache = KVCache(base.num_layers, base.kv_heads, base.head_dim, blocks, BLOCK_SIZE, base.dtype, base.device)
        self.blocks = BlockPool(blocks, BLOCK_SIZE, config.prefix_caching)
        sizes = base.linear_sizes
        capacity = {size.kind: plan.pool_units for size in sizes.values()} | {EXTRAS: plan.extra_bytes // EXTRAS_UNIT}
        self.pool = RowPool(sizes, capacity, base.device)
        loader = AdapterLoader(base.model, base.linears, base.device)
        self.residency = AdapterCache(self.pool, loader, config.adapter_host_bytes, config.background_priority)
        self.runner = Runner(base, cache, self.pool, plan.max_model_len)
        self.merges = MergedRegistry(self.runner, self.residency, plan.merged_bytes)
        self.scheduler = Scheduler(
            self.blocks,
            self.merges,
            max_batch_tokens=plan.max_batch_tokens,
            max_batch_requests=config.max_batch_requests,
            max_model_len=plan.max_model_len,
            eos_token_ids=base.eos_token_ids,
            starts=self._starts,
            free_rows=FREE_ROWS.get(base.device.type, 3),
        )
        self.base_digest = base.digest()
        self.int8_drift: protocol.Drift | None = None  # see `activations`
        self._runs_ahead = base.device.type == "cuda"  # a CPU's step is over when it was given
        self._flight: Flight | None = None  # the step that was given ahead
        self._live: dict[str, _Live] = {}
        self._warming: list[tuple[protocol.Warm, float]] = []
        self._done: list[protocol.Done] = []
        self._reporter = Reporter(self.scheduler, self.blocks, self.residency, self.merges)

    def ready(self) -> Ready:
        """What this engine serves."""
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
            num_blocks=self.blocks.num_blocks,
            pool_rows=self.pool.capacity,
            device=str(base.device),
            dtype=str(base.dtype).removeprefix("torch."),
            int8_drift=self.int8_drift,
        )

    # --- requests ------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing waits."""
        return self.scheduler.idle

    @property
    def busy(self) -> bool:
        """The next step has something to compute, as far as anyone can tell."""
        return bool(self.scheduler.running) or (bool(self.scheduler.waiting) and not self.residency.loading)

    @property
    def loading(self) -> bool:
        """An adapter is on its way from disk."""
        return self.residency.loading

    def add(self, request: Generate) -> None:
        """Queue a sequence."""
        key = self.merges.enter(tuple((adapter.digest, adapter.weight) for adapter in request.adapters))
        if not self.merges.has(key):
            for adapter in request.adapters:
                self.residency.register(adapter.digest, adapter.path)
                self.residency.prefetch(adapter.digest)
        sequence = Sequence(
            id=request.id,
            prompt=request.prompt,
            sampling=request.sampling,
            adapter=key,
            tenant=request.tenant,
            cache_salt=request.cache_salt,
            arrival=time.monotonic(),
        )
        self._live[request.id] = _Live(key)
        self._reporter.entered(key)
        self.scheduler.add(sequence)

    def abort(self, id: str) -> None:  # noqa: A002
        """Forget a sequence; unknown ids are ignored."""
        self.scheduler.abort(id)
        self._end(id)

    def _end(self, id: str) -> None:  # noqa: A002
        live = self._live.pop(id, None)
        if live is not None:
            self.merges.leave(live.adapter)
            self._reporter.left(live.adapter)

    def warm(self, request: protocol.Warm) -> None:
        """Make an adapter resident; `take_done` tells when it is."""
        self.residency.register(request.adapter.digest, request.adapter.path)
        self._warming.append((request, time.monotonic()))

    def pin(self, request: protocol.Pin) -> None:
        """Keep these adapters on the device, and no longer those of the request before."""
        self.residency.pin({adapter.digest: adapter.path for adapter in request.adapters})

    def forget(self, request: protocol.Forget) -> None:
        """Drop an adapter, and its merge, once unused."""
        self.merges.forget(request.digest)
        self.residency.forget(request.digest)
        self._done.append(protocol.Done(id=request.id))

    def inspect(self, id: str) -> protocol.Inspection:  # noqa: A002
        """Account for everything, with a fresh hash of the base."""
        counts = self.blocks.counts
        return protocol.Inspection(
            id=id,
            base_digest=self.base.digest(),
            num_blocks=self.blocks.num_blocks,
            free_blocks=counts.free,
            cached_blocks=counts.cached,
            free_rows=self.pool.free,
            resident_rows=self.pool.resident,
        )

    # --- a step ----------------------------------------------------------------------------------------------

    def step(self, *, ahead: bool = True) -> tuple[list[Output], Stats]:
        """Schedule and run one step, if anything can run. Returns every sequence's output and the gauges.

        Args:
            ahead: where the device works by itself, and the step after this one is certain but for its tokens, give it
                that as well before looking at what this one brought. Then the next call begins with it.
        """
        started = time.monotonic()
        self.residency.poll()
        self._answer_warming()
        flight, self._flight = self._flight, None
        if flight is None or all(work.sequence.ended for work in flight.step.works):
            step = self.scheduler.schedule(started)
            flight = None if step is None else self.runner.submit(step)
        outputs: list[Output] = []
        if flight is not None:
            if ahead and self._runs_ahead and self.runner.lets_follow(flight.step):
                step = self.scheduler.follow(flight.step)
                self._flight = None if step is None else self.runner.submit(step, flight)
            for work, result in zip(flight.step.works, flight.results(), strict=True):
                output = None if work.sequence.ended else self._take_in(work, result)
                if output is not None:
                    outputs.append(output)
        for sequence in self.scheduler.take_failed():
            self._end(sequence.id)
            outputs.append(Output(id=sequence.id, error=sequence.error, code=sequence.code))
        stats = self._reporter.stats(
            requests=0 if flight is None else len(flight.step.works),
            adapters=0 if flight is None else flight.step.num_adapters,
            seconds=time.monotonic() - started,
        )
        return outputs, stats

    def take_done(self) -> list[protocol.Done]:
        """Answers to `warm` and `forget` since the last call."""
        done, self._done = self._done, []
        return done

    def _take_in(self, work: Work, result: WorkResult) -> Output | None:
        sequence, live = work.sequence, self._live[work.sequence.id]
        if result.failed:
            self.scheduler.fail(sequence.id, "The model's logits are not finite for this request.", protocol.NON_FINITE)
            return None
        live.prompt_logprobs += result.prompt_logprobs
        kept = self.scheduler.advance(work, result.tokens)
        if not work.samples and sequence.finish_reason is None:
            return None
        if sequence.finish_reason is not None:
            self._end(sequence.id)
        first = not live.announced
        live.announced = True
        scored = first and sequence.sampling.prompt_logprobs is not None
        return Output(
            id=sequence.id,
            tokens=kept,
            logprobs=result.logprobs[: len(kept)],
            prompt_logprobs=live.prompt_logprobs if scored else None,
            finish_reason=sequence.finish_reason,
            stop_token=sequence.stop_token,
            cached_tokens=sequence.cached_tokens if first else 0,
            queue_seconds=(sequence.first_scheduled or 0.0) - sequence.arrival if first else 0.0,
            drafted_tokens=len(work.drafts),
            accepted_tokens=max(0, len(kept) - 1),
        )

    def _answer_warming(self) -> None:
        waiting = []
        for request, started in self._warming:
            key = ((request.adapter.digest, 1.0),)
            match self.residency.acquire(key):
                case "ready":
                    self.residency.release(key)
                    self._done.append(protocol.Done(id=request.id, seconds=time.monotonic() - started))
                case "failed":
                    error = self.residency.error(key)
                    self._done.append(protocol.Done(id=request.id, error=error, code=protocol.LOAD_FAILED))
                case _:
                    waiting.append((request, started))
        self._warming = waiting

    def _starts(self, key: AdapterKey, prompt: Seq[int]) -> dict[str, int]:
        """Where in a prompt the activated ones among resident adapters come into force; beyond it, if they do not."""
        adapters = ((digest, self.pool.adapter(digest)) for digest, _ in key)
        return {digest: adapter.start_in(prompt) for digest, adapter in adapters if adapter and adapter.invocation}
