"""Tenants of an application, and one object of every kind for each."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from server.finetune.evaluation_store import Evaluation
from server.finetune.jobs import JobSpec
from server.tenants.caller import ROLES, Caller, Role
from tests.support.harness import write_adapter
from tests.support.scripted import BASE, Served

Headers = dict[str, str]


async def key(served: Served, tenant: str = "", roles: Sequence[Role] = ROLES, **more: Any) -> Headers:
    """Create a key; return the headers for its requests. The first key of an application is an operator's."""
    tenants = served.services.tenants
    if not tenants.requires_key:
        await asyncio.to_thread(tenants.create_key, "", ["admin"])
    if tenant not in tenants.tenants:
        await asyncio.to_thread(tenants.create_tenant, tenant)
    _, secret = await asyncio.to_thread(tenants.create_key, tenant, roles, **more)
    return {"Authorization": f"Bearer {secret}"}


@dataclass(frozen=True)
class Owned:
    """The ids of a tenant's objects, by kind."""

    adapter: str
    digest: str
    file: str
    batch_file: str
    job: str
    evaluation: str
    batch: str
    response: str
    key: str
    tenant: str


async def furnish(served: Served, directory: Path, tenant: str, adapter: str, headers: Headers) -> Owned:
    """Create one object of every kind. Two tenants' adapters differ."""
    services, tuning = served.services, served.services.tuning
    seed = sum(adapter.encode())
    root = directory / f"of-{tenant}-{adapter}"
    version, _ = await services.registry.publisher.import_directory(tenant, adapter, write_adapter(root, seed))

    def rows() -> tuple[str, str, str, str, str]:
        files = []
        for purpose in ("fine-tune", "batch"):
            with tuning.files.staging() as staging:
                (staging / "upload").write_bytes(b'{"text": "some text"}\n')
                files.append(tuning.files.add(tenant, staging / "upload", filename="a.jsonl", purpose=purpose).id)
        job = tuning.jobs.create(tenant, JobSpec(model=BASE, base=BASE, training_file=files[0], seed=0))
        evaluation = Evaluation(
            id=f"eval-{tenant}{adapter}",
            tenant=tenant,
            status="running",
            created_at=1,
            model=adapter,
            adapter=adapter,
            digest=version.digest,
            file=files[0],
        )
        tuning.evaluations.store.add(evaluation)
        batch = services.batches.store.create(Caller(tenant), "/v1/completions", files[1], None)
        return files[0], files[1], job.id, evaluation.id, batch.id

    file, batch_file, job, evaluation_id, batch_id = await asyncio.to_thread(rows)
    body = {"model": BASE, "input": "Hi"}
    response = await served.client.post("/v1/responses", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return Owned(
        adapter=adapter,
        digest=version.digest.removeprefix("sha256:"),
        file=file,
        batch_file=batch_file,
        job=job,
        evaluation=evaluation_id,
        batch=batch_id,
        response=response.json()["id"],
        key=headers["Authorization"].removeprefix("Bearer ")[: len("lk-01234567")],
        tenant=tenant or "default",
    )


def answer(response: httpx.Response, *names: str) -> tuple[int, str, list[tuple[str, str]]]:
    """The visible parts of a response, with the requested names removed."""
    text = response.text
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, "NAME")
    ignored = {"x-request-id", "request-id", "content-length"}
    headers = [(name, value) for name, value in response.headers.items() if name not in ignored]
    return response.status_code, text, sorted(headers)
