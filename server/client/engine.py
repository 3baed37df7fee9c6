"""What the API process knows of an engine: an interface, and the local engine process behind it.

`EngineClient` is the only door. Its address may be remote and several engines may answer: another implementation.
`LocalEngine` starts the process, restarts it when it dies, and tells every waiting request what became of it. It knows
messages, not HTTP.
"""

import asyncio
import contextlib
import logging
import os
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec
import zmq

from adapters.offline.recipe import MergedDtype
from adapters.peft_format.sizes import device_bytes
from adapters.scratch import scratch
from server.children.helper import OURS
from server.client.wire import Wire
from server.errors import EngineUnavailable
from server.messages import protocol
from server.messages.protocol import AdapterRef, EngineConfig, Generate, Inspection, MergeReport, Output, Ready, Stats
from server.messages.training import (
    Checkpoint,
    JobEnded,
    JobNote,
    JobReply,
    MemoryPlan,
    PlanMemory,
    StartJob,
    StopJob,
    TrainingStep,
)

log = logging.getLogger("lorakeet.engine")

_POLL_SECONDS = 0.2
_WATCH_SECONDS = 1.0  # between looks at whether the engine has said anything
_RETRY_SECONDS = 1.0  # before another try to start a process that could not be started
_SOCKET = "engine.sock"
_QUIET_SECONDS = 60.0  # without a word from a loaded engine, after which it is not called ready

_Call = protocol.Warm | protocol.Forget | protocol.Merge | protocol.Unmerge | protocol.Inspect | PlanMemory
_Answer = protocol.Done | MergeReport | Inspection | MemoryPlan  # of a call


class EngineRefusal(Exception):
    """The engine cannot do what it was asked; `code` says why in one word."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class AdapterLoadFailed(EngineRefusal):
    """An adapter did not become resident."""


class MergeRefused(EngineRefusal):
    """A merge was not made."""


class TrainingRefused(EngineRefusal):
    """A job of this shape cannot run."""


class EngineDied(EngineUnavailable):
    """503: the engine died while it had this message, which may have been the reason."""


class EngineClient(Protocol):
    """One engine, as the API process sees it."""

    @property
    def info(self) -> Ready | None:
        """What the engine serves. Set by the first `Ready` and kept while the engine restarts."""

    @property
    def pid(self) -> int | None:
        """The engine process now, or None while there is none."""

    @property
    def unready_reason(self) -> str | None:
        """None when the engine is loaded and making progress, else why it is not."""

    def generate(self, request: Generate) -> AsyncGenerator[Output, None]:
        """Outputs of one sequence, the last with `finish_reason` or `error`. Closing the iterator aborts the sequence.

        Raises EngineUnavailable (from the first or any later step) when the engine is not there or dies meanwhile.
        """

    async def warm(self, adapter: AdapterRef) -> float:
        """Make the adapter resident; returns the seconds it took."""

    def pin(self, adapters: Sequence[AdapterRef]) -> None:
        """Keep these adapters, and no others, on the device, across restarts of the engine."""

    async def forget(self, digest: str) -> None:
        """Drop the adapter's rows and host copy once unused."""

    @property
    def merges(self) -> Mapping[str, MergeReport]:
        """The merges in force, by digest, as last heard."""

    async def merge(self, adapter: AdapterRef, dtype: MergedDtype, prompts: list[list[int]]) -> MergeReport:
        """Let the adapter's requests run on merged weights from now on. Raises MergeRefused."""

    async def unmerge(self, digest: str) -> bool:
        """Undo that, or give it up while it is being built; whether there was anything to undo."""

    async def inspect(self) -> Inspection:
        """A fresh hash of the base and the accounting of blocks and rows."""

    def train(self, job: StartJob) -> AsyncGenerator[JobReply, None]:
        """Run a fine-tuning job: what it has to say, `JobEnded` last. Closing the iterator cancels the job.

        Raises EngineUnavailable when the engine is not there, EngineDied when it dies meanwhile; the job can then be
        started again.
        """

    async def plan_memory(self, asked: PlanMemory) -> MemoryPlan:
        """What a job would need. Raises TrainingRefused; EngineUnavailable and EngineDied as `train` does."""

    async def stop_job(self, message: StopJob) -> None:
        """Pause or cancel a running job; its `train` goes on to the `JobEnded`."""

    async def start(self) -> None:
        """Start the engine and return at once; `unready_reason` tells when it is up."""

    async def stop(self, grace: float) -> None:
        """Let running sequences finish for at most `grace` seconds, then end the process."""


