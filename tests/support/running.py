"""A real server: its own process, its own engine process, a real socket."""

import atexit
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psutil

BASE = "tiny"
START_SECONDS = 300.0  # importing the libraries on a busy machine takes most of it
# Parts of the server, recognised by a word of a process's command line.
PARTS = {"API": "server.cli", "engine": "server.engine.process", "checker": "server.children.programs.work"}
REPOSITORY = Path(__file__).parent.parent.parent
INJECT = Path(__file__).parent / "inject"
PATH = os.pathsep.join([str(INJECT), str(REPOSITORY)])  # for every server: `sitecustomize` is imported first


def eventually(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait up to `seconds` for a true value of `condition`; return it."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)  # polling uses the processor too
    return value


def alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


@cache
def _preloaded() -> str:
    """The address of a process that forks engines, which lives as long as this process."""
    address = f"lorakeet-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{address}")
        listener.listen()
        command = [sys.executable, str(INJECT / "preloaded.py"), str(listener.fileno())]
        process = subprocess.Popen(
            command, env=_environment(), stdin=subprocess.DEVNULL, pass_fds=[listener.fileno()], start_new_session=True
        )
    atexit.register(process.wait)  # runs before handlers registered earlier
    atexit.register(process.kill)
    return address


def _environment() -> dict[str, str]:
    """The environment of servers and of the forking process."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LORAKEET_")}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    return environment | {"PYTHONPATH": PATH}


def forking() -> dict[str, str]:
    """Environment variables that make a process fork its engines; none on a GPU, which forbids it."""
    return {} if Path("/dev/nvidiactl").exists() else {"PYTHONPATH": PATH, "PRELOADED": _preloaded()}


def free_port() -> int:
    """A free TCP port for a server started later, perhaps repeatedly: outside the range of outgoing connections."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    low = int(given.read_text().split()[0]) if given.exists() else 32_768
    ports = range(12_000, low) or range(12_000, 32_768)
    while True:
        port = secrets.choice(ports)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def slowed(fault: Path, work: str = "") -> Iterator[None]:
    """Make each step of engines with this FAULT_FILE slow, so that work can be observed before it ends.

    With `work` "training ", each layer in training. A fault written in the meantime ends the slowdown.
    """
    with _meanwhile(fault, f"{work}slow"):
        yield


@contextmanager
def _meanwhile(fault: Path, kind: str) -> Iterator[None]:
    fault.write_text(kind)
    try:
        yield
    finally:
        if fault.exists() and fault.read_text() == kind:
            fault.unlink()


class RunningServer:
    """`lorakeet serve` over a directory. Survives its own crashes: `ensure` restarts it.

    Its engines are forked from a process that has imported their libraries, unless `forks` is False.
    """

    def __init__(self, model: Path, root: Path, data_dir: Path, *flags: str, forks: bool = True) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.root = root
        self._forks = forks
        self.data_dir = data_dir
        self._log = root / "server.log"
        self.fault = root / "fault"  # to inject a fault, write a kind of `inject.sitecustomize` to it
        self._command = [
            *(sys.executable, "-c", "from server.cli import main; main()", "serve"),
            *("--model", str(model), "--served-model-name", BASE, "--port", str(self.port)),
            *("--data-dir", str(data_dir), "--cache-dir", str(root / "cache")),
            *("--threads", "1", "--kv-cache-bytes", "4MiB", "--adapter-bytes", "4MiB", *flags),
        ]
        self._visits = root / "visits"
        self._visits.mkdir()
        self._process: subprocess.Popen[bytes] | None = None

    def ensure(self) -> None:
        """Start it if it is not running, and wait until it is ready."""
        self.begin()
        self.wait_ready()

    def begin(self) -> None:
        """Start it if it is not running."""
        if self._process is None or self._process.poll() is not None:
            environment = _environment() | {"FAULT_FILE": str(self.fault), "VISITS": str(self._visits)}
            if self._forks:
                environment |= forking()
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command, cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_ready(self, seconds: float = START_SECONDS) -> dict[str, Any]:
        """Wait until `/ready` gives 200; return its body."""

        def ready() -> dict[str, Any] | None:
            assert self.process.poll() is None, f"the server ended:\n{self.log[-4000:]}"
            try:
                response = httpx.get(f"{self.url}/ready", timeout=5)
            except httpx.TransportError:
                return None
            return response.json() if response.status_code == 200 else None

        body: dict[str, Any] = eventually(ready, seconds, f"ready\n{self.log[-4000:]}")
        return body

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=180)

    def delete(self, path: str) -> httpx.Response:
        return httpx.delete(f"{self.url}{path}", timeout=180)

    @property
    def engine_pid(self) -> int:
        pid = self.get("/ready").json()["engine_pid"]
        assert isinstance(pid, int)
        return pid

    def metric(self, name: str, **labels: str) -> float:
        """The first sample of the metrics page with these labels, or 0."""
        for line in self.get("/metrics").text.splitlines():
            named = line.startswith((f"lorakeet:{name} ", f"lorakeet:{name}{{"))
            if named and all(f'{key}="{value}"' in line for key, value in labels.items()):
                return float(line.rpartition(" ")[2])
        return 0.0

    def files_entered(self, work: Callable[[], object]) -> dict[str, set[str]]:
        """The product's files whose functions are entered while `work` runs, by part: API, engine, checker."""
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        lines = {process.pid: " ".join(process.cmdline()) for process in family}
        parts = {name: pid for name, word in PARTS.items() for pid, line in lines.items() if word in line}
        for answer in self._visits.iterdir():
            answer.unlink()
        found = {}
        for ending, number in (("begun", signal.SIGUSR1), ("files", signal.SIGUSR2)):
            for pid in parts.values():
                os.kill(pid, number)
            for name, pid in parts.items():
                answer = self._visits / f"{pid}.{ending}"
                eventually(answer.exists, 180, f"an answer of the {name} process")
                found[name] = set(answer.read_text().split())
            if ending == "begun":
                work()
        return found

    def slowed(self, work: str = "") -> AbstractContextManager[None]:
        """The function `slowed` for this server."""
        return slowed(self.fault, work)

    def held(self) -> AbstractContextManager[None]:
        """Start no step of the engine while the context lasts."""
        return _meanwhile(self.fault, "held")

    def kill(self) -> None:
        """Send SIGKILL to the API process."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """Stop it in any state."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
