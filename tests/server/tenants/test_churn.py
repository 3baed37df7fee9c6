"""Twenty tenants at once, with changing adapters, files and keys: nothing of one tenant reaches another.

All objects that a tenant creates, and all that the engine returns to it, carry the tenant's mark; no response, log
line, usage row or metric series may carry another's.
"""

import asyncio
import logging
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.logs import FIELDS
from tests.support.harness import write_adapter
from tests.support.scripted import BASE, EOS, Served, encode, serving
from tests.support.tenancy import Headers, key

MARKS = [f"zq{n:02d}qz" for n in range(20)]  # no random secret contains one
MARK = re.compile(r"zq\d\dqz")
LISTS = ("models", "adapters", "files", "usage", "admin/audit", "admin/keys", "fine_tuning/jobs", "batches")
WORKERS = 12
COUNTS = ("requests", "prompt_tokens", "generated_tokens")


def foreign(text: str, mark: str) -> set[str]:
    """Marks of other tenants."""
    return set(MARK.findall(text)) - {mark}


class Lines(logging.Handler):
    """Counts log lines of requests by tenant, and keeps lines with marks of several tenants."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.crossing: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, FIELDS, {})
        marks = set(MARK.findall(f"{record.getMessage()} {fields}"))
        if len(marks) > 1:
            self.crossing.append(record.getMessage())
        self.counts.update(marks)


class Crowd:
    """All tenants as clients, and the responses they got."""

    def __init__(self, served: Served, client: httpx.AsyncClient, root: Path, headers: dict[str, Headers]) -> None:
        self.served = served
        self.used: dict[tuple[str, str | None], Counter[str]] = defaultdict(Counter)
        self.digests: dict[str, set[str]] = defaultdict(set)  # digests uploaded
        self.answered: dict[str, set[str]] = defaultdict(set)  # digests that served, some before they were in `digests`
        self.asked: Counter[str] = Counter()
        self._client = client
        self._root = root
        self._headers = headers
        self._random = random.Random(11)
        self._files: dict[str, list[str]] = defaultdict(list)

    async def ask(self, mark: str, method: str, path: str, *statuses: int, **options: Any) -> httpx.Response:
        self.asked[mark] += 1
        headers = self._headers[mark] | {"X-Request-Id": f"{mark}-{self.asked[mark]}"}
        response = await self._client.request(method, f"/v1/{path}", headers=headers, **options)
        assert response.status_code in (statuses or (200,)), f"{method} {path}: {response.text}"
        said = f"{response.text} {response.headers}"
        assert not foreign(said, mark), f"{mark}: {method} {path}: {said}"
        return response

    async def upload(self, mark: str, name: str) -> None:
        """Publish new content under a name of a tenant."""
        seed = self._random.randrange(2**31)
        directory = write_adapter(self._root / mark / str(seed), seed, 1)
        publisher = self.served.services.registry.publisher
        version, _ = await publisher.import_directory(mark, name, directory)
        self.digests[mark].add(version.digest)

    async def generate(self, mark: str) -> None:
        model = self._random.choice([BASE, "law", f"{mark}-own"])
        body = {"model": model, "prompt": f"Hi {mark}", "max_tokens": 8}
        response = await self.ask(mark, "POST", "completions", 200, 404, json=body)
        if response.status_code == 404:
            return  # it is deleted at the moment
        if model != BASE:
            self.answered[mark].add(response.headers["X-Adapter-Digest"])
        assert mark in response.json()["choices"][0]["text"]
        usage = response.json()["usage"]
        counts = {
            "requests": 1,
            "prompt_tokens": usage["prompt_tokens"],
            "generated_tokens": usage["completion_tokens"],
        }
        self.used[mark, None if model == BASE else model].update(counts)

    async def change(self, mark: str) -> None:
        """Create or delete an adapter, a file or a key."""
        files = self._files[mark]
        match self._random.randrange(5):
            case 0:
                await self.upload(mark, "law")
            case 1:
                await self.upload(mark, f"{mark}-own")
            case 2:
                await self.ask(mark, "DELETE", f"adapters/{mark}-own", 200, 404)
            case 3 if files:
                await self.ask(mark, "DELETE", f"files/{files.pop()}")
            case 3:
                sent = {"file": (f"{mark}.jsonl", b'{"text": "%s"}\n' % mark.encode())}
                made = await self.ask(mark, "POST", "files", files=sent, data={"purpose": "fine-tune"})
                files.append(made.json()["id"])
            case 4:
                made = await self.ask(mark, "POST", "admin/keys", 201, json={"name": mark, "roles": ["serve"]})
                await self.ask(mark, "DELETE", f"admin/keys/{made.json()['id']}")

    async def work(self, turns: Iterable[str]) -> None:
        for mark in turns:
            chance = self._random.random()
            if chance < 0.9:
                await self.generate(mark)
            elif chance < 0.97:
                await self.ask(mark, "GET", self._random.choice(LISTS))
            else:
                await self.change(mark)


async def _churn(root: Path, requests: int) -> None:
    lines, logger = Lines(), logging.getLogger("server")
    async with serving(root) as served:
        served.engine.reply = lambda request: [*encode(f" {request.tenant}"), EOS]
        operator = await key(served)
        headers = {mark: await key(served, mark) for mark in MARKS}
        transport = httpx.ASGITransport(served.app)
        # Without schema validation of responses, which takes longer than the responses.
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=None) as client:
            crowd = Crowd(served, client, root, headers)
            for mark in MARKS:
                await crowd.upload(mark, "law")
            level = logger.level
            logger.addHandler(lines)
            logger.setLevel(logging.INFO)
            try:
                turns = iter([MARKS[n % len(MARKS)] for n in range(requests)])
                await asyncio.gather(*(crowd.work(turns) for _ in range(WORKERS)))
            finally:
                logger.removeHandler(lines)
                logger.setLevel(level)
            for mark in MARKS:
                rows = (await crowd.ask(mark, "GET", "usage")).json()["data"]
                told = {
                    (mark, row["adapter"]): {
                        name: row[name] for name in ("requests", "prompt_tokens", "generated_tokens")
                    }
                    for row in rows
                }
                assert told == {whose: dict(counts) for whose, counts in crowd.used.items() if whose[0] == mark}
            everything = (await client.get("/v1/usage", headers=operator)).json()["data"]
            assert {(row["tenant"], row["adapter"]) for row in everything} == set(crowd.used)
            metrics = (await client.get("/metrics", headers=operator)).text
    assert lines.crossing == []
    for mark in MARKS:
        assert crowd.answered[mark] <= crowd.digests[mark], mark
    assert all(lines.counts[mark] >= crowd.asked[mark] - 1 for mark in MARKS), "each request but usage has a log line"
    for line in metrics.splitlines():
        assert len(set(MARK.findall(line))) < 2, line
    for mark in MARKS:
        series = re.search(rf'tenant_requests_total{{tenant="{mark}"}} (\S+)', metrics)
        assert series is not None
        assert float(series[1]) == sum(counts["requests"] for (whose, _), counts in crowd.used.items() if whose == mark)
    assert sum(crowd.asked.values()) >= 0.95 * requests
    print(f"{sum(crowd.asked.values())} requests of {len(MARKS)} tenants, {sum(lines.counts.values())} lines")


async def test_nothing_crosses(tmp_path: Path) -> None:
    await _churn(tmp_path, 400)


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_nothing_crosses_in_100_000_requests(tmp_path: Path) -> None:
    await _churn(tmp_path, 106_000)  # some turns send no request
