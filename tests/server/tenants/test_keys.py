"""Keys: created, shown once, with roles and adapters, expired, revoked."""

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from server.http.middleware import OPEN_PATHS
from server.http.operations import Operation
from server.tenants.caller import OPERATOR, ROLES, Role
from server.tenants.database import open_database
from server.tenants.keys import Tenants
from tests.support.publishing import held
from tests.support.scripted import BASE, Served, serving
from tests.support.tenancy import furnish, key


async def made(served: Served, headers: dict[str, str] | None = None, **body: Any) -> dict[str, Any]:
    response = await served.client.post("/v1/admin/keys", json=body, headers=headers)
    assert response.status_code == 201, response.text
    answer: dict[str, Any] = response.json()
    return answer


def bearer(made_key: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {made_key['secret']}"}


async def test_the_first_key_closes_the_server_and_is_its_operators(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        assert (await served.client.get("/v1/models")).status_code == 200
        for body in ({"roles": ["serve"]}, {"roles": ["admin"], "expires_in_days": 1.0}):
            refused = await served.client.post("/v1/admin/keys", json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "first_key")
        operator = bearer(await made(served, roles=["admin"]))
        assert (await served.client.get("/v1/models")).status_code == 401
        for path in ("/v1/models", "/v1/server/history", "/metrics", "/v1/admin/tenants"):
            assert (await served.client.get(path, headers=operator)).status_code == 200
        assert (await served.client.get("/metrics")).status_code == 200, "with one tenant, metrics stay public"
        created = await served.client.post("/v1/admin/tenants", json={"id": "acme"}, headers=operator)
        assert created.status_code == 201
        assert (await served.client.get("/metrics")).status_code == 401
        acme = await made(served, operator, tenant="acme", roles=["admin"])
        assert (await served.client.get("/metrics", headers=bearer(acme))).status_code == 403
        assert (await served.client.get("/metrics", headers=operator)).status_code == 200


async def test_a_secret_is_shown_once_and_kept_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(tmp_path) as served:
        key_ = await made(served, roles=["admin"], name="mine")
        operator, secret = bearer(key_), key_["secret"]
        assert secret.startswith(f"{key_['id']}-")
        assert len(secret) > 50
        tail = secret.removeprefix(key_["id"])
        answers = [
            await served.client.get("/v1/admin/keys", headers=operator),
            await served.client.get(f"/v1/admin/keys/{key_['id']}", headers=operator),
            await served.client.get("/v1/models", headers={"Authorization": f"Bearer {secret}x"}),
            await served.client.get("/v1/models", headers={"Authorization": f"Basic {secret}"}),
            await served.client.get("/nowhere", headers=operator),
            await served.client.post("/v1/completions", content=b"{", headers=operator),
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 401, 401, 404, 415]
        for answer in answers:
            assert tail not in answer.text
        assert tail not in caplog.text
        await asyncio.to_thread(served.services.tenants._flush)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or tail.encode() not in path.read_bytes(), path


async def test_expired_and_revoked_keys_open_nothing_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as served:
        first = await made(served, roles=["admin"])
        operator = bearer(first)
        short, long = await made(served, operator, expires_in_days=0.5), await made(served, operator)
        assert short["expires_at"] - time.time() <= 43_200
        assert (await served.client.get("/v1/models", headers=bearer(short))).status_code == 200
        monkeypatch.setattr("time.time", lambda: short["expires_at"] - 1)
        assert (await served.client.get("/v1/models", headers=bearer(short))).status_code == 200
        monkeypatch.setattr("time.time", lambda: short["expires_at"])
        assert (await served.client.get("/v1/models", headers=bearer(short))).status_code == 401
        assert (await served.client.get("/v1/models", headers=bearer(long))).status_code == 200
        revoked = await served.client.delete(f"/v1/admin/keys/{long['id']}", headers=operator)
        assert revoked.json()["revoked_at"] is not None
        assert (await served.client.get("/v1/models", headers=bearer(long))).status_code == 401
        last = await served.client.delete(f"/v1/admin/keys/{first['id']}", headers=operator)
        assert (last.status_code, last.json()["error"]["code"]) == (409, "last_key")
        second = await made(served, operator, roles=["admin"])
        assert (await served.client.delete(f"/v1/admin/keys/{first['id']}", headers=operator)).status_code == 200
        assert (await served.client.get("/v1/models", headers=operator)).status_code == 401
        assert (await served.client.get("/v1/models", headers=bearer(second))).status_code == 200


async def test_last_uses_outlive_a_database_that_somebody_holds(tmp_path: Path) -> None:
    async with serving(tmp_path, database_seconds=0.1) as served:
        operator, tenants = await key(served), served.services.tenants
        assert (await served.client.get("/v1/models", headers=operator)).status_code == 200
        with held(tmp_path / "tenants.db"):
            await asyncio.to_thread(tenants._flush)
        assert not any(known.last_used_at for known in tenants.keys.values())
        await asyncio.to_thread(tenants._flush)
        assert any(known.last_used_at for known in tenants.keys.values())


async def test_a_restart_knows_keys_tenants_and_last_uses(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        operator = await key(served)
        acme = await key(served, "acme", ["serve"], adapters=["one"])
        assert (await served.client.get("/v1/models", headers=acme)).status_code == 200
        tenants = served.services.tenants
        await asyncio.to_thread(tenants._flush)
        again = Tenants(await asyncio.to_thread(open_database, tmp_path / "tenants.db"))
        await again.start()
        assert again.tenants == tenants.tenants
        assert again.keys == tenants.keys
        assert again.requires_key
        for headers in (operator, acme):
            secret = headers["Authorization"].removeprefix("Bearer ").encode()
            assert again.find(secret) == tenants.find(secret) is not None
        [used] = [one for one in again.keys.values() if one.tenant == "acme"]
        assert used.last_used_at is not None


async def test_the_command_lines_key_stays_an_admin_of_the_default_tenant(tmp_path: Path) -> None:
    async with serving(tmp_path, api_key=("sk-1", "sk-2")) as served:
        operator = {"Authorization": "Bearer sk-2"}
        other = await made(served, operator, roles=["serve"])
        assert (await served.client.get("/v1/server/history", headers=operator)).status_code == 200
        assert (await served.client.get("/v1/server/history", headers=bearer(other))).status_code == 403
        only = await made(served, operator, roles=["admin"])
        gone = await served.client.delete(f"/v1/admin/keys/{only['id']}", headers=operator)
        assert gone.status_code == 200, "the command line's key remains"


async def test_a_tenants_admin_sees_its_own_keys_only(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        operator, acme, rival = await key(served), await key(served, "acme"), await key(served, "rival")
        seen = (await served.client.get("/v1/admin/keys", headers=acme)).json()["data"]
        assert [one["tenant"] for one in seen] == ["acme"]
        assert len((await served.client.get("/v1/admin/keys", headers=operator)).json()["data"]) == 4
        found = await served.client.get("/v1/admin/keys?tenant=acme", headers=operator)
        assert [one["id"] for one in found.json()["data"]] == [seen[0]["id"]]
        assert (await served.client.get("/v1/admin/keys?tenant=acme", headers=rival)).status_code == 404
        assert (await served.client.delete(f"/v1/admin/keys/{seen[0]['id']}", headers=rival)).status_code == 404
        assert (await served.client.post("/v1/admin/tenants", json={"id": "new"}, headers=acme)).status_code == 403
        mine = await made(served, acme, roles=["serve"])
        assert mine["tenant"] == "acme"
        refused = await served.client.post("/v1/admin/keys", json={"tenant": "default"}, headers=acme)
        assert refused.status_code == 404
        page = (await served.client.get("/v1/admin/keys?limit=1", headers=acme)).json()
        assert page["has_more"] is True
        rest = (await served.client.get(f"/v1/admin/keys?after={page['last_id']}", headers=acme)).json()
        assert {one["id"] for one in page["data"] + rest["data"]} == {seen[0]["id"], mine["id"]}


async def test_a_tenant_goes_with_its_keys_once_it_has_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        operator, acme = await key(served), await key(served, "acme")
        owned = await furnish(served, tmp_path, "acme", "one", acme)
        delete = "/v1/admin/tenants/acme"
        refused = await served.client.delete(delete, headers=operator)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "tenant_not_empty")
        await served.client.delete("/v1/adapters/one", headers=acme)
        assert (await served.client.delete(delete, headers=operator)).status_code == 409
        for file in (owned.file, owned.batch_file):
            await served.client.delete(f"/v1/files/{file}", headers=acme)
        assert (await served.client.delete(delete, headers=operator)).status_code == 200
        assert (await served.client.get("/v1/models", headers=acme)).status_code == 401
        assert (await served.client.delete("/v1/admin/tenants/default", headers=operator)).status_code == 409
        for id_ in ("default", "Acme", "-a", "a/b", "a_b", "a" * 65):
            assert (
                await served.client.post("/v1/admin/tenants", json={"id": id_}, headers=operator)
            ).status_code == 400
        assert (await served.client.post("/v1/admin/tenants", json={"id": "a"}, headers=operator)).status_code == 201
        again = await served.client.post("/v1/admin/tenants", json={"id": "a"}, headers=operator)
        assert (again.status_code, again.json()["error"]["code"]) == (409, "tenant_exists")
        listed = await served.client.get("/v1/admin/tenants", headers=operator)
        assert [one["id"] for one in listed.json()["data"]] == ["default", "a"]


@pytest.mark.parametrize("role", ROLES)
async def test_a_key_does_what_its_role_allows_and_nothing_else(tmp_path: Path, role: Role) -> None:
    async with serving(tmp_path, lora_dir=tmp_path) as served:
        headers = await key(served, "acme", [role])
        refused = set()
        operations = [route for route in served.app.routes if isinstance(route, Operation)]
        for operation in operations:
            if operation.path in OPEN_PATHS - {"/metrics"}:
                continue
            path = operation.path.replace("{name:path}", "x").replace("{id:path}", "x").replace("{id}", "x")
            response = await served.client.request(operation.method, path.replace("{file}", "x"), headers=headers)
            name = f"{operation.method} {operation.path}"
            allowed = role in operation.roles or (role == "admin" and operation.roles != {OPERATOR})
            assert (response.status_code == 403) != allowed, f"{name}: {response.text}"
            if not allowed:
                refused.add(name)
                if "/v1/messages" not in path:
                    assert response.json()["error"]["code"] == "permission_denied"
        assert "GET /v1/server/history" in refused
        assert ("POST /v1/fine_tuning/jobs" in refused) == (role in ("serve", "upload"))


async def test_a_bound_key_has_no_other_adapters(tmp_path: Path) -> None:
    async with serving(tmp_path, lora_dir=tmp_path) as served:
        free = await key(served, "acme")
        for name in ("one", "two"):
            owned = await furnish(served, tmp_path, "acme", name, free)
        bound = await key(served, "acme", ["serve", "upload", "tune"], adapters=["one"])

        async def status(verb: str, path: str, **json: Any) -> int:
            sent: dict[str, Any] = {"json": json} if json else {}
            return (await served.client.request(verb, path, headers=bound, **sent)).status_code

        asked: dict[str, Any] = {"prompt": "Hi", "max_tokens": 2}
        assert await status("POST", "/v1/completions", model="one", **asked) == 200
        assert await status("POST", "/v1/completions", model=BASE, **asked) == 200
        for model in ("two", f"two@{owned.digest}"):
            assert await status("POST", "/v1/completions", model=model, **asked) == 404
        assert await status("POST", "/v1/completions", model=BASE, adapters=[{"id": "two"}], **asked) == 404
        mix = [{"adapter": "one"}, {"adapter": "two"}]
        assert await status("POST", "/v1/adapters", name="one", mix=mix, method="cat") == 404
        assert await status("POST", "/v1/adapters", name="three", mix=mix[:1], method="cat") == 404
        assert await status("POST", "/v1/load_lora_adapter", lora_name="two", lora_path="of-acme-one") == 404
        for method, path in [
            ("GET", "/v1/adapters/two"),
            ("GET", "/v1/models/two"),
            ("DELETE", "/v1/models/two"),
            ("DELETE", "/v1/adapters/two"),
            ("POST", "/v1/adapters/two/pin"),
            ("POST", "/v1/adapters/two/warm"),
        ]:
            assert await status(method, path) == 404, path
        models = (await served.client.get("/v1/models", headers=bound)).json()["data"]
        assert [model["id"] for model in models] == [BASE, "one"]
        adapters = (await served.client.get("/v1/adapters", headers=bound)).json()["data"]
        assert [adapter["name"] for adapter in adapters] == ["one"]
        body = {"input_file_id": owned.batch_file, "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = (await served.client.post("/v1/batches", json=body, headers=bound)).json()
        kept = await asyncio.to_thread(served.services.batches.store.get, "acme", batch["id"])
        assert kept.caller.tenant == "acme"
        assert kept.caller.sees("one")
        assert not kept.caller.sees("two")
        await served.services.batches.stop()
        refused = await served.client.post(
            "/v1/admin/keys", json={"roles": ["admin"], "adapters": ["one"]}, headers=free
        )
        assert refused.status_code == 400


def test_a_damaged_database_lets_nobody_in(tmp_path: Path) -> None:
    from server.data_dir import as_setting_error
    from server.settings import SettingError

    (tmp_path / "tenants.db").write_bytes(b"not a database" * 100)
    with pytest.raises(SettingError, match=r"tenants\.db is damaged"), as_setting_error():
        open_database(tmp_path / "tenants.db")
