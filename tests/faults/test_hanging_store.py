"""An object store that accepts requests and never answers: requests that need it fail in time, all others continue."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.storage.remote import RemoteStore
from adapters.storage.store import AdapterStore
from server.http.app import _THREADS
from tests.support.buckets import S3Server
from tests.support.harness import IdleEngine, Site, adapter_files
from tests.support.scripted import BASE, EOS, ScriptedEngine, encode

HANG = ("hang", "", "", 1)
ROW = b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "tiny", "prompt": "Hi"}}'
EXAMPLE = b'{"prompt": "say", "completion": "it is"}\n' * 4


class Hanging(Site):
    """A generating server with everything possible in the store."""

    def open_engine(self) -> IdleEngine:
        return ScriptedEngine(reply=lambda request: [*encode(" fox"), EOS])

    def open_store(self, root: Path) -> AdapterStore:
        assert self.settings.adapter_store is not None
        remote = RemoteStore(self.settings.adapter_store, self.settings.store_request_limits)
        return AdapterStore(root / "store", remote, remote=remote)


@contextlib.asynccontextmanager
async def opened(root: Path, s3: S3Server, url: str, **settings: Any) -> AsyncIterator[Hanging]:
    site = await asyncio.to_thread(Hanging, root, adapter_store=url, served_model_name=BASE, **settings)
    try:
        yield site
    finally:
        await asyncio.to_thread(s3.suffer)
        site.services.text.close()
        await site.services.grammars.close()
        site.close()


async def needing(client: httpx.AsyncClient) -> list[tuple[str, str, dict[str, Any]]]:
    """One request of every kind that needs the store, with its prerequisites made beforehand."""

    async def made(path: str, **options: Any) -> Any:
        response = await client.post(path, **options)
        assert response.status_code in (200, 201), response.text
        return response.json()

    def adapter(name: str, seed: int) -> dict[str, Any]:
        config, weights = adapter_files(seed)
        return {"data": {"name": name}, "files": {"config": ("c", config), "weights": ("w", weights)}}

    def file(purpose: str, content: bytes) -> dict[str, Any]:
        return {"data": {"purpose": purpose}, "files": {"file": ("a.jsonl", content)}}

    await made("/v1/adapters", **adapter("here", 1))
    training, rows = [(await made("/v1/files", **file(*one)))["id"] for one in (("fine-tune", EXAMPLE), ("batch", ROW))]
    await made("/v1/admin/tenants", json={"id": "acme"})
    body = {"input_file_id": rows, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = (await made("/v1/batches", json=body))["id"]
    job = {"model": BASE, "training_file": training}
    return [
        ("POST", "/v1/adapters", adapter("another", 2)),
        ("POST", "/v1/adapters/here/pin", {}),
        ("POST", "/v1/adapters/here/share", {"json": {"tenants": "all"}}),
        ("POST", "/v1/completions", {"json": {"model": "unknown", "prompt": "Hi"}}),
        ("GET", "/v1/adapters/unknown-too", {}),
        ("POST", "/v1/files", file("fine-tune", EXAMPLE)),
        ("GET", "/v1/files/file-unknown", {}),
        ("DELETE", f"/v1/files/{training}", {}),
        ("POST", "/v1/fine_tuning/jobs", {"json": job}),
        ("GET", "/v1/fine_tuning/jobs/ftjob-unknown", {}),
        ("POST", "/v1/batches", {"json": body}),
        ("GET", "/v1/batches/batch_unknown", {}),
        ("POST", f"/v1/batches/{batch}/cancel", {}),
        ("POST", "/v1/admin/tenants", {"json": {"id": "rival"}}),
        ("POST", "/v1/admin/tenants/acme", {"json": {"limits": {"running": 3}}}),
        ("POST", "/v1/admin/keys", {"json": {"roles": ["admin"]}}),
        ("DELETE", "/v1/admin/tenants/acme", {}),
        ("GET", "/v1/usage", {}),
        ("GET", "/v1/admin/audit", {}),
    ]


@pytest.mark.parametrize(
    ("patience", "settings"),
    [
        (15.0, {"store_answer_seconds": 3.0, "store_silent_seconds": 0.5, "store_requests": 40}),
        pytest.param(40.0, {}, marks=pytest.mark.slow),
    ],
)
async def test_requests_that_need_the_store_fail_in_time_and_others_continue(
    tmp_path: Path, s3: S3Server, s3_url: str, patience: float, settings: dict[str, Any]
) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS))  # as in a standalone server
    async with opened(tmp_path, s3, s3_url, **settings) as site, site.client(timeout=None) as client:
        asked = await needing(client)
        await asyncio.to_thread(s3.suffer, HANG)
        began = time.monotonic()

        async def timed(method: str, path: str, options: dict[str, Any]) -> tuple[httpx.Response, float]:
            response = await client.request(method, path, **options)
            return response, time.monotonic() - began

        crowd: list[tuple[str, str, dict[str, Any]]] = [
            ("GET", f"/v1/files/file-{n}", {}) for n in range(100)
        ]  # more than there are threads
        waiting = [asyncio.create_task(timed(*one)) for one in (*asked, *crowd)]
        at_hand = {"completions": 0.0, "lists": 0.0}
        body = {"model": "here", "prompt": "Hi", "max_tokens": 2}
        while not all(task.done() for task in waiting):
            started = time.monotonic()
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            answered = time.monotonic()
            assert (await client.get("/v1/files")).status_code == 200
            at_hand["completions"] = max(at_hand["completions"], answered - started)
            at_hand["lists"] = max(at_hand["lists"], time.monotonic() - answered)
            await asyncio.sleep(0.05)
        took, told = 0.0, {}
        for (method, path, _), task in zip((*asked, *crowd), waiting, strict=True):
            response, seconds = task.result()
            error = response.json().get("error", {})
            named = "object store" in error.get("message", "")
            told[f"{method} {path}"] = response.status_code, error.get("code"), named
            took = max(took, seconds)
        print(f"all were told after {took:.1f} s; what is at hand took at most {at_hand}")
        others = {one: answer for one, answer in told.items() if answer != (503, "adapter_store_unavailable", True)}
        # Between two refreshes only so many unknown ids are looked up; others wait for the next refresh.
        assert {one for one, (status, *_) in others.items() if status != 404 or "/files/file-" not in one} == set()
        assert took < patience
        assert max(at_hand.values()) < 8, "they do not wait for requests that wait for the store"
        await asyncio.to_thread(s3.suffer)
        for method, path, options in asked[:3]:
            async with asyncio.timeout(2 * site.settings.store_silent_seconds + 10):
                while (response := await client.request(method, path, **options)).status_code == 503:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
            assert response.status_code in (200, 201), path
