"""The console's files, and the API behind it: the table of adapters and the server's last hour."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import history
from server.messages.protocol import AdapterUse, Stats
from server.messages.training import Metrics as StepMetrics
from server.messages.training import TrainingStep
from server.ui import FILES
from tests.support.harness import Site, adapter_files

MOST_BYTES = 200_000


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with contextlib.closing(Site(tmp_path)) as site:
        yield site


async def push(site: Site, *names: str) -> list[str]:
    """Upload an adapter under each name and return their digests."""
    digests = []
    async with site.client() as client:
        for seed, name in enumerate(names):
            config, weights = adapter_files(seed, rank=seed + 1)
            parts = {"config": ("c", config), "weights": ("w", weights)}
            digests.append((await client.post("/v1/adapters", data={"name": name}, files=parts)).json()["digest"])
    return digests


# --- files ------------------------------------------------------------------------------------------


async def test_browsers_are_led_to_the_console_by_relative_links(site: Site) -> None:
    async with site.client() as client:
        for path in ("/", "/ui"):
            answer = await client.get(path, headers={"Accept": "text/html,*/*;q=0.8"})
            assert (answer.status_code, answer.headers["Location"]) == (307, "ui/")
        assert (await client.get("/", headers={"Accept": "application/json"})).status_code == 404
        page = await client.get("/ui/")
    assert page.headers["Content-Type"].startswith("text/html")
    assert "'unsafe" not in page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]


async def test_a_file_is_sent_once(site: Site) -> None:
    async with site.client() as client:
        first = await client.get("/ui/app.js")
        again = await client.get("/ui/app.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_no_ui(tmp_path: Path) -> None:
    with contextlib.closing(Site(tmp_path, ui=False, api_key=("secret",))) as site:
        async with site.client() as client:
            assert {(await client.get(path)).status_code for path in ("/", "/ui", "/ui/", "/ui/app.js")} == {401}


def test_files_are_small_and_name_nothing_elsewhere() -> None:
    assert sum(path.stat().st_size for path in FILES.values()) <= MOST_BYTES
    for path in FILES.values():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://", text), path.name
        assert not re.search(r"""(?:src|href)="/|style="|\son\w+="|innerHTML""", text), path.name
    page = FILES["index.html"].read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*src=)|<style", page)


# --- the table of adapters -------------------------------------------------------------------------


async def test_adapters_are_searched_sorted_and_counted_by_the_server(site: Site) -> None:
    digests = await push(site, "legal/de", "legal/en", "poet")
    for name, digest, tokens in (("legal/en", digests[1], 5), ("poet", digests[2], 2), ("poet", digests[2], 2)):
        site.metrics.request((name, digest)).output(tokens, 10, 0.0)
    site.metrics.add_engine_stats(
        Stats(adapters=[AdapterUse(digests[0], "device", 1), AdapterUse(digests[2], "host", 3)])
    )

    async with site.client() as client:

        async def names(**query: str | int) -> list[str]:
            body = (await client.get("/v1/adapters", params=query)).json()
            return [item["name"] for item in body["data"]]

        assert await names(search="LEGAL") == ["legal/de", "legal/en"]
        assert await names(search=digests[2][10:20]) == ["poet"]
        assert await names(order="desc") == ["poet", "legal/en", "legal/de"]
        assert await names(sort="rank", order="desc") == ["poet", "legal/en", "legal/de"]
        assert await names(sort="requests", order="desc") == ["poet", "legal/en", "legal/de"]
        assert await names(sort="last_used") == ["legal/de", "legal/en", "poet"]
        assert await names(sort="tier") == ["legal/de", "poet", "legal/en"]
        assert await names(sort="tokens", order="desc", limit=1, after="poet") == ["legal/en"]
        assert (await client.get("/v1/adapters?limit=1&search=legal")).json()["total"] == 2
        poet = (await client.get("/v1/adapters/poet")).json()
        refused = await client.get("/v1/adapters?sort=colour")
    assert (poet["tier"], poet["requests"], poet["tokens"]) == ("host", 2, 24)
    assert poet["last_used"] > 0
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "sort")


async def test_use_ends_with_the_name(site: Site) -> None:
    [digest] = await push(site, "poet")
    site.metrics.request(("poet", digest)).output(1, 1, 0.0)
    async with site.client() as client:
        await client.delete("/v1/adapters/poet")
        await push(site, "poet")
        assert (await client.get("/v1/adapters/poet")).json()["requests"] == 0


# --- the last hour ---------------------------------------------------------------------------------


async def test_the_history_has_rates_counts_and_sizes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    [digest] = await push(site, "poet")
    now = 1000.0
    monkeypatch.setattr("server.history.time.time", lambda: now)
    hour = site.services.history
    hour.sample()
    request = site.metrics.request(("poet", digest))
    request.output(10, 20, 0.0)
    request.finish("error")
    site.metrics.request().finish("stop")
    for adapters in (1, 3):
        site.metrics.add_engine_stats(
            Stats(
                running=2,
                kv_usage=0.25,
                state_usage=0.125,
                step_requests=2,
                step_adapters=adapters,
                adapters=[AdapterUse(digest, "device", 1)],
            )
        )
    for job in ("one", "two"):  # two jobs that share the passes of a step of 4 s
        step = TrainingStep(
            id=job,
            metrics=StepMetrics(1),
            total_steps=9,
            learning_rate=1e-3,
            grad_norm=1.0,
            trained_tokens=50,
            seconds=4.0,
            busy_seconds=4.0,
        )
        site.services.tuning.metrics.step(step, 50)
    site.engine.pid = (site.engine.pid or 0) + 1
    now = 1005.0
    hour.sample()
    now = 1010.0
    hour.sample()
    async with site.client() as client:
        whole = (await client.get("/v1/server/history")).json()
        newest = (await client.get("/v1/server/history?after=1005")).json()["samples"]
        receipt = (await client.get("/v1/adapters/poet")).json()
        refused = await client.get("/v1/server/history?after=nan")
    samples = whole["samples"]
    assert samples["time"] == [1000, 1005, 1010]
    assert samples["generation_tokens_per_second"] == [0, 2, 0]
    assert samples["prompt_tokens_per_second"] == [0, 4, 0]
    assert samples["adapters_per_step"] == [None, 2, None]
    assert samples["errors"] == [0, 1, 0]
    assert samples["training_share"] == [0, 1, 0.8]
    assert samples["trained_tokens_per_second"] == [0, 20, 10]
    assert samples["engine_restarts"] == [0, 1, 0]
    assert samples["adapters_on_device"] == [0, 1, 1]
    assert samples["adapter_device_bytes"] == [0, receipt["bytes_on_device"], receipt["bytes_on_device"]]
    assert (samples["requests_running"][-1], samples["kv_usage"][-1], samples["state_usage"][-1]) == (2, 0.25, 0.125)
    assert newest["time"] == [1010]
    assert whole["limits"]["adapter_device_bytes"] > receipt["bytes_on_device"]
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "after")


def test_the_history_is_bounded(site: Site) -> None:
    for _ in range(history.MAX_SAMPLES + 10):
        site.services.history.sample()
    assert len(site.services.history.since(0)["time"]) == history.MAX_SAMPLES
