"""The timed client against a scripted server."""

import re
from typing import Any

import pytest

from loadtest.client import LLAMA, Client, Timeline, server_sent_events
from tests.support import fake_server as fake
from tests.support.fake_server import DONE, event, stream, token, usage


async def ask(script: fake.Script, output_tokens: int = 3, **options: Any) -> tuple[Timeline, fake.FakeServer]:
    async with fake.running(script) as server:
        client = Client(server.url, **options)
        timeline = await client.complete("m", [1, 2], output_tokens, ignore_eos=True)
        client.read_all()
        return timeline, server


async def test_a_stream_is_timed() -> None:
    pause = 0.05
    timeline, server = await ask(lambda body: fake.tokens(body, pause))
    assert timeline.error is None
    assert timeline.text == "t0 t1 t2 "
    assert (timeline.prompt_tokens, timeline.output_tokens) == (2, 3)
    arrivals = [arrival for arrival, _ in timeline.tokens]
    assert [count for _, count in timeline.tokens] == [1, 2, 3]
    gaps = [b - a for a, b in zip([timeline.sent, *arrivals], arrivals, strict=False)]
    assert all(pause * 0.9 <= gap < pause + 0.5 for gap in gaps)
    assert timeline.finished >= arrivals[-1]
    assert server.bodies == [
        {
            "model": "m",
            "prompt": [1, 2],
            "max_tokens": 3,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
    ]


async def test_the_key_is_sent() -> None:
    _, server = await ask(fake.tokens, api_key="secret")
    assert "Authorization: Bearer secret\r\n" in server.heads[0]


async def test_events_may_be_cut_anywhere_and_come_together() -> None:
    a, b = token("a"), token("b") + token("c")
    script = stream(a[:7], 0.02, a[7:] + b[:30], b[30:], usage(2, 3), DONE)
    timeline, _ = await ask(lambda body: script)
    assert timeline.error is None
    assert timeline.text == "abc"


async def test_tokens_are_spread_over_fewer_events() -> None:
    # Six tokens came in three events: a character may consist of several tokens.
    script = stream(token("a"), 0.01, token("b"), 0.01, token("c", "length"), usage(2, 6), DONE)
    timeline, _ = await ask(lambda body: script, output_tokens=6)
    assert [count for _, count in timeline.tokens] == [2, 4, 6]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (stream(token("a"), usage(2, 1), DONE), "1 of 3 tokens"),
        (stream(token("a"), usage(2, 3)), r"without \[DONE\]"),
        (stream(token("a"), event(error={"message": "engine died"})), "engine died"),
        (stream(b"data: {]\n\n"), "DecodeError"),
        (
            [b'HTTP/1.1 404 Not Found\r\nContent-Length: 32\r\n\r\n{"error":{"message":"no model"}}'],
            "HTTP 404: no model",
        ),
        ([b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\nugly"], "HTTP 500: ugly"),
        ([b"nonsense\r\n\r\n"], "not HTTP"),
        (stream(token("a"), token("b"))[:2], "connection closed"),
        ([], "connection closed"),
    ],
)
async def test_every_fault_is_an_error(script: list[bytes | float], message: str) -> None:
    timeline, _ = await ask(lambda body: script)
    assert re.search(message, timeline.error or "")


async def test_a_request_that_never_ends() -> None:
    timeline, _ = await ask(lambda body: stream(token("a"), 2.0), timeout=0.1)
    assert timeline.error == "no end within 0.1 s"


async def test_nobody_listens() -> None:
    async with fake.running() as server:
        url = server.url
    client = Client(url)
    timeline = await client.complete("m", [1], 1)
    client.read_all()
    assert timeline.error


def test_bad_address() -> None:
    with pytest.raises(ValueError, match="ftp"):
        Client("ftp://x")


async def test_llama_servers_dialect() -> None:
    def answer(body: dict[str, Any]) -> list[bytes | float]:
        assert body["n_predict"] == 3
        return stream(
            event(content="a", stop=False, timings={"predicted_n": 1}),
            0.01,
            event(content="bc", stop=False, timings={"predicted_n": 3}),
            event(content="", stop=True, tokens_predicted=3, tokens_evaluated=2, timings={"predicted_n": 3}),
        )

    timeline, _ = await ask(answer, dialect=LLAMA)
    assert timeline.error is None
    assert timeline.text == "abc"
    assert [count for _, count in timeline.tokens] == [1, 3]


def test_an_event_arrives_with_its_last_byte() -> None:
    chunks = [(1.0, b"data: a\n\nda"), (2.0, b"ta: b\n"), (3.0, b"\n: comment\n\ndata:c\r\n\r\n")]
    assert list(server_sent_events(chunks)) == [(1.0, b"a"), (2.0, b"b"), (3.0, b"c")]
