"""Engine processes without their imports, which are most of a start: forked from a process that has them.

`python preloaded.py LISTENER` imports what an engine does, and forks one for each process that asks at the socket. The
process that the API process started asks, and then stands for the engine: each ends as soon as the other does, and in
the same way. Its parent, and a test that kills it, see no difference.

Helper processes, likewise, where a test wants it: those that merge and mix need torch. Limits of their memory and their
priority stay with the process that stands for them.
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
MOST = 1 << 20  # bytes of an order: a command line and an environment


def stand_for_one(address: str) -> NoReturn:
    """Have an engine forked with this process's arguments, environment and streams; end when it ends, and it with this.

    SIGUSR1 and SIGUSR2 reach it, too.
    """
    argv = sys.orig_argv[sys.orig_argv.index("-m") + 1 :]
    # An engine is told who its parent is, which may be killed before this process has looked.
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
    """Fork the engine that is asked for, and see to it that both ends end together."""
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
    except ConnectionError:  # who stood for it was killed at once
        alone = True
    if alone:
        os.kill(engine, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(engine, 0)[1])
    with contextlib.suppress(ConnectionError):
        connection.send(str(status).encode())


def _become(streams: list[int], argv: list[str], environ: dict[str, str], pid: int) -> NoReturn:
    """Be the process that `pid` was started as."""
    import sitecustomize

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = argv
    if argv[0] == PROGRAM:
        os.getppid = lambda: int(argv[1])  # whether the parent lives is for its child to see
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
    """Import, then fork until the parent is gone."""
    parent = os.getppid()
    import sitecustomize
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    import server.engine.boot
    import server.engine.loop
    import server.engine.selfcheck  # noqa: F401

    sitecustomize.make_fail()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a keeper
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