def served_base(engine: EngineClient) -> Ready:
    """What the engine serves. Raises EngineUnavailable before the first engine has come up."""
    if engine.info is None:
        raise EngineUnavailable(engine.unready_reason or "The engine is starting.")
    return engine.info


def _summary(ready: Ready) -> str:
    """What an engine that came up has, in one line."""
    kinds = {linear.kind for linear in ready.linears.values()}  # rank rows alone: what --adapter-bytes says
    rows = {kind: units for kind, units in ready.pool_rows.items() if kind in kinds}
    adapters = device_bytes(rows, ready.linears) / 2**20
    return (
        f"engine ready: {ready.architecture} on {ready.device} in {ready.dtype}, KV cache of "
        f"{ready.num_blocks * ready.block_size} tokens, {adapters:.0f} MiB for adapters, "
        f"{ready.kernels or 'unknown'} kernels"
    )


async def engine_up(engine: EngineClient) -> Ready:
    """Wait until an engine can be asked; what it serves."""
    while engine.unready_reason is not None or engine.info is None:  # noqa: ASYNC110 - the interface has no event
        await asyncio.sleep(_POLL_SECONDS)
    return engine.info


@dataclass
class _Incarnation:
    """One engine process and the wire to it."""

    process: asyncio.subprocess.Process
    wire: Wire
    started: float


