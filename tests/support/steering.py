"""Whole servers in this process that a test steers at random, alone or several on one store.

A life is one server from its start to its end. Its databases and its buckets answer late, as they like, so that calls
meet; they can be full or away; and once the server is killed none of them answers any more, so that it dies between any
two of its changes. Its engine says the same to the same request.
"""

import asyncio
import contextlib
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
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

# The first seed and the one after the last: more of them, for hours, are tried by hand.
SEEDS = range(*map(int, os.environ.get("STEERING_SEEDS", "0:3").split(":")))
MOVES = 30
SOON = 0.02  # seconds after which what failed is tried again

_LIFE: ContextVar["Life | None"] = ContextVar("life", default=None)


class Killed(BaseException):
    """A dead server goes no further."""


class SteeredEngine(ScriptedEngine):
    """Takes its time for every step, dies and is held up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.deaths = 0
        self.held = False
        self.gate = self._pace
        self._up = self.info

    async def _pace(self, request: Generate, step: int) -> None:
        born = self._born.setdefault(request.id, self.deaths) if step == 0 else self._born[request.id]
        await asyncio.sleep(random.random() / 300)
        while self.held and born == self.deaths:  # noqa: ASYNC110  # nothing tells
            await asyncio.sleep(0.002)
        if born != self.deaths:
            raise EngineDied("The engine died.")

    @property
    def _born(self) -> dict[str, int]:
        born: dict[str, int] = self.__dict__.setdefault("born", {})
        return born

    def kill(self) -> None:
        """Die with all sequences, and be up again soon."""
        self.deaths += 1
        self.info = None
        asyncio.get_running_loop().call_later(SOON, self.revive)

    def revive(self) -> None:
        self.info = self._up


class Life:
    """One server over a directory.

    Attributes:
        away: its object store fails half of what it is asked, some of it after it was done.
        full: its disk takes nothing more.
        troubles: how often something was amiss that a client may be told of.
    """

    def __init__(self, root: Path, settings: dict[str, Any], reply: Callable[[Generate], list[int]] | None) -> None:
        self.root, self._reply = root, reply
        self.dead = self.ended = self.away = self.full = False
        self.troubles = 0
        self.tasks: set[asyncio.Task[Any]] = set()
        self._settings = settings
        self._serving, self._running = AsyncExitStack(), AsyncExitStack()

    async def open(self) -> None:
        self.root.mkdir(exist_ok=True)
        with self.own():
            opened = serving(self.root, engine=SteeredEngine, **self._settings)
            self.served = await self._serving.enter_async_context(opened)
            self.engine.reply = self._reply or self.engine.reply
            await self._running.enter_async_context(self.served.app.router.lifespan_context(self.served.app))

    @property
    def engine(self) -> SteeredEngine:
        assert isinstance(self.served.engine, SteeredEngine)
        return self.served.engine

    @contextmanager
    def own(self) -> Iterator[None]:
        """What begins meanwhile is this life's."""
        token = _LIFE.set(self)
        try:
            yield
        finally:
            _LIFE.reset(token)

    def ready(self, *, writes: bool = False) -> None:
        """In a thread of this life's, before anything changes."""
        if asyncio._get_running_loop() is None:
            time.sleep(random.random() * random.choice((0, 0, 0.002, 0.01)))
        if self.dead:
            raise Killed
        if self.full and writes:
            raise StorageFull(28, "full")

    @contextmanager
    def reached(self) -> Iterator[None]:
        """Something of the object store."""
        self.ready()
        if self.away and random.random() < 0.3:
            raise RemoteUnavailable("no route")
        yield
        self.ready()
        if self.away and random.random() < 0.3:
            raise RemoteUnavailable("no answer")

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response | None:
        """An answer; none of a server that ends meanwhile."""
        troubles = self.troubles if not self.troubled else -1
        with self.own():
            asking = asyncio.create_task(self.served.client.request(method, path, **options))
        try:
            response = await asking
        except (asyncio.CancelledError, Killed):
            if self.dead or self.ended:
                return None
            asking.cancel()
            raise
        rough = troubles != self.troubles
        where = f"{method} {path}: {response.status_code} {response.text}"
        assert response.status_code < 500 or (rough and response.status_code in (503, 507)), where
        return response

    @property
    def troubled(self) -> bool:
        return self.away or self.full or self.served.engine.info is None or self.engine.held

    async def close(self) -> None:
        """As by SIGTERM."""
        self.away = self.full = False
        self.ended = True
        with self.own():
            await self._running.aclose()
            await self._cancel_all()
            await self._serving.aclose()

    async def kill(self) -> None:
        """As by SIGKILL."""
        self.dead = True
        for leases in self.leases():
            for key in leases.held_keys():
                leases.drop(key)  # or they would be given back
        await self._cancel_all()
        await threads_at_rest()
        with self.own():
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
        """What is worked on, for who looks for a fault."""
        services = self.served.services
        return {
            "evaluations": {id_: repr(task) for id_, task in services.tuning.evaluations.tasks.items()},
            "batches": {id_: repr(task) for id_, task in services.batches.tasks.items()},
            "responses": list(services.responses.running),
            "rows": {**services.batches.store.statuses(), **services.tuning.evaluations.store.statuses()},
            "leases": [leases._held | leases._seen for leases in self.leases()],
        }

    def leases(self) -> list[Leases]:
        """Of all that is worked on here, where there are several servers."""
        tuning, batches = self.served.services.tuning, self.served.services.batches
        shared = [worker.sharing for worker in (tuning.evaluations, batches) if worker.sharing is not None]
        found: list[Leases] = [one.records.leases for one in shared]
        responses = self.served.services.responses
        return found + ([responses._leases] if isinstance(responses, shared_responses.SharedResponses) else [])


