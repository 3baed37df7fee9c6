"""The engine's socket, connected to another: no message is lost, in any interleaving of sending and receiving."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from server.client.process import _Socket

SECONDS = 30


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path / 'engine.sock'}"


class Taken:
    """Collects received messages; `upto` waits for a number of them."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self._more = asyncio.Event()

    def __call__(self, message: bytes) -> None:
        self.messages.append(message)
        self._more.set()
        if message == b"odd":
            raise ValueError("what is this?")

    async def upto(self, count: int) -> list[bytes]:
        async with asyncio.timeout(SECONDS):
            while len(self.messages) < count:
                self._more.clear()
                await self._more.wait()
        return self.messages


def other_end(context: "zmq.Context[zmq.Socket[bytes]]", address: str) -> "zmq.Socket[bytes]":
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(address)
    return socket


async def test_both_ways_at_once(context: "zmq.Context[zmq.Socket[bytes]]", address: str) -> None:
    """The other end sends its own messages and an echo of each received one."""
    count = 5000
    taken = Taken()
    engine_socket = _Socket(context, address, taken)

    def engine() -> None:
        socket = other_end(context, address)
        socket.send(b"ready")
        for number in range(count):
            socket.send(b"own %d" % number)
            socket.send(socket.recv())
        socket.close(linger=1000)

    thread = threading.Thread(target=engine)
    thread.start()
    await taken.upto(1)
    for number in range(count):
        engine_socket.send(b"%d" % number)
        if number % 7 == 0:
            await asyncio.sleep(0)
    messages = await taken.upto(1 + 2 * count)
    await asyncio.to_thread(thread.join)
    assert [m for m in messages if not m.startswith(b"own")] == [b"ready", *(b"%d" % n for n in range(count))]
    assert [m for m in messages if m.startswith(b"own")] == [b"own %d" % n for n in range(count)]
    engine_socket.close()


async def test_a_message_that_cannot_be_handled_does_not_block_the_next(
    context: "zmq.Context[zmq.Socket[bytes]]", address: str, caplog: pytest.LogCaptureFixture
) -> None:
    taken = Taken()
    engine_socket = _Socket(context, address, taken)
    socket = other_end(context, address)
    for message in (b"a", b"odd", b"b"):
        socket.send(message)
    assert await taken.upto(3) == [b"a", b"odd", b"b"]
    assert "handling a message from the engine failed" in caplog.text
    socket.close()
    engine_socket.close()


async def test_nobody_there_and_closed(context: "zmq.Context[zmq.Socket[bytes]]", address: str) -> None:
    engine_socket = _Socket(context, address, Taken())
    with pytest.raises(zmq.ZMQError):
        engine_socket.send(b"x")
    engine_socket.close()
    engine_socket.close()
    with pytest.raises(zmq.ZMQError):
        engine_socket.send(b"x")
