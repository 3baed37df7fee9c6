"""`python -m tests.ui.measure`: the cost of the console, in ratios of interleaved rounds.

    --url URL --pid PID    a running server with a real model, and the pid of its API process

First paint is measured with 10,000 registered adapters, on a separate server without an engine.
"""

import contextlib
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import typer
import uvicorn
from playwright.sync_api import Browser, Page

from tests.server.http.test_many_adapters import MANY, registered
from tests.ui.browser import Console, chromium

ROUNDS = 5
TOKENS = 200


def main(
    url: Annotated[str, typer.Option(help="A server with a real model. It is asked for some thousands of tokens.")],
    pid: Annotated[int, typer.Option(help="Its API process.")],
) -> None:
    with chromium() as browser:
        paints = _first_paints(browser)
        print(f"rows of {MANY} adapters after {statistics.median(paints):.2f} s (median; worst {max(paints):.2f} s)")
        base = httpx.get(f"{url}/v1/models?limit=1").json()["data"][0]["id"]
        page, plain = _columns(browser, url, pid, base)
        print(
            f"API, 4 streams of {TOKENS} tokens: {page:.2f} s of CPU as columns, {plain:.2f} s as plain ones: "
            f"{page / plain:.2f}x"
        )
        with_page, without = _decode(browser, url, base)
        print(
            f"8 streams: {with_page:.0f} tokens/s with the page open, {without:.0f} without: {with_page / without:.3f}x"
        )


@contextlib.contextmanager
def _many_adapters() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as root, contextlib.closing(registered(Path(root) / "site", MANY)) as site:
        server = uvicorn.Server(uvicorn.Config(site.app(), port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join()


def _first_paints(browser: Browser) -> list[float]:
    """Seconds from the request for the page until the table's rows are shown, with a cold cache each time."""
    taken = []
    with _many_adapters() as url:
        for _ in range(ROUNDS):
            console = Console(browser, url)
            began = time.perf_counter()
            console.page.goto(console.root)
            console.page.get_by_role("row").nth(50).wait_for()
            taken.append(time.perf_counter() - began)
            console.context.close()
    return taken


def _body(base: str) -> dict[str, object]:
    message = {"role": "user", "content": "Tell me about parrots."}
    return {"model": base, "messages": [message], "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}


def _stream(url: str, base: str) -> float:
    """Tokens per second of decoding of one stream, read to its end like curl."""
    body = _body(base) | {"stream": True, "stream_options": {"include_usage": True}}
    times = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=600) as answer:
        times = [time.perf_counter() for line in answer.iter_lines() if line.startswith("data: {")]
    return (TOKENS - 1) / (times[-1] - times[0])


def _columns(browser: Browser, url: str, pid: int, base: str) -> tuple[float, float]:
    """Median CPU seconds of the API process for four columns, and for four plain streams of the same request."""
    api = psutil.Process(pid)

    def cpu() -> float:
        times = api.cpu_times()
        return float(times.user + times.system)

    columns, plain = [], []
    console = Console(browser, url)
    page = console.open("&".join([f"playground?max_tokens={TOKENS}&temperature=0", *[f"m={base}"] * 4]))
    _with_ignored_eos(page)
    for _ in range(ROUNDS):
        before = cpu()
        page.get_by_role("textbox", name="Prompt", exact=True).fill("Tell me about parrots.")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Stop").wait_for()
        page.get_by_role("button", name="Send").wait_for(timeout=600_000)
        columns.append(cpu() - before)
        page.get_by_role("button", name="New conversation").click()
        before = cpu()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: _stream(url, base), range(4)))
        plain.append(cpu() - before)
    console.context.close()
    return statistics.median(columns), statistics.median(plain)


def _with_ignored_eos(page: Page) -> None:
    """Set `ignore_eos` in the page's requests, so that both sides get the same number of tokens."""

    def longer(route: object) -> None:
        body = json.loads(route.request.post_data) | {"ignore_eos": True}  # type: ignore[attr-defined]
        route.continue_(post_data=json.dumps(body))  # type: ignore[attr-defined]

    page.route("**/v1/chat/completions", longer)


def _decode(browser: Browser, url: str, base: str) -> tuple[float, float]:
    """Median tokens/s of eight streams together, with the server's view open and without."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * ROUNDS):
        shown = turn % 2 == 0
        console = Console(browser, url) if shown else None
        if console is not None:
            console.open("server")
        with ThreadPoolExecutor(8) as pool:
            rates[shown].append(sum(pool.map(lambda _: _stream(url, base), range(8))))
        if console is not None:
            console.context.close()
    return statistics.median(rates[True]), statistics.median(rates[False])


if __name__ == "__main__":
    typer.run(main)