class Fleet:
    """One server, or several on one store, and what befalls them.

    Attributes:
        engines: all that there ever were.
        lost_usage: what was used may be forgotten, since a server died that could not write it down.
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
        self.said: list[str] = []  # the moves so far

    async def open(self, place: int, root: Path | None = None) -> None:
        """A new server in the place of one that has gone, over its disk or an empty one."""
        self._opened += 1
        life = Life(root or self.root / f"disk-{self._opened}", self._settings, self._reply)
        self.lives[place : place + 1] = [life]
        await life.open()
        self.engines.append(life.engine)

    @property
    def any(self) -> Life:
        return self.choose.choice(self.lives)

    @property
    def rough(self) -> bool:
        """Whether something is amiss somewhere."""
        return any(life.troubled for life in self.lives)

    @property
    def services(self) -> Iterator[Any]:
        return (life.served.services for life in self.lives)

    def _next_disk(self, life: Life) -> Path | None:
        return life.root if self.url is None or self.choose.random() < 0.5 else None

    async def disturb(self) -> None:
        """Something befalls a server."""
        place = self.choose.randrange(len(self.lives))
        life = self.lives[place]
        kinds = ["restart", "kill", "engine", "hold", "release", "full", "calm", "wait", "wait"]
        kind = self.choose.choice(kinds + ["away", "believe"] * (self.url is not None))
        self.said.append(f"{kind} {place}")
        life.troubles += 1
        match kind:
            case "restart":
                await life.close()
                await self.open(place, self._next_disk(life))
            case "kill":
                self.lost_usage |= life.full
                await life.kill()
                await self.open(place, self._next_disk(life))
            case "engine":
                life.engine.kill()
            case "hold":
                life.engine.held = True
            case "release":
                life.engine.held = False
            case "full" | "away":
                setattr(life, kind, True)
            case "believe":
                self.pass_by(life, among=None)
            case "calm":
                self.calm()
            case _:
                await asyncio.sleep(self.choose.random() / 10)

    def calm(self) -> None:
        """All goes well again."""
        for life in self.lives:
            life.away = life.full = life.engine.held = False
            life.engine.revive()

    def pass_by(self, life: Life, among: set[str] | None) -> None:
        """A server has heard for long of nobody who holds what it does not, but for those that are held by `among`."""
        for leases in life.leases():
            for key, (lease, since) in list(leases._seen.items()):
                if not leases.holds(key) and (among is None or key not in among):
                    leases._seen[key] = lease, since - LEASE - 1

    async def until(self, condition: Callable[[], bool | Awaitable[bool]]) -> None:
        """Return once it is true; whoever held what nobody holds now is given up soon."""
        try:
            async with asyncio.timeout(40):
                while not (await met if isinstance(met := condition(), Awaitable) else met):
                    held = {key for life in self.lives for leases in life.leases() for key in leases.held_keys()}
                    for life in self.lives:
                        self.pass_by(life, held)
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError("it does not come to rest", [life.state() for life in self.lives]) from None

    async def everywhere(self, method: str, path: str) -> list[httpx.Response]:
        """What all servers answer, in calm."""
        answers = [await life.ask(method, path) for life in self.lives]
        return [answer for answer in answers if answer is not None]

    async def at_rest(self) -> None:
        """Nothing is worked on anywhere, and the engines have nothing to do."""
        await self.until(lambda: not any(services.tuning.evaluations.tasks for services in self.services))
        await self.until(lambda: not any(services.batches.tasks for services in self.services))
        await self.until(lambda: not any(services.responses.running for services in self.services))
        for life in self.lives:
            assert not life.engine.running
            assert life.served.services.drain.open_requests == 0

    def leftovers(self) -> list[str]:
        """What nobody names: files of files that are none, and whatever was put aside as unknown."""
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

    def used(self) -> int:
        """Tokens generated, as they are counted; each server shows those of all."""
        days = None, "0000-00-00", "9999-99-99"
        return max(sum(row["generated_tokens"] for row in one.ledger.rows(*days)) for one in self.services)

    def spent(self) -> int:
        """Tokens that the engines have said."""
        return sum(engine.steps for engine in self.engines)


@asynccontextmanager
async def fleet(root: Path, count: int, seed: int, **settings: Any) -> AsyncIterator[Fleet]:
    """So many servers that can be steered."""
    random.seed(seed)
    steered = Fleet(root, count, random.Random(seed), **settings)
    loop = asyncio.get_running_loop()

    def factory(loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=loop, **options)
        if (life := _LIFE.get()) is not None:
            life.tasks.add(task)
            task.add_done_callback(life.tasks.discard)
        return task

    def report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if not isinstance(context.get("exception"), Killed):
            loop.default_exception_handler(context)

    with pytest.MonkeyPatch.context() as patch:
        _patch(patch)
        loop.set_task_factory(factory)
        loop.set_exception_handler(report)
        try:
            for place in range(count):
                await steered.open(place)
            yield steered
            for life in steered.lives:
                await life.close()
        except BaseException as fault:
            fault.add_note(f"after {steered.said}")
            for life in steered.lives:
                if not life.ended:
                    await life.kill()
            raise
        finally:
            loop.set_task_factory(None)
            loop.set_exception_handler(None)


def _patch(patch: pytest.MonkeyPatch) -> None:
    """Databases and buckets are those of the life that opened them; waits are short."""
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
        patch.setattr(kind, "__init__", _born(kind.__init__))
    for name in ("list", "read", "put_if", "put_file", "get_file", "delete"):
        patch.setattr(Bucket, name, _reached(getattr(Bucket, name)))
    patch.setattr(Database, "transaction", _changed(Database.transaction))


def _born(real: Any) -> Any:
    def begin(self: Any, *args: Any, **options: Any) -> None:
        self.life = _LIFE.get()
        real(self, *args, **options)

    return begin


def _reached(real: Any) -> Any:
    def call(self: Any, *args: Any, **options: Any) -> Any:
        if self.life is None:
            return real(self, *args, **options)
        with self.life.reached():
            return real(self, *args, **options)

    return call


def _changed(real: Any) -> Any:
    @contextmanager
    def transaction(self: Any, *, removing: bool = False) -> Iterator[Any]:
        outermost = self.life is not None and self._owner != threading.get_ident()
        if outermost:
            self.life.ready(writes=not removing)
        with real(self, removing=removing) as connection:
            yield connection

    return transaction
