"""One `lorakeet serve` as a child process on a loopback port; it never outlives its parent process.

As a program, `lorakeet_child.py PARENT COMMAND...` executes the command, unless the process PARENT has ended.
"""

import ctypes
import fcntl
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def command(environment: Mapping[str, str]) -> list[str]:
    """The server's command: LORAKEET_RAY_COMMAND, or the `lorakeet` of this environment."""
    given = environment.get("LORAKEET_RAY_COMMAND")
    return shlex.split(given) if given else [str(Path(sys.executable).with_name("lorakeet")), "serve"]


def data_root(environment: Mapping[str, str]) -> Path:
    """The parent of all servers' data directories."""
    home = environment.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(environment.get("LORAKEET_DATA_DIR") or f"{home}/lorakeet").expanduser() / "ray"


def take_directory(parent: Path, name: str, most: int = 10_000) -> tuple[Path, int]:
    """The first unused directory of `NAME-0`, `NAME-1` ..., and the lock on it.

    A restarted server thus finds its predecessor's data. The lock is held by every process with the file open.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(most):
        lock = os.open(parent / f"{name}-{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        return parent / f"{name}-{number}", lock
    raise RuntimeError(f"all of {most} directories {name}-* under {parent} are in use")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Child:
    """A running command, with the output streams of this process."""

    def __init__(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        ended: Callable[[int], None],
        lock: int | None = None,
    ) -> None:
        """`ended` is called, in a thread, with the exit status of a command that ends without `stop`."""
        self._stopping = False
        self._ended = ended
        self._words = [sys.executable, __file__, str(os.getpid()), *words]
        self._environment = dict(environment)
        self._lock = () if lock is None else (lock,)
        self._process: subprocess.Popen[bytes] | None = None
        self._failure: OSError | None = None
        started = threading.Event()
        # The kernel sends the signal when the *thread* that started the child ends, so this thread only waits.
        threading.Thread(target=self._keep, args=(started,), name="lorakeet-child", daemon=True).start()
        started.wait()
        if self._failure:
            raise self._failure

    def _keep(self, started: threading.Event) -> None:
        try:
            self._process = subprocess.Popen(
                self._words, env=self._environment, stdin=subprocess.DEVNULL, pass_fds=self._lock
            )
        except OSError as exc:
            self._failure = exc
            return
        finally:
            started.set()
        status = self._process.wait()
        if not self._stopping:
            self._ended(status)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self, seconds: float) -> None:
        """Send SIGTERM, which drains; after this many seconds SIGKILL."""
        assert self._process is not None
        self._stopping = True
        self._process.terminate()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _become(parent: int, words: Sequence[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:  # else the parent ended before the prctl call
        os.execvp(words[0], list(words))


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
