"""Complete servers in this process, one or several on one store, that tests disturb at random.

A life is one server from its start to its end. Calls of its databases and buckets are delayed at random, so that they
interleave; the disk can be full and the store unavailable. After a kill every call fails, so that the server dies
between any two of its changes. Its engine gives equal requests equal answers.
"""

import asyncio
import contextlib
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.disk import StorageFull
from adapters.storage.bucket import Bucket
from adapters.storage.database import Database
from adapters.storage.leases import Leases
from adapters.storage.versions import RemoteUnavailable
from server import usage
from server.batches import runner
from server.batches import shared as shared_batches
from server.client.engine import EngineDied
from server.finetune import evaluations, sharing
from server.messages.protocol import Generate
from server.responses import shared as shared_responses
from server.responses import store
from server.services import TENANT
from tests.support.scripted import ScriptedEngine, serving
from tests.support.several import LEASE
from tests.support.threads import threads_at_rest

# The first seed and the end of the range; long runs with more seeds are started by hand.
SEEDS = range(*map(int, os.environ.get("STEERING_SEEDS", "0:3").split(":")))
MOVES = 30
SOON = 0.02  # seconds before a retry

_LIFE: ContextVar["Life | None"] = ContextVar("life", default=None)


class Killed(BaseException):
    """Raised by every call of a killed server."""


