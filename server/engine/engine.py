"""Everything on the device side, put together: base, KV blocks, adapter rows, scheduler, runner.

`Engine` turns requests into outputs one step at a time. It has no thread, no socket and no clock of its own, so tests
and offline runs drive it directly; process.py drives it from messages.
"""

import dataclasses
import math
import os
import sys
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from adapters import kernels
from adapters.background import Priority
from adapters.device.cache import Residency
from adapters.device.pool import HostAdapter, RowPool, filed_adapter, host_adapter
from adapters.device.variants import build as build_extras
from adapters.peft_format import directory as adapter_format
from adapters.peft_format import packed_rows as rowfile
from adapters.peft_format.directory import EXTRAS, EXTRAS_UNIT
from adapters.peft_format.outline import Outline
from server.engine.blocks import BlockPool
from server.engine.merges import Merges
from server.engine.runner import Flight, Runner, WorkResult
from server.engine.scheduler import Counters, Scheduler
from server.engine.sequence import AdapterKey, Sequence, Work
from server.messages import protocol
from server.messages.protocol import AdapterUse, EngineConfig, Generate, Output, Ready, Stats, TokenLogprob
from server.model import base as model
from server.model.attention import KVCache
from server.model.base import Base, UnservableModel

BLOCK_SIZE = 16
DEFAULT_BATCH_TOKENS = {"cpu": 256, "cuda": 2048}
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
        num_blocks: KV blocks of BLOCK_SIZE tokens.
        pool_units: adapter row units per module kind.
        extra_bytes: what adapters may take on the device besides rows.
        merged_bytes: what merged weights may take there.
        outline: of the base's files; without, nothing can be merged.
    """

    def __init__(
        self,
        base: Base,
        *,
        num_blocks: int,
        pool_units: int,
        extra_bytes: int,
        max_model_len: int,
        max_batch_tokens: int,
        max_batch_requests: int,
        adapter_host_bytes: int = 4 << 30,
        merged_bytes: int = 0,
        outline: Outline | None = None,
        prefix_caching: bool = True,
        background_priority: Priority = "low",
    ) -> None:
        self.base = base
        self.max_model_len = max_model_len
        cache = KVCache(base.num_layers, base.kv_heads, base.head_dim, num_blocks, BLOCK_SIZE, base.dtype, base.device)
        self.blocks = BlockPool(num_blocks, BLOCK_SIZE, prefix_caching)
        self._linears = {linear.name: linear for linear in base.linears}
        capacity = {linear.kind: pool_units for linear in base.linears} | {EXTRAS: extra_bytes // EXTRAS_UNIT}
        self.pool = RowPool(self._linears, capacity, base.device)
        self.residency = Residency(self.pool, self._load_adapter, adapter_host_bytes, background_priority)
        self.runner = Runner(base, cache, self.pool, max_model_len)
        self.merges = Merges(
            base,
            outline or Outline(),
            self.runner,
            self.pool,
            self.residency,
            self.blocks,
            budget=merged_bytes,
            max_requests=max_batch_requests,
        )
        self.scheduler = Scheduler(
            self.blocks,
            self.merges,
            max_batch_tokens=max_batch_tokens,
            max_batch_requests=max_batch_requests,
            max_model_len=max_model_len,
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
        self._reported: list[AdapterUse] | None = None

    @classmethod
    def load(cls, config: EngineConfig) -> "Engine":
        """Load the base and size KV cache and row pool for the device. Raises UnservableModel."""
        if config.threads:
            torch.set_num_threads(config.threads)
            kernels.set_threads(config.threads)
        kernels.set_deterministic(config.deterministic)
        base = model.load(Path(config.model), config.quantization, config.dtype, config.device, Path(config.cache_dir))
        if config.sketch_head:
            model.sketch_head(base)
        kernels.prepare([linear.weight for linear in base.linears], base.dtype)
        max_model_len = min(config.max_model_len or base.max_model_len, base.max_model_len)
        num_blocks = _num_blocks(base, config.kv_cache_bytes)
        if num_blocks * BLOCK_SIZE < max_model_len:
            if config.max_model_len is not None:
                raise UnservableModel(
                    f"max_model_len {max_model_len} needs more KV cache than there is "
                    f"({num_blocks * BLOCK_SIZE} tokens): raise kv_cache_bytes or lower max_model_len"
                )
            max_model_len = num_blocks * BLOCK_SIZE
        max_batch_tokens = config.max_batch_tokens or DEFAULT_BATCH_TOKENS.get(base.device.type, 512)
        if max_batch_tokens <= config.max_batch_requests:
            raise UnservableModel(
                f"max_batch_tokens {max_batch_tokens} must exceed max_batch_requests {config.max_batch_requests}, "
                "or decoding would leave no room for prompts"
            )
        adapter_bytes = _adapter_bytes(base) if config.adapter_bytes is None else config.adapter_bytes
        merged_bytes = _adapter_bytes(base) if config.merged_bytes is None else config.merged_bytes
        return cls(
            base,
            num_blocks=num_blocks,
            pool_units=_pool_units(base, adapter_bytes),
            extra_bytes=adapter_bytes,
            max_model_len=max_model_len,
            max_batch_tokens=max_batch_tokens,
            max_batch_requests=config.max_batch_requests,
            adapter_host_bytes=config.adapter_host_bytes,
            merged_bytes=merged_bytes,
            outline=Outline.read(Path(config.model)),
            prefix_caching=config.prefix_caching,
            background_priority=config.background_priority,
        )

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
            linears={
                linear.name: protocol.Linear(linear.kind, linear.in_features, linear.out_features)
                for linear in base.linears
            },
            block_size=BLOCK_SIZE,
            num_blocks=self.blocks.num_blocks,
            pool_rows=self.pool.capacity,
            device=str(base.device),
            dtype=str(base.dtype).removeprefix("torch."),
            kernels=kernels.implementation(base.device, base.dtype),
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
        self.scheduler.add(sequence)

    def abort(self, id: str) -> None:  # noqa: A002
        """Forget a sequence; unknown ids are ignored."""
        self.scheduler.abort(id)
        self._end(id)

    def _end(self, id: str) -> None:  # noqa: A002
        live = self._live.pop(id, None)
        if live is not None:
            self.merges.leave(live.adapter)

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
        stats = self._stats(
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

    def _stats(self, requests: int, adapters: int, seconds: float) -> Stats:
        scheduler, residency = self.scheduler, self.residency
        counters, scheduler.counters = scheduler.counters, Counters()
        evictions, residency.evictions = residency.evictions, []
        loads, residency.loads = residency.loads, []
        uses = self._adapter_uses()
        changed, self._reported = uses != self._reported, uses
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            waiting_tokens=scheduler.waiting_tokens,
            step_requests=requests,
            step_adapters=adapters,
            step_seconds=seconds,
            kv_usage=self.blocks.counts.used / self.blocks.num_blocks,
            prefix_queries=counters.prefix_queries,
            prefix_hits=counters.prefix_hits,
            preemptions=counters.preemptions,
            drafted_tokens=counters.drafted,
            accepted_tokens=counters.accepted,
            evictions=evictions,
            loads=loads,
            adapters=uses if changed else None,
            merges=self.merges.news(),
        )

    def _adapter_uses(self) -> list[AdapterUse]:
        running: dict[str, int] = {}
        waiting: dict[str, int] = {}
        for counts, sequences in ((running, self.scheduler.running), (waiting, self.scheduler.waiting)):
            for sequence in sequences:
                for digest, _ in sequence.adapter:
                    counts[digest] = counts.get(digest, 0) + 1
        return [
            AdapterUse(entry.digest, entry.tier, entry.rank, running.get(entry.digest, 0), waiting.get(entry.digest, 0))
            for entry in self.residency.resident()
        ] + self.merges.uses(running, waiting)

    def _load_adapter(self, digest: str, path: str) -> HostAdapter:
        directory = Path(path)
        spec = adapter_format.AdapterSpec.read(directory)
        dtype: torch.dtype = getattr(torch, spec.dtype)
        rows = rowfile.find(directory, spec, self._linears)
        if rows is not None:
            return filed_adapter(digest, rows, dtype, self.base.device)
        tensors = adapter_format.load(directory, spec)
        modules = {name: (a, b, spec.modules[name].scaling) for name, (a, b) in tensors.items()}
        adapter = host_adapter(digest, modules, dtype, pin=self.base.device.type == "cuda")
        if not spec.variants.names:
            return adapter
        values = adapter_format.load_variants(directory, spec)
        with torch.no_grad():
            extras = build_extras(spec.variants, values, modules, self._linears, self.base.model)
        return dataclasses.replace(
            adapter,
            bytes=adapter.bytes + spec.variants.device_bytes,
            rank=spec.rank,
            extras=extras,
            extra_bytes=spec.variants.device_bytes,
            invocation=tuple(spec.variants.invocation),
        )

    def _starts(self, key: AdapterKey, prompt: Seq[int]) -> dict[str, int]:
        """Where in a prompt the activated ones among resident adapters come into force; beyond it, if they do not."""
        invocations = self.pool.invocations
        return {digest: _last_occurrence(prompt, invocations[digest]) for digest, _ in key if digest in invocations}


def _last_occurrence(prompt: Seq[int], tokens: tuple[int, ...]) -> int:
    """Where `tokens` begin for the last time; as in PEFT, an adapter that is not invoked in the prompt never is."""
    count = len(tokens)
    for start in range(len(prompt) - count, -1, -1):
        if prompt[start] == tokens[0] and tuple(prompt[start : start + count]) == tokens:
            return start
    return sys.maxsize


# --- how much of the device goes where --------------------------------------------------------------------


def _num_blocks(base: Base, kv_cache_bytes: int | None) -> int:
    block = KVCache.block_bytes(base.num_layers, base.kv_heads, base.head_dim, BLOCK_SIZE, base.dtype)
    if kv_cache_bytes is None:
        if base.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(base.device)
            kv_cache_bytes = int(free * 0.7)
        else:
            kv_cache_bytes = min(2 << 30, psutil.virtual_memory().available // 4)
    blocks = kv_cache_bytes // block
    if blocks < 2:
        raise UnservableModel(
            f"kv_cache_bytes {kv_cache_bytes} holds {blocks} blocks of {block} bytes: at least 2 are needed"
        )
    # More than every sequence of a full batch could use would never be touched.
    return min(blocks, math.ceil(base.max_model_len / BLOCK_SIZE) * 256)


def _adapter_bytes(base: Base) -> int:
    """Memory for rank rows when nobody says how much, and at most as much again, when wanted, for what is not rows."""
    if base.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(base.device)
        return int(free * 0.1)
    return min(1 << 30, psutil.virtual_memory().available // 8)


def _pool_units(base: Base, adapter_bytes: int) -> int:
    unit = sum(2 * (linear.in_features + linear.out_features) for linear in base.linears)
    units = adapter_bytes // unit
    if units < 2:
        raise UnservableModel(f"adapter_bytes {adapter_bytes} holds no rank-row: one takes {2 * unit} bytes in fp32")
    return int(units)
