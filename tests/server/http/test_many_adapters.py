"""Ten thousand registered adapters: lists come in pages on request, and no request's cost grows with their number."""

import contextlib
import json
import sqlite3
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.storage.store import AdapterStore
from server.services import TENANT
from server.tenants.caller import OPERATOR_CALLER
from tests.support.harness import Site, write_adapter

MANY = 10_000


def registered(root: Path, count: int) -> Site:
    """A site with this many names in its store, as after a restart."""
    root.mkdir()
    with contextlib.closing(Site(root)) as site:
        fields = {"rank": 4, "scaling": 2.0, "modules_matched": 4, "variants": [], "parameters": 512, "bytes": 2048}
        more: dict[str, Any] = {
            "dtype": "float32",
            "rows": {"q_proj": 8},
            "base_model_name_or_path": None,
            "warnings": [],
        }
        receipt = json.dumps(fields | more)
    database = sqlite3.connect(root / "store.db", isolation_level=None)
    insert = "INSERT INTO adapter_versions (tenant, name, digest, created, receipt) VALUES (?, ?, ?, 0, ?)"
    database.execute("BEGIN")
    for i in range(count):
        digest = f"{i:064x}"
        (site.settings.data_dir / "store" / "versions" / digest).mkdir()
        database.execute(insert, (TENANT, f"a{i:05}", f"sha256:{digest}", receipt))
    database.execute("COMMIT")
    database.close()
    return Site(root)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with contextlib.closing(registered(tmp_path_factory.mktemp("many") / "site", MANY)) as site:
        yield site


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with contextlib.closing(registered(tmp_path_factory.mktemp("few") / "site", 10)) as site:
        yield site


@pytest.mark.parametrize(("path", "key", "extra"), [("/v1/models", "id", 1), ("/v1/adapters", "name", 0)])
async def test_lists_are_whole_by_default_and_paged_on_request(many: Site, path: str, key: str, extra: int) -> None:
    async with many.client() as client:
        whole = (await client.get(path)).json()
        names = [item[key] for item in whole["data"]]
        assert len(names) == MANY + extra
        assert names[extra:] == sorted(names[extra:])
        assert not whole["has_more"]
        seen: list[str] = []
        more = True
        while more:
            query = {"limit": 3000} | ({"after": seen[-1]} if seen else {})
            body = (await client.get(path, params=query)).json()
            seen += [item[key] for item in body["data"]]
            more = body["has_more"]
        assert seen == names
        for faulty, param in (
            ({"limit": "0"}, "limit"),
            ({"limit": "1e3"}, "limit"),
            ({"limit": "9" * 5000}, "limit"),
            ({"after": "nobody"}, "after"),
        ):
            response = await client.get(path, params=faulty)
            assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_looking_one_up_costs_what_it_costs_among_ten(many: Site, few: Site) -> None:
    """A factor of two is allowed, since the machine may be busy; `loadtest registered` measures."""
    taken: dict[int, list[float]] = {10: [], MANY: []}
    async with few.client() as small, many.client() as large:
        clients: list[tuple[int, httpx.AsyncClient]] = [(10, small), (MANY, large)]
        for i in range(150):
            for count, client in clients:
                started = time.perf_counter()
                response = await client.get(f"/v1/models/a{i * 67 % count:05}")
                taken[count].append(time.perf_counter() - started)
                assert response.status_code == 200
    assert statistics.median(taken[MANY]) < 2 * statistics.median(taken[10])


async def test_publishing_one_more_looks_at_no_other(
    many: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AdapterStore, "list", None)
    first = write_adapter(tmp_path / "one", 1)
    second = write_adapter(tmp_path / "two", 2)
    for directory in (first, second):
        _, changed = await many.publisher.import_directory(TENANT, "zz", directory)
        assert changed
    await many.publisher.roll_back(TENANT, "zz", None)
    await many.registry.delete(OPERATOR_CALLER, "zz")