class SteeredEngine(ScriptedEngine):
    """An engine with steps of random duration, which can be killed and held."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.deaths = 0
        self.held = False
        self.gate = self._pace
        self._up = self.info

    async def _pace(self, request: Generate, step: int) -> None:
        born = self._born.setdefault(request.id, self.deaths) if step == 0 else self._born[request.id]
        await asyncio.sleep(random.random() / 300)
        while self.held and born == self.deaths:  # noqa: ASYNC110  # there is no event to wait for
            await asyncio.sleep(0.002)
        if born != self.deaths:
            raise EngineDied("The engine died.")

    @property
    def _born(self) -> dict[str, int]:
        born: dict[str, int] = self.__dict__.setdefault("born", {})
        return born

    def kill(self) -> None:
        """Fail all sequences, and come back after `SOON`."""
        self.deaths += 1
        self.info = None
        asyncio.get_running_loop().call_later(SOON, self.revive)

    def revive(self) -> None:
        self.info = self._up


class Life:
    """One server over a directory.

    Attributes:
        unavailable: calls of its object store fail at random, some of them after the change was made.
        full: writes to its disk fail.
        disturbances: number of disturbances that may have caused error responses.
    """

    def __init__(self, root: Path, settings: dict[str, Any], reply: Callable[[Generate], list[int]] | None) -> None:
        self.root, self._reply = root, reply
        self.dead = self.ended = self.unavailable = self.full = False
        self.disturbances = 0
        self.tasks: set[asyncio.Task[Any]] = set()
        self._settings = settings
        self._serving, self._running = AsyncExitStack(), AsyncExitStack()

    async def open(self) -> None:
        self.root.mkdir(exist_ok=True)
        with self.as_current():
            opened = serving(self.root, engine=SteeredEngine, **self._settings)
            self.served = await self._serving.enter_async_context(opened)
            self.engine.reply = self._reply or self.engine.reply
            await self._running.enter_async_context(self.served.app.router.lifespan_context(self.served.app))

    @property
    def engine(self) -> SteeredEngine:
        assert isinstance(self.served.engine, SteeredEngine)
        return self.served.engine

    @contextmanager
    def as_current(self) -> Iterator[None]:
        """Assign tasks and threads started in the context to this life."""
        token = _LIFE.set(self)
        try:
            yield
        finally:
            _LIFE.reset(token)

    def before_call(self, *, writes: bool = False) -> None:
        """Delay a call at random. Raises the errors of a killed server and, if the call writes, of a full disk."""
        if asyncio._get_running_loop() is None:
            time.sleep(random.random() * random.choice((0, 0, 0.002, 0.01)))
        if self.dead:
            raise Killed
        if self.full and writes:
            raise StorageFull(28, "full")

    @contextmanager
    def store_call(self) -> Iterator[None]:
        """Wrap a call of the object store. Raises RemoteUnavailable at random while it is unavailable."""
        self.before_call()
        if self.unavailable and random.random() < 0.3:
            raise RemoteUnavailable("no route")
        yield
        self.before_call()
        if self.unavailable and random.random() < 0.3:
            raise RemoteUnavailable("no answer")

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response | None:
        """Return the response to a request; None if the server ends in the meantime."""
        disturbances = self.disturbances if not self.disturbed else -1
        client = self.served.client

        async def send() -> httpx.Response | None:
            return None if client.is_closed else await client.request(method, path, **options)

        with self.as_current():
            asking = asyncio.create_task(send())
        try:
            response = await asking
        except (asyncio.CancelledError, Killed):
            if self.dead or self.ended:
                return None
            asking.cancel()
            raise
        if response is None:
            return None
        disturbed = disturbances != self.disturbances
        where = f"{method} {path}: {response.status_code} {response.text}"
        assert response.status_code < 500 or (disturbed and response.status_code in (503, 507)), where
        return response

    @property
    def disturbed(self) -> bool:
        return self.unavailable or self.full or self.served.engine.info is None or self.engine.held

    async def close(self) -> None:
        """Stop the server, as SIGTERM does."""
        self.unavailable = self.full = False
        self.ended = True
        with self.as_current():
            await self._running.aclose()
            await self._cancel_all()
            await self._serving.aclose()

    def ended_one(self, task: asyncio.Task[Any]) -> None:
        """One of its tasks is over; how, nobody is told by a dead server."""
        self.tasks.discard(task)
        if self.dead and not task.cancelled():
            task.exception()

    async def kill(self) -> None:
        """Kill the server, as SIGKILL does."""
        self.dead = True
        for leases in self.leases():
            for key in leases.held_keys():
                leases.drop(key)  # else they would be released
        await self._cancel_all()
        await threads_at_rest()
        with self.as_current():
            for stack in (self._running, self._serving):
                with contextlib.suppress(Killed, asyncio.CancelledError):
                    await stack.aclose()
        await self._cancel_all()

    async def _cancel_all(self) -> None:
        async with asyncio.timeout(60):
            while left := [task for task in self.tasks if not task.done() and task is not asyncio.current_task()]:
                for task in left:
                    task.cancel()
                await asyncio.wait(left, timeout=1)

    def state(self) -> dict[str, object]:
        """Return the work in progress, for the message of a failed test."""
        services = self.served.services
        return {
            "evaluations": {id_: repr(task) for id_, task in services.tuning.evaluations.tasks.items()},
            "batches": {id_: repr(task) for id_, task in services.batches.tasks.items()},
            "responses": list(services.responses.running),
            "rows": {**services.batches.store.statuses(), **services.tuning.evaluations.store.statuses()},
            "leases": [leases._held | leases._seen for leases in self.leases()],
        }

    def leases(self) -> list[Leases]:
        """Return the leases of all workers; none for a single server."""
        tuning, batches = self.served.services.tuning, self.served.services.batches
        shared = [worker.sharing for worker in (tuning.evaluations, batches) if worker.sharing is not None]
        found: list[Leases] = [one.records.leases for one in shared]
        responses = self.served.services.responses
        return found + ([responses._leases] if isinstance(responses, shared_responses.SharedResponses) else [])


class Fleet:
    """One server, or several on one store, and their disturbances.

    Attributes:
        engines: of all lives, past ones included.
        lost_usage: usage may be lost, since a server died before it could be written.
    """

    def __init__(
        self,
        root: Path,
        count: int,
        choose: random.Random,
        reply: Callable[[Generate], list[int]] | None = None,
        **settings: Any,
    ) -> None:
        self.root, self.choose, self._reply = root, choose, reply
        self.url = f"file://{root}/bucket" if count > 1 else None
        store: dict[str, Any] = {"adapter_store": self.url, "store_poll_seconds": 0.1, "job_lease_seconds": LEASE}
        self._settings = (store if self.url else {}) | settings
        self._opened = 0
        self.lives: list[Life] = []
        self.engines: list[SteeredEngine] = []
        self.lost_usage = count > 1
        self.log: list[str] = []  # the disturbances so far

    async def open(self, index: int, root: Path | None = None) -> None:
        """Start a server at this index, on the disk of its predecessor or an empty one."""
        self._opened += 1
        life = Life(root or self.root / f"disk-{self._opened}", self._settings, self._reply)
        self.lives[index : index + 1] = [life]
        await life.open()
        self.engines.append(life.engine)

    @property
    def any(self) -> Life:
        return self.choose.choice(self.lives)

    @property
    def disturbed(self) -> bool:
        """Whether any life is disturbed."""
        return any(life.disturbed for life in self.lives)

    @property
    def services(self) -> Iterator[Any]:
        return (life.served.services for life in self.lives)

    def _next_disk(self, life: Life) -> Path | None:
        return life.root if self.url is None or self.choose.random() < 0.5 else None

    async def disturb(self) -> None:
        """Disturb a server at random."""
        index = self.choose.randrange(len(self.lives))
        life = self.lives[index]
        kinds = ["restart", "kill", "engine", "hold", "release", "full", "calm", "wait", "wait"]
        kind = self.choose.choice(kinds + ["unavailable", "expire"] * (self.url is not None))
        self.log.append(f"{kind} {index}")
        life.disturbances += 1
        match kind:
            case "restart":
                await life.close()
                await self.open(index, self._next_disk(life))
            case "kill":
                self.lost_usage |= life.full
                await life.kill()
                await self.open(index, self._next_disk(life))
            case "engine":
                life.engine.kill()
            case "hold":
                life.engine.held = True
            case "release":
                life.engine.held = False
            case "full" | "unavailable":
                setattr(life, kind, True)
            case "expire":
                self.expire_leases(life, held=None)
            case "calm":
                self.calm()
            case _:
                await asyncio.sleep(self.choose.random() / 10)

    async def steer(
        self, move: Callable[[], Awaitable[None]], moves: int, *, concurrent: Sequence[int], disturbed: float
    ) -> None:
        """Make random moves, then calm down.

        Args:
            concurrent: numbers of moves at a time, of which one is drawn.
            disturbed: the probability of a disturbance beside them.
        """
        for _ in range(moves):
            works = [move() for _ in range(self.choose.choice(concurrent))]
            if self.choose.random() < disturbed:
                works.append(self.disturb())
            await asyncio.gather(*works)
            await asyncio.sleep(random.random() / 30)
        self.calm()

    def calm(self) -> None:
        """End all disturbances."""
        for life in self.lives:
            life.unavailable = life.full = life.engine.held = False
            life.engine.revive()

    def expire_leases(self, life: Life, held: set[str] | None) -> None:
        """Expire the leases observed by a server and held elsewhere, except those of `held` records."""
        for leases in life.leases():
            for key, (lease, since) in list(leases._seen.items()):
                if not leases.holds(key) and (held is None or key not in held):
                    leases._seen[key] = lease, since - LEASE - 1

    async def wait_until(self, condition: Callable[[], bool | Awaitable[bool]]) -> None:
        """Wait for the condition; leases of dead servers expire at once."""
        try:
            async with asyncio.timeout(40):
                while not (await met if isinstance(met := condition(), Awaitable) else met):
                    held = {key for life in self.lives for leases in life.leases() for key in leases.held_keys()}
                    for life in self.lives:
                        self.expire_leases(life, held)
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError("the condition is not met", [life.state() for life in self.lives]) from None

    async def ask_all(self, method: str, path: str) -> list[httpx.Response]:
        """Return the responses of all servers, without disturbances."""
        answers = [await life.ask(method, path) for life in self.lives]
        return [answer for answer in answers if answer is not None]

    async def wait_until_idle(self) -> None:
        """Wait for the end of all work, and check that the engines are idle."""
        await self.wait_until(lambda: not any(services.tuning.evaluations.tasks for services in self.services))
        await self.wait_until(lambda: not any(services.batches.tasks for services in self.services))
        await self.wait_until(lambda: not any(services.responses.running for services in self.services))
        for life in self.lives:
            assert not life.engine.running
            assert life.served.services.drain.open_requests == 0

    def leftovers(self) -> list[str]:
        """Return unreferenced files and objects, and files set aside as unknown."""
        found = []
        for life in self.lives:
            files = life.root / "files"
            known = {row.id for row in life.served.services.tuning.files.page(TENANT, limit=1000)[0]}
            here = [path for path in files.iterdir() if path.is_file()] + list((files / "records").glob("*"))
            found += [str(path) for path in here if path.name.removesuffix(".json") not in known]
            for directory in (files / "staging", life.root / "batches", life.root / "lost+found"):
                found += [str(path) for path in directory.rglob("*")] if directory.exists() else []
        if self.url is not None:
            services: Any = self.lives[0].served.services
            services.tuning.files.follow()
            for table in (services.tuning.files, services.tuning.evaluations.store, services.batches.store):
                table.remove_orphans(0.0)
            known = {row.id for row in services.tuning.files.page(TENANT, limit=1000)[0]}
            stored = [entry.path for part in ("file-contents", "batch-files") for entry in Bucket(self.url).list(part)]
            found += [
                f"{path} {services.tuning.files._records.look(path.split('/')[1])}"
                for path in stored
                if path.split("/")[1] not in known
            ]
        return found

    def recorded_tokens(self) -> int:
        """Return the generated tokens in the usage ledger; each server reports the total of all."""
        days = None, "0000-00-00", "9999-99-99"
        return max(sum(row["generated_tokens"] for row in one.ledger.rows(*days)) for one in self.services)

    def generated_tokens(self) -> int:
        """Return the tokens generated by the engines."""
        return sum(engine.steps for engine in self.engines)


@asynccontextmanager
async def fleet(root: Path, count: int, seed: int, **settings: Any) -> AsyncIterator[Fleet]:
    """Run `count` servers under random disturbances."""
    random.seed(seed)
    steered = Fleet(root, count, random.Random(seed), **settings)
    loop = asyncio.get_running_loop()

    def factory(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=loop, **options)
        if (life := _LIFE.get()) is not None:
            life.tasks.add(task)
            task.add_done_callback(life.ended_one)
        return task

    with pytest.MonkeyPatch.context() as patch:
        _patch(patch)
        loop.set_task_factory(factory)
        try:
            for index in range(count):
                await steered.open(index)
            yield steered
            for life in steered.lives:
                await life.close()
        except BaseException as fault:
            fault.add_note(f"after {steered.log}")
            for life in steered.lives:
                if not life.ended:
                    await life.kill()
            raise
        finally:
            loop.set_task_factory(None)


def _patch(patch: pytest.MonkeyPatch) -> None:
    """Assign databases and buckets to the life that opens them, and shorten waits."""
    for module, name in (
        (runner, "RETRY_SECONDS"),
        (runner, "SPACE_SECONDS"),
        (evaluations, "SPACE_SECONDS"),
        (store, "RETRY_SECONDS"),
        (store, "_STORING_SECONDS"),
        (usage, "RETRY_SECONDS"),
    ):
        patch.setattr(module, name, SOON)
    patch.setattr(sharing, "_RENEWALS", 600)
    patch.setattr(shared_batches, "_PART_BYTES", 2000)
    for kind in (Database, Bucket):
        patch.setattr(kind, "__init__", _with_life(kind.__init__))
    for name in ("list", "read", "put_if", "put_file", "get_file", "delete"):
        patch.setattr(Bucket, name, _as_store_call(getattr(Bucket, name)))
    patch.setattr(Database, "transaction", _as_database_call(Database.transaction))


def _with_life(real: Any) -> Any:
    def begin(self: Any, *args: Any, **options: Any) -> None:
        self.life = _LIFE.get()
        real(self, *args, **options)

    return begin


def _as_store_call(real: Any) -> Any:
    def call(self: Any, *args: Any, **options: Any) -> Any:
        if self.life is None:
            return real(self, *args, **options)
        with self.life.store_call():
            return real(self, *args, **options)

    return call


def _as_database_call(real: Any) -> Any:
    @contextmanager
    def transaction(self: Any, *, removing: bool = False) -> Iterator[Any]:
        outermost = self.life is not None and self._owner != threading.get_ident()
        if outermost:
            self.life.before_call(writes=not removing)
        with real(self, removing=removing) as connection:
            yield connection

    return transaction
