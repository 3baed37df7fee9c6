"""The interface of a side in a comparison: install, start, answer a burst of requests, stop; and what sides share.

Each system has a module of its own beside this one.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import httpx

from loadtest.client import OPENAI, Client, Dialect, Timeline
from loadtest.synthetic import Dtype

AdapterId = tuple[Dtype, int]


class SideError(Exception):
    """A side that cannot be installed or started; the message is for the person at the terminal."""


@dataclass(frozen=True, slots=True)
class Work:
    """One request of a burst: prompt token ids, how many tokens to return, and the adapter (None: the base)."""

    prompt: list[int]
    output_tokens: int
    adapter: AdapterId | None


@dataclass(frozen=True, slots=True)
class Kit:
    """Every side's input: the base model's folder, PEFT adapter folders, threads, a folder for its files."""

    model: Path
    adapters: dict[AdapterId, Path]
    rank: int
    threads: int
    folder: Path


def peers_folder() -> Path:
    """Where peers are installed: `$XDG_CACHE_HOME/lorakeet/peers`, or `~/.cache/lorakeet/peers`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakeet" / "peers"


class Side(ABC):
    """One system under test, in one configuration."""

    name: ClassVar[str]
    per_request_adapters: ClassVar[bool] = True  # False: it applies what it was started with, whatever a request says

    @abstractmethod
    def missing(self) -> str | None:
        """Why this side cannot run here, or None when it can."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Versions and configuration, for the result file."""

    @abstractmethod
    async def start(self, kit: Kit) -> None:
        """Start and load everything; returns when ready. Raises `SideError`."""

    @abstractmethod
    async def burst(self, works: Sequence[Work]) -> list[Timeline]:
        """Send all at once, wait for all; timelines in the order of `works`."""

    async def extras(self) -> dict[str, Any]:
        """Measurements that make sense for this side alone, taken after the rounds; JSON values."""
        return {}

    @abstractmethod
    async def stop(self) -> None:
        """Stop the side's processes, if there are any."""


@dataclass
class Process:
    """A child process in its own process group, its output in a file."""

    command: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    _child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; its standard output and error go to `log`."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._child = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment,
                start_new_session=True,
            )

    async def wait_for(self, url: str, seconds: float) -> None:
        """Wait until `url` answers 200. Raises `SideError` with the log's end when the process dies or is too slow."""
        end = time.monotonic() + seconds
        async with httpx.AsyncClient(timeout=5) as http:
            while time.monotonic() < end:
                if self._child is None or self._child.poll() is not None:
                    raise SideError(f"{self.command[0]} ended at once:\n{tail(self.log)}")
                with contextlib.suppress(httpx.HTTPError):
                    if (await http.get(url)).status_code == 200:
                        return
                await asyncio.sleep(0.5)
        raise SideError(f"{self.command[0]} was not ready within {seconds:g} s:\n{tail(self.log)}")

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL to the whole group after 10 s."""
        if self._child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self._child.wait, 10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        self._child = None


class ServerSide(Side):
    """A side that is an HTTP server, started as a child process on a free port of the loopback interface."""

    dialect: ClassVar[Dialect] = OPENAI
    ready_path: ClassVar[str] = "/health"
    ready_seconds: ClassVar[float] = 300.0

    def __init__(self) -> None:
        self._process: Process | None = None
        self._client: Client | None = None
        self.url = ""

    @abstractmethod
    def command(self, kit: Kit, port: int) -> tuple[list[str], dict[str, str]]:
        """The command line and the variables to add to the environment."""

    @abstractmethod
    def request(self, work: Work) -> tuple[str, dict[str, Any]]:
        """The model's name and the extra body fields for one request."""

    async def loaded(self, kit: Kit) -> None:
        """Called once the server answers: upload adapters, if that is how it gets them."""
        return

    async def start(self, kit: Kit) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command, environment = self.command(kit, port)
        self._process = Process(command, kit.folder / f"{self.name}.log", environment)
        self._process.start()
        await self._process.wait_for(self.url + self.ready_path, self.ready_seconds)
        self._client = Client(self.url, self.dialect)
        await self.loaded(kit)

    async def burst(self, works: Sequence[Work]) -> list[Timeline]:
        client = self._client
        assert client is not None, "start() comes first"

        async def send(work: Work) -> Timeline:
            model, extra = self.request(work)
            return await client.complete(model, work.prompt, work.output_tokens, **extra)

        timelines = await asyncio.gather(*map(send, works))
        client.read_all()
        return timelines

    async def stop(self) -> None:
        if self._process is not None:
            await self._process.stop()
            self._process = None


def tail(log: Path, size: int = 2000) -> str:
    """The end of a log."""
    return log.read_bytes()[-size:].decode("utf-8", "replace") if log.exists() else ""


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


# --- venvs ---------------------------------------------------------------------------------------------------------


def venv_python(peer: str) -> Path:
    """The interpreter of a peer's own virtual environment, which may not exist."""
    return peers_folder() / peer / "venv" / "bin" / "python"


def make_venv(peer: str) -> Path:
    """Create a peer's virtual environment anew; returns its interpreter."""
    folder = peers_folder() / peer
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run([sys.executable, "-m", "venv", str(folder / "venv")])
    return venv_python(peer)


def run(command: list[str]) -> str:
    """Run an installation step at low priority; returns its output. Raises `SideError` with the output's end."""
    done = subprocess.run(["nice", "-n", "19", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SideError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
    return done.stdout


def package_version(python: Path, package: str) -> str | None:
    """The version of a package in another virtual environment, or None."""
    if not python.exists():
        return None
    script = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([str(python), "-c", script], capture_output=True, text=True)
    return done.stdout.strip() or None
