"""The audit log: every change, its author, and the bound on its size."""

import asyncio
import json
from pathlib import Path

from server.http.operations import Operation
from server.tenants.audit import OLD_FILES, AuditLog
from server.tenants.caller import Caller
from tests.support.harness import adapter_files
from tests.support.scripted import serving
from tests.support.tenancy import key


async def test_changes_are_written_down_with_who_and_what(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        operator, acme = await key(served), await key(served, "acme")
        id_ = acme["Authorization"].removeprefix("Bearer ")[:11]
        config, weights = adapter_files(1)
        parts = {"config": ("c", config), "weights": ("w", weights)}
        sent = acme | {"X-Request-Id": "mine"}
        made = await served.client.post("/v1/adapters", data={"name": "law"}, files=parts, headers=sent)
        digest = made.json()["digest"]
        body = {"model": "law", "prompt": "Hi", "max_tokens": 2}
        await served.client.post("/v1/completions", json=body, headers=acme)
        await served.client.get("/v1/adapters", headers=acme)
        await served.client.delete("/v1/adapters/unknown", headers=acme)
        await served.client.post("/v1/adapters/law/pin", headers=acme)
        await served.client.delete("/v1/adapters/law", headers=acme)
        secret = (await served.client.post("/v1/admin/keys", json={}, headers=operator)).json()["secret"]
        seen = (await served.client.get("/v1/admin/audit", headers=acme)).json()["data"]
        found = [(one["action"], one["object"], one["digest"], one["tenant"], one["key"]) for one in seen]
        assert found == [
            ("delete_adapter", "law", digest, "acme", id_),
            ("pin", "law", digest, "acme", id_),
            ("upload_adapter", "law", digest, "acme", id_),
        ]
        assert seen[-1]["request_id"] == "mine"
        page = (await served.client.get("/v1/admin/audit?limit=2", headers=acme)).json()
        rest = (await served.client.get(f"/v1/admin/audit?after={page['last_id']}", headers=acme)).json()
        assert (page["has_more"], rest["has_more"]) == (True, False)
        assert page["data"] + rest["data"] == seen
        everything = (await served.client.get("/v1/admin/audit", headers=operator)).json()["data"]
        assert everything[0]["action"] == "create_key"
        assert everything[0]["object"] == secret[:11]
        assert (await served.client.get("/v1/admin/audit?after=x", headers=acme)).status_code == 400
        lines = (tmp_path / "audit.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in reversed(lines)] == everything
        assert secret not in "".join(lines)


async def test_every_change_has_a_decision(tmp_path: Path) -> None:
    async with serving(tmp_path, lora_dir=tmp_path) as served:
        operations = [route for route in served.app.routes if isinstance(route, Operation)]
    changes = {f"{operation.method} {operation.path}" for operation in operations if operation.changes}
    others = {operation.path for operation in operations if operation.method != "GET" and not operation.changes}
    assert {"POST /v1/adapters", "POST /v1/load_lora_adapter", "DELETE /v1/files/{id}", "POST /v1/batches"} <= changes
    assert all(
        "serve" in operation.roles or "tune" in operation.roles for operation in operations if operation.path in others
    )


async def test_it_is_rotated_by_size(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", 4096)
    for i in range(200):
        await log.record(Caller("acme", "lk-01234567"), "pin", f"a{i}", None, None)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["audit.jsonl", *(f"audit.jsonl.{i}" for i in range(1, OLD_FILES + 1))]
    assert all(path.stat().st_size <= 4096 for path in tmp_path.iterdir())
    entries, more = await asyncio.to_thread(log.page, None, 1000, None)
    assert not more
    assert [entry.object for entry in entries] == [f"a{i}" for i in range(199, 199 - len(entries), -1)]
    assert len(entries) > 50
    with (tmp_path / "audit.jsonl").open("ab") as file:
        file.write(b'{"id": "cut sho')
    assert (await asyncio.to_thread(log.page, None, 1000, None))[0] == entries
