"""Lorakeet on Ray Serve: routing by adapter, loss of a replica, and scaling without failed requests.

Run by `make ray`, which builds Ray's environment.
"""

import asyncio
import json
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest.client import Client
from loadtest.synthetic import make_adapters
from server.model_source import resolve
from server.settings import Settings
from tests.support.ray_cluster import PYTHON, RayCluster
from tests.support.running import alive, eventually, slowed

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason="needs .venv-ray: run by make ray"),
]
ADAPTERS = [f"adapter-{i}" for i in range(12)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    one = RayCluster(tmp_path_factory.mktemp("ray"))
    yield one
    one.stop()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, str]:
    """Settings: the tiny model, and twelve adapters in a directory shared by all servers."""
    root = tmp_path_factory.mktemp("tiny-on-ray")
    return {
        "LORAKEET_MODEL": str(model_dir),
        "LORAKEET_SERVED_MODEL_NAME": "tiny",
        "LORAKEET_ADAPTER_DIR": str(_adapters(root, model_dir)),
        "LORAKEET_CACHE_DIR": str(root / "cache"),
        "LORAKEET_KV_CACHE_BYTES": "4MiB",
        "LORAKEET_ADAPTER_BYTES": "8MiB",
        "LORAKEET_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


def _adapters(root: Path, model: Path) -> Path:
    folder = root / "adapters"
    folder.mkdir()
    for name, path in zip(ADAPTERS, make_adapters(root, model, len(ADAPTERS), rank=8, dtype="float32"), strict=True):
        shutil.move(path, folder / name)
    return folder


async def _stream(
    client: httpx.AsyncClient, adapter: str, tokens: int, begun: asyncio.Event | None = None
) -> list[Any]:
    """The events of one streamed response; the last is "[DONE]" or an error."""
    wish = {"model": adapter, "prompt": "Once", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    async with client.stream("POST", "/v1/completions", json=wish) as answer:
        assert answer.status_code == 200, await answer.aread()
        body = b""
        async for piece in answer.aiter_bytes():
            body += piece
            if begun is not None:
                begun.set()
    events = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line]
    return ["[DONE]" if event == b"[DONE]" else json.loads(event) for event in events]


def _client(cluster: RayCluster) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=cluster.url, timeout=300, limits=httpx.Limits(max_connections=None))


