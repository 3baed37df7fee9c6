"""The API process's interface to an engine, and its implementation for an engine on this machine.

All other parts use `EngineClient` only, so that a remote engine or several engines could stand behind it.
`LocalEngine` delivers to every waiting request its result, or an error when the engine process ends.
"""

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from msgspec.structs import replace

from adapters.offline.recipe import MergedDtype
from server.client.process import EngineDied as EngineDied
from server.client.process import EngineProcess
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

_POLL_SECONDS = 0.2

_Call = protocol.Warm | protocol.Forget | protocol.Merge | protocol.Unmerge | protocol.Inspect | PlanMemory
_CallReply = protocol.Done | MergeReport | Inspection | MemoryPlan  # replies to a call


class EngineRefusal(Exception):
    """The engine refused a request; `code` is the reason in one word."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class AdapterLoadFailed(EngineRefusal):
    """An adapter did not become resident."""


class MergeRefused(EngineRefusal):
    """The engine refused a merge."""


class TrainingRefused(EngineRefusal):
    """A job of this shape cannot run."""


class EngineClient(Protocol):
    """An engine as seen by the API process."""

    @property
    def info(self) -> Ready | None:
        """The engine's description of itself: set by the first `Ready`, kept while the engine restarts."""

    @property
    def pid(self) -> int | None:
        """The engine's current process id, or None while no process runs."""

    @property
    def unready_reason(self) -> str | None:
        """None when the engine is loaded and making progress, else the reason why it is not."""

    def generate(self, request: Generate) -> AsyncGenerator[Output, None]:
        """Yield the outputs of one sequence, the last with `finish_reason` or `error`. Closing the iterator aborts it.

        Raises EngineUnavailable (from the first or any later item) when the engine is not up or dies meanwhile.
        """

    async def warm(self, adapter: AdapterRef) -> float:
        """Load the adapter onto the device; return the seconds taken."""

    def pin(self, adapters: Sequence[AdapterRef]) -> None:
        """Pin exactly these adapters on the device, also across restarts of the engine."""

    async def forget(self, digest: str) -> None:
        """Drop the adapter's rows and host copy once no request uses them."""

    @property
    def merges(self) -> Mapping[str, MergeReport]:
        """Merges in force as last reported by the engine, by digest."""

    async def merge(self, adapter: AdapterRef, dtype: MergedDtype, prompts: list[list[int]]) -> MergeReport:
        """Merge the adapter's weights for its further requests. Raises MergeRefused."""

    async def unmerge(self, digest: str) -> bool:
        """Remove a merge, finished or still being built; return whether there was one."""

    async def inspect(self) -> Inspection:
        """Return a fresh hash of the base and the accounting of blocks and rows."""

    def train(self, job: StartJob) -> AsyncGenerator[JobReply, None]:
        """Run a fine-tuning job and yield its messages, `JobEnded` last. Closing the iterator cancels the job.

        Raises EngineUnavailable when the engine is not up, EngineDied when it dies meanwhile; the job can then be
        started again.
        """

    async def plan_memory(self, question: PlanMemory) -> MemoryPlan:
        """Return the memory plan of a job. Raises TrainingRefused, EngineUnavailable and EngineDied, like `train`."""

    async def stop_job(self, message: StopJob) -> None:
        """Pause or cancel a running job; its `train` iterator still yields up to `JobEnded`."""

    async def start(self) -> None:
        """Start the engine and return at once; `unready_reason` is None once it is up."""

    async def stop(self, grace: float) -> None:
        """Let running sequences finish for at most `grace` seconds, then end the process."""


def engine_info(engine: EngineClient) -> Ready:
    """Return the engine's description of itself. Raises EngineUnavailable before the first engine is up."""
    if engine.info is None:
        raise EngineUnavailable(engine.unready_reason or "The engine is starting.")
    return engine.info


async def wait_until_ready(engine: EngineClient) -> Ready:
    """Wait until the engine is ready; return its description of itself."""
    while engine.unready_reason is not None or engine.info is None:  # noqa: ASYNC110 - the interface has no event
        await asyncio.sleep(_POLL_SECONDS)
    return engine.info


