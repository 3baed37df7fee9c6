"""Engine processes forked from a process that has imported their libraries, since imports are most of a start.

`python preloaded.py LISTENER` imports the engine's libraries and forks one engine for each request on the socket. The
process started by the API process requests a fork and then represents the engine: each of the two ends as soon as the
other does, in the same way. The API process, and a test that kills the engine, see no difference.

The same works for helper processes if a test requests it: those that merge and mix need torch. Limits of their memory
and their priority apply to the representing process only.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from typing import NoReturn

PROGRAM = "server.engine.process"
HELPER = "server.children.programs.work"
WATCH_SECONDS = 0.25
MOST = 1 << 20  # maximal bytes of a request: command line and environment


def stand_for_one(address: str) -> NoReturn:
    """Request a fork with this process's arguments, environment and streams; either process ends when the other does.

    Signals SIGUSR1 and SIGUSR2 are forwarded.
    """
    argv = sys.orig_argv[sys.orig_argv.index("-m") + 1 :]
    # The parent's id is an argument of the engine, since the parent may die before this process calls getppid.
    parent = int(argv[1]) if argv[0] == PROGRAM else os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # as the engine does
    order = {"argv": argv, "environ": dict(os.environ), "pid": os.getpid()}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(f"\0{address}")
        socket.send_fds(connection, [json.dumps(order).encode()], [0, 1, 2])
        engine = int(connection.recv(MOST))
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, lambda number, _: os.kill(engine, number))
        connection.settimeout(WATCH_SECONDS)
        while os.getppid() == parent:
            with contextlib.suppress(TimeoutError):
                status = int(connection.recv(MOST) or b"1")
                if status < 0:
                    os.kill(os.getpid(), -status)
                os._exit(status)
    os._exit(1)


def _keep(connection: socket.socket) -> None:
    """Fork the requested engine, and make both processes end together."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    order, streams, *_ = socket.recv_fds(connection, MOST, 3)
    if not order:
        return
    if (engine := os.fork()) == 0:
        connection.close()
        _become(streams, **json.loads(order))
    ended = os.pidfd_open(engine)
    try:
        connection.send(str(engine).encode())
        alone = ended not in select.select([connection.fileno(), ended], [], [])[0]
    except ConnectionError:  # the requesting process was killed at once
        alone = True
    if alone:
        os.kill(engine, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(engine, 0)[1])
    with contextlib.suppress(ConnectionError):
        connection.send(str(status).encode())


def _become(streams: list[int], argv: list[str], environ: dict[str, str], pid: int) -> NoReturn:
    """Become the process that was started with id `pid`."""
    import sitecustomize

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = argv
    if argv[0] == PROGRAM:
        os.getppid = lambda: int(argv[1])  # the child checks whether the parent lives
    sitecustomize.prepare(pid)
    status = 1
    try:
        runpy.run_module(argv[0], run_name="__main__")
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def _serve(listener: socket.socket) -> None:
    """Import, then fork until the parent has ended."""
    parent = os.getppid()
    import sitecustomize
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    import server.engine.boot
    import server.engine.loop
    import server.engine.selfcheck  # noqa: F401

    sitecustomize.make_fail()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the forked processes are not waited for
    listener.settimeout(WATCH_SECONDS)
    while os.getppid() == parent:
        with contextlib.suppress(TimeoutError):
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _keep(connection)
                os._exit(0)
            connection.close()


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
