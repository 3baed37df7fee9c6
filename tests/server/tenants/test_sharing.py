"""Shared adapters: other tenants read and use them, and never change them."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from adapters.storage.names import LocalNames
from adapters.storage.store import AdapterStore
from tests.support.harness import write_adapter
from tests.support.scripted import BASE, Served, serving
from tests.support.tenancy import key

HI: dict[str, Any] = {"prompt": "Hi", "max_tokens": 2}


async def names(served: Served, headers: dict[str, str]) -> list[str]:
    models = (await served.client.get("/v1/models", headers=headers)).json()["data"]
    adapters = (await served.client.get("/v1/adapters", headers=headers)).json()["data"]
    assert [model["id"] for model in models] == [BASE, *(adapter["name"] for adapter in adapters)]
    return [adapter["name"] for adapter in adapters]


async def test_a_shared_adapter_is_served_and_not_changed(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        acme, rival, third = [await key(served, tenant) for tenant in ("acme", "rival", "third")]
        publisher = served.services.registry.publisher
        version, _ = await publisher.import_directory("acme", "law", write_adapter(tmp_path / "law", 1))
        own, _ = await publisher.import_directory("rival", "law", write_adapter(tmp_path / "own", 2))
        body = {"model": "acme/law"} | HI
        assert (await served.client.post("/v1/completions", json=body, headers=rival)).status_code == 404

        shared = await served.client.post(
            "/v1/adapters/law/share", json={"tenants": ["rival", "acme", "nobody"]}, headers=acme
        )
        assert shared.json() == {"object": "adapter.share", "name": "law", "tenants": ["nobody", "rival"]}
        assert await names(served, rival) == ["acme/law", "law"]
        assert await names(served, third) == []
        answer = await served.client.post("/v1/completions", json=body, headers=rival)
        assert answer.headers["X-Adapter-Digest"] == version.digest
        assert served.engine.requests[-1].tenant == "rival", "its KV belongs to the reader"
        pinned = {"model": f"acme/law@{version.digest[7:20]}"} | HI
        assert (await served.client.post("/v1/completions", json=pinned, headers=rival)).status_code == 200
        mine = await served.client.post("/v1/completions", json={"model": "law"} | HI, headers=rival)
        assert mine.headers["X-Adapter-Digest"] == own.digest
        card = (await served.client.get("/v1/models/acme/law", headers=rival)).json()
        assert (card["id"], card["owned_by"], card["root"]) == ("acme/law", "acme", version.digest)
        for path in ("", "/weights", "/config", "/versions"):
            assert (await served.client.get(f"/v1/adapters/acme/law{path}", headers=rival)).status_code == 200, path
            assert (await served.client.get(f"/v1/adapters/acme/law{path}", headers=third)).status_code == 404, path

        for method, path, json in [
            ("DELETE", "", None),
            ("POST", "/pin", None),
            ("DELETE", "/pin", None),
            ("POST", "/promote", {"digest": version.digest}),
            ("POST", "/rollback", None),
            ("POST", "/merge", {"to": "resident", "dtype": "bf16"}),
            ("DELETE", "/merge", None),
            ("POST", "/share", {"tenants": "all"}),
            ("DELETE", "/share", None),
        ]:
            sent: dict[str, Any] = {"json": json} if json else {}
            refused = await served.client.request(method, f"/v1/adapters/acme/law{path}", headers=rival, **sent)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "shared_adapter"), path
            unseen = await served.client.request(method, f"/v1/adapters/acme/law{path}", headers=third, **sent)
            assert unseen.status_code == 404, path
        assert (await served.client.delete("/v1/models/acme/law", headers=rival)).status_code == 403
        assert served.services.store.pointer("rival", "law").pinned is False, "own adapter unchanged"
        assert served.services.store.pointer("acme", "law").readers == ("nobody", "rival")

        usage = (await served.client.get("/v1/usage", headers=rival)).json()["data"]
        assert {row["adapter"]: row["requests"] for row in usage} == {"acme/law": 2, "law": 1}
        owners = (await served.client.get("/v1/adapters/law", headers=acme)).json()
        assert (owners["requests"], owners["shared_with"]) == (0, ["nobody", "rival"])
        readers = (await served.client.get("/v1/adapters/acme/law", headers=rival)).json()
        assert (readers["requests"], readers["shared_with"]) == (2, [])

        assert (await served.client.delete("/v1/adapters/law/share", headers=acme)).json()["tenants"] == []
        assert await names(served, rival) == ["law"]
        assert (await served.client.post("/v1/completions", json=body, headers=rival)).status_code == 404
        assert (await served.client.post("/v1/adapters/law/share", json={"tenants": "all"}, headers=acme)).json()[
            "tenants"
        ] == "all"
        assert await names(served, third) == ["acme/law"]
        assert await names(served, acme) == ["law"]
        assert (await served.client.delete("/v1/adapters/law", headers=acme)).status_code == 200
        assert await names(served, third) == []


async def test_the_default_tenants_are_shared_as_default_and_ones_own_name_comes_first(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        acme = await key(served, "acme")
        publisher = served.services.registry.publisher
        theirs, _ = await publisher.import_directory("", "law", write_adapter(tmp_path / "law", 1))
        await publisher.share("", "law", ["acme"])
        assert await names(served, acme) == ["default/law"]
        bound = await key(served, "acme", ["serve"], adapters=["default/law"])
        for headers in (acme, bound):
            answer = await served.client.post("/v1/completions", json={"model": "default/law"} | HI, headers=headers)
            assert answer.headers["X-Adapter-Digest"] == theirs.digest
        own, _ = await publisher.import_directory("acme", "default/law", write_adapter(tmp_path / "own", 2))
        answer = await served.client.post("/v1/completions", json={"model": "default/law"} | HI, headers=acme)
        assert answer.headers["X-Adapter-Digest"] == own.digest
        assert await names(served, acme) == ["default/law"]


@pytest.mark.parametrize("readers", [["rival"], ["*"], ["", "rival"]])
async def test_sharing_outlives_restarts_and_new_versions(tmp_path: Path, readers: list[str]) -> None:
    async with serving(tmp_path) as served:
        publisher = served.services.registry.publisher
        await publisher.import_directory("acme", "law", write_adapter(tmp_path / "law", 1))
        await publisher.share("acme", "law", readers)
        new, _ = await publisher.import_directory("acme", "law", write_adapter(tmp_path / "law", 2))
        assert served.services.store.readable_pointer("rival", "acme/law").current == new
        names = await asyncio.to_thread(LocalNames, tmp_path / "test.db")
        again = await asyncio.to_thread(AdapterStore, tmp_path / "adapters", names)
        assert again.readable_pointer("rival", "acme/law").current.digest == new.digest
        assert again.pointer("acme", "law").readers == tuple(sorted(readers))
        names.close()