class LocalEngine:
    """An engine process on this machine, kept alive.

    Args:
        config: what to start it with (`address` is filled in here).
        on_stats: called with every step's `Stats`.
        start_seconds: an engine that is not loaded after this long is killed and started again.
        stall_seconds: without a word for this long, a loaded engine stands still: the same becomes of it.
        give_up_after: deaths in a row (no step served in between) after which it is not restarted. Those that a job was
            there for do not count: it is never sent to more than two engines that die.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_stats: Callable[[Stats], None],
        *,
        start_seconds: float = 3600.0,
        stall_seconds: float = 300.0,
        give_up_after: int = 3,
    ) -> None:
        self._config = config
        self._on_stats = on_stats
        self._start_seconds = start_seconds
        self._stall_seconds = stall_seconds
        self._give_up_after = give_up_after
        self._info: Ready | None = None
        self._pinned: list[AdapterRef] = []
        self._reason: str | None = "the engine has not been started"
        self._last_word = time.monotonic()
        self._deaths = 0
        self._context = zmq.Context()
        self._now: _Incarnation | None = None
        self._streams: dict[str, asyncio.Queue[Output | EngineUnavailable]] = {}
        self._calls: dict[str, tuple[_Call, asyncio.Future[_Answer]]] = {}
        self._jobs: dict[str, asyncio.Queue[JobReply | EngineUnavailable]] = {}
        self._merges: dict[str, MergeReport] = {}
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = False
        self.mend: Callable[[Sequence[AdapterRef]], Awaitable[None]] | None = None  # files that could not be loaded
        self.failed_for_good = asyncio.Event()  # set when no restart will be tried any more

    # --- what the API asks ---------------------------------------------------------------------------

    @property
    def info(self) -> Ready | None:
        return self._info

    @property
    def pid(self) -> int | None:
        return self._now.process.pid if self._now is not None and self._now.process.returncode is None else None

    @property
    def unready_reason(self) -> str | None:
        silence = time.monotonic() - self._last_word
        if self._reason is None and silence > _QUIET_SECONDS:
            return f"the engine has not answered for {silence:.0f} s"
        return self._reason

    async def generate(self, request: Generate) -> AsyncGenerator[Output, None]:
        queue: asyncio.Queue[Output | EngineUnavailable] = asyncio.Queue()
        self._streams[request.id] = queue
        mend = self.mend
        try:
            await self._send(request)
            while True:
                item = await queue.get()
                if isinstance(item, EngineUnavailable):
                    raise item
                if item.code == protocol.LOAD_FAILED and mend is not None:
                    await mend(request.adapters)
                    mend = None  # if it fails again, these are whole
                    await self._send(request)
                    continue
                if item.finish_reason is not None or item.error is not None:
                    del self._streams[request.id]  # over: nothing to abort
                    yield item
                    return
                yield item
        finally:
            if self._streams.pop(request.id, None) is not None:
                # Not awaited: the generator may be closed by a cancelled task.
                self._send_soon(protocol.Abort(id=request.id))

    async def warm(self, adapter: AdapterRef) -> float:
        done = await self._load(adapter, lambda: protocol.Warm(id=uuid.uuid4().hex, adapter=adapter))
        assert isinstance(done, protocol.Done)
        if done.error is not None:
            raise AdapterLoadFailed(done.error, done.code or protocol.LOAD_FAILED)
        return done.seconds

    def pin(self, adapters: Sequence[AdapterRef]) -> None:
        self._pinned = list(adapters)
        self._send_soon(protocol.Pin(self._pinned))

    async def forget(self, digest: str) -> None:
        # A dead engine has forgotten everything already.
        with contextlib.suppress(EngineUnavailable):
            await self._call(protocol.Forget(id=uuid.uuid4().hex, digest=digest))

    @property
    def merges(self) -> Mapping[str, MergeReport]:
        return self._merges

    async def merge(self, adapter: AdapterRef, dtype: MergedDtype, prompts: list[list[int]]) -> MergeReport:
        report = await self._load(adapter, lambda: protocol.Merge(uuid.uuid4().hex, adapter, dtype, prompts))
        if isinstance(report, protocol.Done):
            raise MergeRefused(report.error or "", report.code or "")
        assert isinstance(report, MergeReport)
        return report

    async def unmerge(self, digest: str) -> bool:
        done = await self._call(protocol.Unmerge(uuid.uuid4().hex, digest))
        assert isinstance(done, protocol.Done)
        self._merges.pop(digest, None)
        return done.code is None

    async def inspect(self) -> Inspection:
        report = await self._call(protocol.Inspect(id=uuid.uuid4().hex))
        assert isinstance(report, Inspection)
        return report

    async def train(self, job: StartJob) -> AsyncGenerator[JobReply, None]:
        queue: asyncio.Queue[JobReply | EngineUnavailable] = asyncio.Queue()
        self._jobs[job.id] = queue
        try:
            await self._send(job)
            while True:
                item = await queue.get()
                if isinstance(item, EngineUnavailable):
                    raise item
                if isinstance(item, JobEnded):
                    del self._jobs[job.id]  # over: nothing to cancel
                    yield item
                    return
                yield item
        finally:
            if self._jobs.get(job.id) is queue:
                del self._jobs[job.id]
                self._send_soon(StopJob(job.id, save=False))

    async def plan_memory(self, asked: PlanMemory) -> MemoryPlan:
        plan = await self._call(asked)
        if isinstance(plan, protocol.Done):
            raise TrainingRefused(plan.error or "", plan.code or "")
        assert isinstance(plan, MemoryPlan)
        return plan

    async def stop_job(self, message: StopJob) -> None:
        await self._send(message)

    async def _load(self, adapter: AdapterRef, message: Callable[[], _Call]) -> _Answer:
        """A call for which the adapter is loaded, made again after its files were mended, if they had to be."""
        answer = await self._call(message())
        if not (isinstance(answer, protocol.Done) and answer.code == protocol.LOAD_FAILED and self.mend is not None):
            return answer
        await self.mend([adapter])
        return await self._call(message())

    async def _call(self, message: _Call) -> _Answer:
        future: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._calls[message.id] = message, future
        try:
            await self._send(message)
            return await future
        finally:
            self._calls.pop(message.id, None)

    async def _send(self, message: protocol.Request) -> None:
        if self._reason is not None or self._now is None:
            raise EngineUnavailable(self._reason or "the engine is not running")
        try:
            self._now.wire.send(protocol.encode(message))
        except zmq.ZMQError:  # its process has died this moment
            raise EngineUnavailable("the engine has just stopped") from None

    def _send_soon(self, message: protocol.Request) -> None:
        if self._now is not None and self._reason is None:
            with contextlib.suppress(zmq.ZMQError):
                self._now.wire.send(protocol.encode(message))

    # --- its life ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        self._reason = "the engine is loading the model"
        self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def stop(self, grace: float) -> None:
        self._stopping = True
        incarnation = self._now
        if incarnation is not None and incarnation.process.returncode is None:
            if self._reason is None:
                self._send_soon(protocol.Drain())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(incarnation.process.wait(), max(grace, 0.0))
            if incarnation.process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    incarnation.process.kill()
                await incarnation.process.wait()
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._reason = "the server is shutting down"
        self._release_everyone()
        self._context.destroy(linger=0)

    def _told_to_stop(self) -> bool:
        return self._stopping

    async def _supervise(self) -> None:
        """Run one engine process after another until stopped or given up."""
        while not self._told_to_stop():
            born = time.monotonic()
            try:
                with scratch(_SOCKET) as directory:
                    reason, retry = await self._live(directory / _SOCKET)
                counts = not self._training
            except (OSError, zmq.ZMQError) as fault:  # no space for its socket, no memory for its process
                reason, retry = f"its process cannot be started: {fault}", True
                counts = self._info is None  # else it could be once, and will be again
                await asyncio.sleep(_RETRY_SECONDS)
            except Exception as fault:  # of ours: it would load for ever
                log.exception("supervising the engine failed")
                reason, retry, counts = f"a fault in the server: {fault!r}", False, False
            self._now = None
            self._merges = {}
            if self._told_to_stop():
                return
            # One that was loaded and lived long was well: deaths before that, or without a served step, add up.
            if self._reason is None and time.monotonic() - born > _QUIET_SECONDS:
                self._deaths = 0
            self._deaths += counts
            if not retry or self._deaths >= self._give_up_after:
                self._reason = reason if not retry else f"the engine died {self._deaths} times in a row: {reason}"
                self._release_everyone(EngineDied)
                log.error("the engine will not be restarted: %s", self._reason)
                self.failed_for_good.set()
                return
            self._reason = f"the engine is being restarted ({reason})"
            self._release_everyone(EngineDied)
            log.warning("%s", self._reason)

    async def _live(self, socket: Path) -> tuple[str, bool]:
        """One incarnation from birth to death. Returns why it ended and whether to try again."""
        config = msgspec.structs.replace(self._config, address=f"ipc://{socket}")
        fatal: asyncio.Future[protocol.Fatal] = asyncio.get_running_loop().create_future()
        with contextlib.closing(Wire(self._context, config.address, partial(self._hear, fatal))) as wire:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "server.engine.process",
                str(os.getpid()),
                protocol.encode_config(config).decode(),
                stdin=asyncio.subprocess.DEVNULL,
                # torch's idle threads must sleep, not spin, or they take the cores from our own kernels' threads.
                env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ, **OURS},
            )
            self._now = _Incarnation(process, wire, time.monotonic())
            death = asyncio.create_task(process.wait())
            stall = asyncio.create_task(self._stall())
            ends: set[asyncio.Future[Any]] = {fatal, death, stall}
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if fatal.done():  # it said that it cannot go on
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(asyncio.shield(death), 5)
                    return fatal.result().message, fatal.result().retry
                if not death.done():
                    return stall.result(), True
                return f"engine process ended with status {process.returncode}", True
            finally:
                stall.cancel()
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()

    async def _stall(self) -> str:
        """Return, with the reason, once the engine has said nothing for too long: while it loads, it is silent.

        Time counts in which this process could have heard it: when both were stopped, the engine is not to blame.
        """
        heard, silence = self._last_word, 0.0
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            silence = silence + _WATCH_SECONDS if heard == self._last_word else 0.0
            heard = self._last_word
            if self._reason is not None and silence >= self._start_seconds:
                return f"it was not loaded within {self._start_seconds:.0f} s (--engine-start-seconds)"
            if self._reason is None and silence >= self._stall_seconds:
                return f"it stood still for {self._stall_seconds:.0f} s (--engine-stall-seconds)"

    def _hear(self, fatal: asyncio.Future[protocol.Fatal], data: bytes) -> None:
        """Give a message to whom it concerns; that the engine cannot go on, to `fatal`."""
        self._last_word = time.monotonic()
        message = protocol.decode_reply(data)
        match message:
            case protocol.Step():
                if message.outputs:
                    self._deaths = 0
                for output in message.outputs:
                    queue = self._streams.get(output.id)
                    if queue is not None:
                        queue.put_nowait(output)
                if message.stats.merges is not None:
                    self._merges = {report.digest: report for report in message.stats.merges}
                self._on_stats(message.stats)
            case protocol.Ready():
                self._info = message
                self._reason = None
                log.info("%s", _summary(message))
                self._send_soon(protocol.Pin(self._pinned))
            case protocol.Done() | MergeReport() | protocol.Inspection() | MemoryPlan():
                if isinstance(message, MergeReport):
                    self._merges[message.digest] = message
                _, future = self._calls.get(message.id, (None, None))
                if future is not None and not future.done():
                    future.set_result(message)
            case TrainingStep() | Checkpoint() | JobNote() | JobEnded():
                if (job := self._jobs.get(message.id)) is not None:
                    job.put_nowait(message)
            case protocol.Fatal():
                fatal.set_result(message)

    @property
    def _training(self) -> bool:
        """A job is on the engine, or was asked about."""
        return bool(self._jobs) or any(isinstance(message, PlanMemory) for message, _ in self._calls.values())

    def _release_everyone(self, error: type[EngineUnavailable] = EngineUnavailable) -> None:
        """Tell every waiting request and call that this engine will not answer."""
        for queue in self._streams.values():
            queue.put_nowait(error("The engine stopped while this request was running."))
        self._streams.clear()
        for job in self._jobs.values():
            job.put_nowait(error("The engine stopped while this job was running."))
        self._jobs.clear()
        for _, future in self._calls.values():
            if not future.done():
                future.set_exception(error("The engine stopped."))
        self._calls.clear()
