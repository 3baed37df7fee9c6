"""A ZeroMQ PAIR socket on the event loop: what arrives is handed over at once, message by message.

ZeroMQ's own asyncio sockets make several futures and callbacks of each message. With an engine that reports every few
milliseconds on cores that compute, those were a third of what the API process took.
"""

import asyncio
import logging
from collections.abc import Callable

import zmq

log = logging.getLogger("lorakeet.engine")


class Wire:
    """One end, which the other connects to.

    Args:
        address: where to listen.
        take: called with every message, on the running event loop. What it raises is logged.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", address: str, take: Callable[[bytes], None]) -> None:
        self._take = take
        self._socket = context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self._socket.bind(address)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._receive)

    def send(self, message: bytes) -> None:
        """Hand a message over; never waits. Raises `zmq.ZMQError` when it is closed or nobody is at the other end."""
        self._socket.send(message, zmq.NOBLOCK)
        # The descriptor tells of changes only, and sending may have taken note of one.
        self._loop.call_soon(self._receive)

    def close(self) -> None:
        """Nothing is taken or sent any more. May be called twice."""
        if not self._socket.closed:
            self._loop.remove_reader(self._socket.FD)
            self._socket.close()

    def _receive(self) -> None:
        while not self._socket.closed:
            try:
                message = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._take(message)
            except Exception:  # or those behind it would lie there until another comes
                log.exception("handling a message from the engine failed")
