"""The interface of a side in a comparison (install, start, answer a burst of requests, stop), and code shared by sides.

Each system has a module of its own in this package.
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
    """A side that cannot be installed or started; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Work:
    """One request of a burst: prompt token ids, number of tokens to return, and adapter (None: the base)."""

    prompt: list[int]
    output_tokens: int
    adapter: AdapterId | None


@dataclass(frozen=True, slots=True)
class Kit:
    """The input of all sides: the base model's folder, PEFT adapter folders, threads, a folder for files."""

    model: Path
    adapters: dict[AdapterId, Path]
    rank: int
    threads: int
    folder: Path


def peers_folder() -> Path:
    """Return the folder of installed peers: `$XDG_CACHE_HOME/lorakeet/peers`, or `~/.cache/lorakeet/peers`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakeet" / "peers"


class Side(ABC):
    """One system under test, in one configuration."""

    name: ClassVar[str]
    per_request_adapters: ClassVar[bool] = True  # False: adapters are fixed at start

    @abstractmethod
    def missing_reason(self) -> str | None:
        """Return the reason why this side cannot run here, or None if it can."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return versions and configuration, for the result file."""

    @abstractmethod
    async def start(self, kit: Kit) -> None:
        """Start, load everything, and wait until ready. Raises `SideError`."""

    @abstractmethod
    async def burst(self, works: Sequence[Work]) -> list[Timeline]:
        """Send all requests at once and wait for them; return timelines in the order of `works`."""

    async def extras(self) -> dict[str, Any]:
        """Take this side's own measurements, after the rounds; return JSON values."""
        return {}

    @abstractmethod
    async def stop(self) -> None:
        """Stop the side's processes, if any."""


@dataclass
class Process:
    """A child process in its own process group, its output in a file."""

    command: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    _child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; its standard output and error go to `log`."""
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
        """Wait until `url` answers 200. Raises `SideError` with the log's end if the process dies or is too slow."""
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
        """Send SIGTERM, and SIGKILL to the whole group after at most 10 s."""
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
        """Return the command line and additional environment variables."""

    @abstractmethod
    def request(self, work: Work) -> tuple[str, dict[str, Any]]:
        """Return the model's name and additional body fields for one request."""

    async def prepare(self, kit: Kit) -> None:
        """Prepare the server once it answers, such as by uploading adapters."""
        return

    async def start(self, kit: Kit) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command, environment = self.command(kit, port)
        self._process = Process(command, kit.folder / f"{self.name}.log", environment)
        self._process.start()
        await self._process.wait_for(self.url + self.ready_path, self.ready_seconds)
        self._client = Client(self.url, self.dialect)
        await self.prepare(kit)

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
    """Return the end of a log."""
    return log.read_bytes()[-size:].decode("utf-8", "replace") if log.exists() else ""


def free_port() -> int:
    """Return a TCP port that is free at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


# --- virtual environments ------------------------------------------------------------------------------------------


def venv_python(peer: str) -> Path:
    """Return the interpreter of a peer's own virtual environment, which may not exist."""
    return peers_folder() / peer / "venv" / "bin" / "python"


def make_venv(peer: str) -> Path:
    """Create a peer's virtual environment, replacing an existing one; return its interpreter."""
    folder = peers_folder() / peer
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run([sys.executable, "-m", "venv", str(folder / "venv")])
    return venv_python(peer)


def run(command: list[str]) -> str:
    """Run an installation step at low priority; return its output. Raises `SideError` with the output's end."""
    done = subprocess.run(["nice", "-n", "19", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SideError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
    return done.stdout


def package_version(python: Path, package: str) -> str | None:
    """Return the version of a package in another virtual environment, or None."""
    if not python.exists():
        return None
    script = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([str(python), "-c", script], capture_output=True, text=True)
    return done.stdout.strip() or None