def _share_at_home(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> float:
    """The share of the requests between two counts that each adapter's busiest replica got."""
    grown = [[n - before[name].get(replica, 0) for replica, n in after[name].items()] for name in ADAPTERS]
    return sum(max(counts) for counts in grown) / sum(map(sum, grown))


async def test_an_adapters_requests_go_to_its_replica(cluster: RayCluster, tiny: dict[str, str]) -> None:
    await asyncio.to_thread(cluster.deploy, {"min_replicas": 2, "max_replicas": 2}, tiny)
    async with _client(cluster) as client:
        for name in ADAPTERS:
            await _stream(client, name, 1)
        before = await asyncio.to_thread(cluster.requests)

        async def work(name: str) -> None:
            for _ in range(25):
                assert (await _stream(client, name, 16))[-1] == "[DONE]"

        async with asyncio.TaskGroup() as group:
            for name in ADAPTERS:
                group.create_task(work(name))
    after = await asyncio.to_thread(cluster.requests)
    share = _share_at_home(before, after)
    homes = {max(after[name], key=lambda replica: after[name][replica]) for name in ADAPTERS}
    print(f"\n{share:.1%} of 300 requests for 12 adapters went to the replica that holds theirs")
    assert share >= 0.95
    assert len(homes) == 2


async def test_a_killed_replica_costs_its_open_streams(cluster: RayCluster, tiny: dict[str, str]) -> None:
    await asyncio.to_thread(cluster.deploy, {"min_replicas": 2, "max_replicas": 2}, tiny)
    before = {one.pid for one in cluster.processes()}
    victim = cluster.processes()[0]
    server = cluster.server_of(victim)
    async with _client(cluster) as client:
        for name in ADAPTERS:
            await _stream(client, name, 1)
        begun = [asyncio.Event() for _ in ADAPTERS]
        with slowed(cluster.fault):  # no answer ends before the kill, however fast the machine
            streams = [
                asyncio.create_task(_stream(client, name, 450, one)) for name, one in zip(ADAPTERS, begun, strict=True)
            ]
            await asyncio.gather(*(one.wait() for one in begun))
            victim.kill()
        died = time.monotonic()
        assert (await _stream(client, "tiny", 4))[-1] == "[DONE]"
        print(f"\na new request was answered {time.monotonic() - died:.2f} s after kill -9")
        for name in ADAPTERS * 2:  # including those of the dead replica
            assert (await _stream(client, name, 4))[-1] == "[DONE]"
        ends = [(await stream)[-1] for stream in streams]
    eventually(lambda: not alive(server.pid), 5, "the end of the dead replica's server")
    broken = [end for end in ends if end != "[DONE]"]
    print(f"{len(broken)} of {len(ends)} streams ended with an error event")
    assert 0 < len(broken) < len(ends)
    assert {end["error"]["type"] for end in broken} == {"service_unavailable"}

    def back() -> bool:
        return cluster.replicas() == 2 and {one.pid for one in cluster.processes()} - before != set()

    await asyncio.to_thread(eventually, back, 180, "its return")
    print(f"two replicas again after {time.monotonic() - died:.0f} s")


async def test_without_a_store_objects_are_found_through_any_replica(
    cluster: RayCluster, tiny: dict[str, str], tmp_path: Path
) -> None:
    """An uploaded adapter, a file and a response are found whichever server receives the request."""
    await asyncio.to_thread(cluster.deploy, {"min_replicas": 2, "max_replicas": 2}, tiny)
    (made,) = make_adapters(tmp_path, Path(tiny["LORAKEET_MODEL"]), 1, rank=4, dtype="float32", seed=7)
    async with _client(cluster) as client:
        files = {
            "config": (made / "adapter_config.json").read_bytes(),
            "weights": (made / "adapter_model.safetensors").read_bytes(),
        }
        answer = await client.post("/v1/adapters", data={"name": "fresh"}, files=files)
        assert answer.status_code == 201, answer.text
        assert answer.headers.get_list("x-request-id") == [answer.headers["x-request-id"]]
        for _ in range(4):
            assert (await _stream(client, "fresh", 4))[-1] == "[DONE]"
        line = json.dumps({"prompt": "a", "completion": "b"}).encode()
        sent = await client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", line)})
        assert sent.status_code == 200, sent.text
        assert (await client.get(f"/v1/files/{sent.json()['id']}/content")).content == line
        kept = await client.post("/v1/responses", json={"model": "fresh", "input": "Hi", "max_output_tokens": 4})
        assert kept.status_code == 200, kept.text
        assert (await client.get(f"/v1/responses/{kept.json()['id']}")).json()["id"] == kept.json()["id"]
        unknown = await client.post("/v1/completions", json={"model": "nobody", "prompt": "a"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        bad = await client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
        assert bad.status_code == 400
        assert (await client.delete("/v1/adapters/fresh")).status_code == 200
        elsewhere = await client.get(f"{cluster.url}//127.0.0.1:1/v1/models")  # a path, not an address
        assert (elsewhere.status_code, elsewhere.json()["error"]["type"]) == (404, "invalid_request_error")


async def test_with_a_store_any_replica_takes_files_jobs_and_batches(
    cluster: RayCluster, tiny: dict[str, str], tmp_path: Path
) -> None:
    """Objects created at one replica are visible at the others."""
    store = {"LORAKEET_ADAPTER_STORE": f"file://{tmp_path}/store"}
    await asyncio.to_thread(cluster.deploy, {"min_replicas": 2, "max_replicas": 2}, tiny | store)
    lines = [json.dumps({"prompt": f"say {n}", "completion": f"it is {n}"}) for n in range(8)]
    asked = {"custom_id": "one", "method": "POST", "url": "/v1/completions"}
    rows = [json.dumps(asked | {"body": {"model": "tiny", "prompt": "Hi", "max_tokens": 4}})]
    async with _client(cluster) as client:

        async def answered(method: str, path: str, **body: Any) -> dict[str, Any]:
            answer = await client.request(method, path, **body)
            assert answer.status_code in (200, 201), answer.text
            found: dict[str, Any] = answer.json()
            return found

        async def until(path: str, status: str) -> dict[str, Any]:
            async with asyncio.timeout(300):
                while (found := await answered("GET", path))["status"] != status:
                    assert found["status"] not in ("failed", "cancelled"), found
                    await asyncio.sleep(0.2)
            return found

        async def upload(purpose: str, content: list[str]) -> str:
            files = {"file": ("a.jsonl", "\n".join(content).encode())}
            return str((await answered("POST", "/v1/files", data={"purpose": purpose}, files=files))["id"])

        training, batch = await upload("fine-tune", lines), await upload("batch", rows)
        for _ in range(6):
            assert (await client.get(f"/v1/files/{training}/content")).text == "\n".join(lines)
        body = {"model": "tiny", "training_file": training, "hyperparameters": {"n_epochs": 1}}
        job = await answered("POST", "/v1/fine_tuning/jobs", json=body)
        body = {"input_file_id": batch, "endpoint": "/v1/completions", "completion_window": "24h"}
        begun = await answered("POST", "/v1/batches", json=body)
        name = (await until(f"/v1/fine_tuning/jobs/{job['id']}", "succeeded"))["fine_tuned_model"]
        for _ in range(4):
            assert (await _stream(client, name, 4))[-1] == "[DONE]"
        done = await until(f"/v1/batches/{begun['id']}", "completed")
        for _ in range(4):
            assert '"one"' in (await client.get(f"/v1/files/{done['output_file_id']}/content")).text
        kept = await answered("POST", "/v1/responses", json={"model": name, "input": "Hi", "max_output_tokens": 4})
        more = {"model": name, "input": "More", "max_output_tokens": 4, "previous_response_id": kept["id"]}
        for _ in range(4):
            assert (await answered("GET", f"/v1/responses/{kept['id']}"))["id"] == kept["id"]
            await answered("POST", "/v1/responses", json=more)
        evaluation = await answered("POST", "/v1/evaluations", json={"model": name, "file": training})
        done = await until(f"/v1/evaluations/{evaluation['id']}", "succeeded")
        for _ in range(4):
            assert (await client.get(f"/v1/files/{done['result_files'][0]}/content")).text.count("\n") == len(lines)
    await asyncio.to_thread(eventually, lambda: cluster.processes("Writer") == [], 120, "the end of the writer")


async def test_a_client_that_leaves_ends_its_request(cluster: RayCluster, tiny: dict[str, str]) -> None:
    async def running() -> float:
        page = (await client.get("/metrics")).text
        lines = [line for line in page.splitlines() if line.startswith("lorakeet:num_requests_running{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    await asyncio.to_thread(cluster.deploy, {"min_replicas": 2, "max_replicas": 2}, tiny)
    body = {"model": ADAPTERS[0], "prompt": "a", "max_tokens": 500, "stream": True, "ignore_eos": True}
    async with _client(cluster) as client:
        with slowed(cluster.fault):  # the response takes at least 25 s
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                await anext(answer.aiter_bytes())
                async with asyncio.timeout(10):
                    while not await running():  # noqa: ASYNC110 - the engine tells of it now and then
                        await asyncio.sleep(0.05)
            async with asyncio.timeout(10):
                while await running():  # noqa: ASYNC110
                    await asyncio.sleep(0.1)


async def test_scaling_out_and_in_fails_no_request(cluster: RayCluster, tiny: dict[str, str]) -> None:
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 4, "metrics_interval_s": 0.5}
    scaling |= {"look_back_period_s": 2, "upscale_delay_s": 1, "downscale_delay_s": 8}
    await asyncio.to_thread(cluster.deploy, scaling, tiny, most=8)
    await asyncio.to_thread(eventually, lambda: cluster.replicas() == 1, 120, "one replica")
    answered = 0

    async def work(until: asyncio.Event, number: int) -> None:
        nonlocal answered
        async with _client(cluster) as client:
            while not until.is_set():
                assert (await _stream(client, ADAPTERS[number % 12], 32))[-1] == "[DONE]"
                answered += 1

    async def replicas(count: int, seconds: float) -> None:
        async with asyncio.timeout(seconds):
            while await asyncio.to_thread(cluster.replicas) != count:  # noqa: ASYNC110
                await asyncio.sleep(0.5)

    busy, all_day = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for number in range(16):
            group.create_task(work(busy, number))
        group.create_task(work(all_day, 0))  # some requests continue while a replica is removed
        await replicas(2, 400)
        await asyncio.sleep(5)
        shares = Counter[str]()
        for counts in (await asyncio.to_thread(cluster.requests)).values():
            shares.update({replica: int(count) for replica, count in counts.items()})
        busy.set()
        await replicas(1, 400)
        all_day.set()
    print(f"\nscaled 1 -> 2 -> 1 under {answered} requests, none failed")
    assert answered > 50
    assert sorted(shares.values())[-2] > 10  # the second replica got requests


async def test_the_way_through_ray_costs_little(cluster: RayCluster, tmp_path: Path) -> None:
    """Eight streams of the default model, alternately through Ray and directly from the replica's server.

    The machine may be busy with other work, so only adjacent runs are compared.
    """
    settings = Settings()
    model = await asyncio.to_thread(resolve, settings.model, settings.cache_dir, print)
    told = {"LORAKEET_MODEL": str(model), "LORAKEET_ADAPTER_DIR": str(_adapters(tmp_path, model))}
    told |= {"LORAKEET_DATA_DIR": str(tmp_path / "data")}
    await asyncio.to_thread(cluster.deploy, {"min_replicas": 1, "max_replicas": 1}, told)
    await asyncio.to_thread(eventually, lambda: len(cluster.processes()) == 1, 120, "the end of the others")
    straight = f"http://127.0.0.1:{cluster.server_of(cluster.processes()[0]).environ()['LORAKEET_PORT']}"
    ways = {"straight": Client(straight), "Ray": Client(cluster.url)}
    names = ADAPTERS[:8]
    first: dict[str, list[float]] = {way: [] for way in ways}
    speed: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(9):  # the first warms up
        for i, name in enumerate(names):  # one at a time for the time to first token
            for way, client in ways.items():
                one = await client.complete(name, [turn * 16 + i + 5] * 16, 2)
                client.read_all()
                assert not one.error, one.error
                if turn:
                    first[way].append((one.tokens[0][0] - one.sent) * 1e3)
        for way, client in ways.items():  # eight at once for the throughput
            together = await asyncio.gather(
                *(client.complete(name, [turn * 16 + i + 9] * 16, 96, ignore_eos=True) for i, name in enumerate(names))
            )
            client.read_all()
            assert [one.error for one in together if one.error] == []
            if turn:
                begun = min(one.tokens[0][0] for one in together)
                tokens = sum(one.output_tokens for one in together)
                speed[way].append(tokens / (max(one.finished for one in together) - begun))
    added = statistics.median(b - a for a, b in zip(first["straight"], first["Ray"], strict=True))
    slower = 1 - statistics.median(b / a for a, b in zip(speed["straight"], speed["Ray"], strict=True))
    print(f"\nTTFT: {statistics.median(first['straight']):.1f} ms straight, {added:+.1f} ms through Ray")
    print(f"eight streams: {statistics.median(speed['straight']):.0f} tokens/s straight, {-slower:+.1%} through Ray")
    assert added <= 15
    assert slower <= 0.10