class LocalEngine:
    """The engine on this machine: routes requests to its process and replies to their callers.

    Args:
        config: configuration of its process (`address` is filled in).
        on_stats: called with every step's `Stats`.
        start_seconds: an engine not loaded after this long is killed and restarted.
        stall_seconds: a loaded engine that sends no message for this long is killed and restarted.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_stats: Callable[[Stats], None],
        *,
        start_seconds: float = 3600.0,
        stall_seconds: float = 300.0,
    ) -> None:
        self._on_stats = on_stats
        self._process = EngineProcess(
            config,
            self._on_message,
            self._fail_all_waiting,
            self._is_training,
            start_seconds=start_seconds,
            stall_seconds=stall_seconds,
        )
        self._info: Ready | None = None
        self._pinned: list[AdapterRef] = []
        self._streams: dict[str, asyncio.Queue[Output | EngineUnavailable]] = {}
        self._calls: dict[str, tuple[_Call, asyncio.Future[_CallReply]]] = {}
        self._jobs: dict[str, asyncio.Queue[JobReply | EngineUnavailable]] = {}  # by the engine's id of a run
        self._job_ids: dict[str, str] = {}  # job id -> the engine's id of its latest run
        self._job_runs = itertools.count()
        self._merges: dict[str, MergeReport] = {}
        self.mend: Callable[[Sequence[AdapterRef]], Awaitable[None]] | None = None  # called after a failed load

    @property
    def info(self) -> Ready | None:
        return self._info

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def unready_reason(self) -> str | None:
        return self._process.unready_reason

    @property
    def failed_for_good(self) -> asyncio.Event:
        """Set once the engine will not be restarted any more."""
        return self._process.failed_for_good

    async def start(self) -> None:
        self._process.start()

    async def stop(self, grace: float) -> None:
        await self._process.stop(grace)

    async def generate(self, request: Generate) -> AsyncGenerator[Output, None]:
        queue: asyncio.Queue[Output | EngineUnavailable] = asyncio.Queue()
        self._streams[request.id] = queue
        mend = self.mend
        try:
            self._process.send(request)
            while True:
                item = await queue.get()
                if isinstance(item, EngineUnavailable):
                    raise item
                if item.code == protocol.LOAD_FAILED and mend is not None:
                    await mend(request.adapters)
                    mend = None  # a second failure has another cause than damaged files
                    self._process.send(request)
                    continue
                if item.finish_reason is not None or item.error is not None:
                    del self._streams[request.id]  # finished, nothing to abort
                    yield item
                    return
                yield item
        finally:
            if self._streams.pop(request.id, None) is not None:
                # Not awaited: the generator may be closed by a cancelled task.
                self._send_if_up(protocol.Abort(id=request.id))

    async def warm(self, adapter: AdapterRef) -> float:
        reply = await self._load(adapter, lambda: protocol.Warm(id=uuid.uuid4().hex, adapter=adapter))
        assert isinstance(reply, protocol.Done)
        if reply.error is not None:
            raise AdapterLoadFailed(reply.error, reply.code or protocol.LOAD_FAILED)
        return reply.seconds

    def pin(self, adapters: Sequence[AdapterRef]) -> None:
        self._pinned = list(adapters)
        self._send_if_up(protocol.Pin(self._pinned))

    async def forget(self, digest: str) -> None:
        # a dead engine holds nothing
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
        reply = await self._call(protocol.Unmerge(uuid.uuid4().hex, digest))
        assert isinstance(reply, protocol.Done)
        self._merges.pop(digest, None)
        return reply.code is None

    async def inspect(self) -> Inspection:
        report = await self._call(protocol.Inspect(id=uuid.uuid4().hex))
        assert isinstance(report, Inspection)
        return report

    async def train(self, job: StartJob) -> AsyncGenerator[JobReply, None]:
        queue: asyncio.Queue[JobReply | EngineUnavailable] = asyncio.Queue()
        # An id per run, so that late messages of a closed run are not taken for this run's.
        id_ = f"{job.id}.{next(self._job_runs)}"
        self._jobs[id_], self._job_ids[job.id] = queue, id_
        try:
            self._process.send(replace(job, id=id_))
            while True:
                item = await queue.get()
                if isinstance(item, EngineUnavailable):
                    raise item
                if ended := isinstance(item, JobEnded):
                    del self._jobs[id_]  # finished, nothing to cancel
                yield replace(item, id=job.id)
                if ended:
                    return
        finally:
            if self._job_ids.get(job.id) == id_:
                del self._job_ids[job.id]
            if self._jobs.pop(id_, None) is not None:
                self._send_if_up(StopJob(id_, save=False))

    async def plan_memory(self, question: PlanMemory) -> MemoryPlan:
        plan = await self._call(question)
        if isinstance(plan, protocol.Done):
            raise TrainingRefused(plan.error or "", plan.code or "")
        assert isinstance(plan, MemoryPlan)
        return plan

    async def stop_job(self, message: StopJob) -> None:
        self._process.send(replace(message, id=self._job_ids.get(message.id, message.id)))

    async def _load(self, adapter: AdapterRef, message: Callable[[], _Call]) -> _CallReply:
        """Make a call that loads the adapter; if the load fails, mend the adapter's files and repeat the call once."""
        reply = await self._call(message())
        if not (isinstance(reply, protocol.Done) and reply.code == protocol.LOAD_FAILED and self.mend is not None):
            return reply
        await self.mend([adapter])
        return await self._call(message())

    async def _call(self, message: _Call) -> _CallReply:
        future: asyncio.Future[_CallReply] = asyncio.get_running_loop().create_future()
        self._calls[message.id] = message, future
        try:
            self._process.send(message)
            return await future
        finally:
            self._calls.pop(message.id, None)

    def _send_if_up(self, message: protocol.Request) -> None:
        with contextlib.suppress(EngineUnavailable):
            self._process.send(message)

    # --- messages from the engine --------------------------------------------------------------------

    def _on_message(self, message: protocol.Reply) -> None:
        """Deliver a message to the request, call or job waiting for it."""
        match message:
            case protocol.Step():
                for output in message.outputs:
                    queue = self._streams.get(output.id)
                    if queue is not None:
                        queue.put_nowait(output)
                if message.stats.merges is not None:
                    self._merges = {report.digest: report for report in message.stats.merges}
                self._on_stats(message.stats)
            case protocol.Ready():
                self._info = message
                self._send_if_up(protocol.Pin(self._pinned))
            case protocol.Done() | MergeReport() | protocol.Inspection() | MemoryPlan():
                if isinstance(message, MergeReport):
                    self._merges[message.digest] = message
                _, future = self._calls.get(message.id, (None, None))
                if future is not None and not future.done():
                    future.set_result(message)
            case TrainingStep() | Checkpoint() | JobNote() | JobEnded():
                if (job := self._jobs.get(message.id)) is not None:
                    job.put_nowait(message)

    def _is_training(self) -> bool:
        """Whether a job runs on the engine or a memory plan is being computed."""
        return bool(self._jobs) or any(isinstance(message, PlanMemory) for message, _ in self._calls.values())

    def _fail_all_waiting(self, error: type[EngineUnavailable]) -> None:
        """Fail every waiting request, job and call, since this engine process will not reply."""
        self._merges = {}
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
