"""Open and closed loops against a scripted server."""

import pytest

from loadtest.client import Client, Timeline
from loadtest.drive import drive
from loadtest.scenario import Closed, Open
from loadtest.workload import Request
from tests.support import fake_server as fake


async def test_a_closed_loop_keeps_its_concurrency_and_its_order() -> None:
    requests = [Request(0.0, [1] * (i + 1), 2, adapter="a" if i % 2 else None) for i in range(7)]
    ended: list[Timeline] = []
    async with fake.running(lambda body: fake.tokens(body, 0.01)) as server:
        load = Closed(concurrency=3, requests=7)
        run = await drive(Client(server.url), requests, load, base="base", on_end=ended.append)
    assert server.most_running == 3
    assert [t.prompt_tokens for t in run.timelines] == [1, 2, 3, 4, 5, 6, 7]
    assert [t.adapter for t in run.timelines] == [r.adapter for r in requests]
    assert {body["model"] for body in server.bodies} == {"base", "a"}
    assert len(ended) == 7
    assert run.client_cpu > 0


async def test_an_open_loop_sends_by_the_clock_whatever_the_server_does() -> None:
    requests = [Request(0.05 * i, [1], 1, adapter=None) for i in range(4)]
    async with fake.running(lambda body: fake.tokens(body, 0.3)) as server:
        run = await drive(Client(server.url), requests, Open(rate=20, requests=4), base="b", ignore_eos=False)
    assert server.most_running == 4
    assert all("ignore_eos" not in body for body in server.bodies)
    first = run.timelines[0].scheduled
    assert [t.scheduled - first for t in run.timelines] == pytest.approx([0, 0.05, 0.1, 0.15])
    assert all(0 <= t.sent - t.scheduled < 0.2 for t in run.timelines)
    assert all(t.error is None for t in run.timelines)


async def test_errors_do_not_stop_a_run() -> None:
    requests = [Request(0.0, [1] * n, 2, adapter=None) for n in (1, 2, 3)]

    def script(body: dict[str, list[int]]) -> list[bytes | float]:
        return [b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"] if len(body["prompt"]) == 2 else fake.tokens(body)

    async with fake.running(script) as server:
        run = await drive(Client(server.url), requests, Closed(concurrency=1, requests=3), base="b")
    assert [bool(t.error) for t in run.timelines] == [False, True, False]
