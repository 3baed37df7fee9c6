"""Batches while servers and engines come and go, at random: each request is answered once, and nothing is left."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.server.batches.test_batches import CHAT, FINAL, row
from tests.support.scripted import TEXT
from tests.support.steering import MOVES, SEEDS, Fleet, Life, fleet


class Steered:
    """Batches whose creation was acknowledged, and what is known of each."""

    def __init__(self, servers: Fleet) -> None:
        self.servers, self.choose = servers, servers.choose
        self.names: dict[str, list[str]] = {}  # of each batch's requests, in order; none in a faulty file
        self.asked: set[str] = set()  # batches that were to be cancelled
        self.cancelled: set[str] = set()  # and are, as was said
        self.ends: dict[str, Any] = {}
        self.seen: dict[str, list[Life]] = {}  # where the end was seen
        self.doomed: set[str] = set()  # files that were to be deleted
        self.deleted: set[str] = set()  # and are, as was said

    async def create(self, life: Life) -> None:
        count = self.choose.choice((0, 1, 4, 9, 16))
        rows = [row(f"r{i}", **({"model": "nobody"} if self.choose.random() < 0.2 else {})) for i in range(count)]
        content = "\n".join(map(json.dumps, rows))
        part = {"file": ("in.jsonl", content)}
        uploaded = await life.ask("POST", "/v1/files", files=part, data={"purpose": "batch"})
        if uploaded is None or uploaded.status_code != 200:
            return
        file = uploaded.json()["id"]
        fields = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
        made = await self.servers.any.ask("POST", "/v1/batches", json=fields)
        if made is not None and made.status_code == 200:
            self.names[made.json()["id"]] = [one["custom_id"] for one in rows]
        if self.choose.random() < 0.7:
            await self.delete(file)

    async def delete(self, file: str) -> None:
        self.doomed.add(file)
        response = await self.servers.any.ask("DELETE", f"/v1/files/{file}")
        if response is not None and response.status_code == 200:
            self.deleted.add(file)

    async def cancel(self, life: Life) -> None:
        batch = self.choose.choice(list(self.names))
        self.asked.add(batch)
        response = await life.ask("POST", f"/v1/batches/{batch}/cancel")
        if response is not None and response.status_code == 200:
            self.cancelled.add(batch)
            self.look(life, response.json())

    async def get(self, life: Life) -> None:
        await self.find(life, self.choose.choice(list(self.names)))

    async def find(self, life: Life, batch: str) -> None:
        ended = life in self.seen.get(batch, [])
        response = await life.ask("GET", f"/v1/batches/{batch}")
        if response is not None and response.status_code < 500:
            assert response.status_code == 200, response.text
            assert not ended or response.json()["status"] in FINAL
            self.look(life, response.json())

    async def page(self, life: Life) -> None:
        response = await life.ask("GET", "/v1/batches?limit=100")
        if response is not None and response.status_code == 200:
            found = response.json()["data"]
            assert len({one["id"] for one in found}) == len(found)
            if self.servers.url is None:
                assert {one["id"] for one in found} >= self.names.keys()
            for one in found:
                self.look(life, one)

    async def delete_results(self, life: Life) -> None:
        if ends := list(self.ends.values()):
            end = self.choose.choice(ends)
            if file := end[self.choose.choice(("output_file_id", "error_file_id"))]:
                await self.delete(file)

    def look(self, life: Life, batch: dict[str, Any]) -> None:
        """A batch that has ended stays as it is."""
        id_ = batch["id"]
        if batch["status"] not in FINAL:
            return
        assert self.ends.setdefault(id_, batch) == batch
        self.seen.setdefault(id_, []).append(life)

    async def move(self) -> None:
        kinds = [self.create, self.cancel, self.get, self.page, self.delete_results]
        kind = self.choose.choice(kinds if self.names else [self.create])
        self.servers.log.append(kind.__name__)
        await kind(self.servers.any)

    async def all_ended(self) -> bool:
        for life in self.servers.lives:
            for batch in self.names:
                await self.find(life, batch)
        lives = set(self.servers.lives)
        return all(lives <= set(self.seen.get(batch, ())) for batch in self.names)

    async def check(self) -> None:
        spent = 0
        for batch, names in self.names.items():
            end = self.ends[batch]
            if end["status"] == "failed":
                assert not names, end
            else:
                assert end["status"] == "cancelled" if batch in self.cancelled else "completed", end
                assert end["status"] == "completed" or batch in self.asked
                spent += await self.answers(end, names)
        if not self.servers.lost_usage:
            assert spent <= self.servers.recorded_tokens()
        assert self.servers.recorded_tokens() <= self.servers.generated_tokens()
        for file in self.deleted:
            for answer in await self.servers.ask_all("GET", f"/v1/files/{file}"):
                assert answer.status_code == 404, (file, self.ends)

    async def answers(self, end: dict[str, Any], names: list[str]) -> int:
        """Each request has one line, in one of the files; tokens of the answers."""
        lines: dict[str, list[dict[str, Any]]] = {}
        for name in ("output_file_id", "error_file_id"):
            file, lines[name] = end[name], []
            if file is not None and file not in self.doomed:
                one, *others = await self.servers.ask_all("GET", f"/v1/files/{file}/content")
                assert one.status_code == 200, (end, one.text)
                assert all(other.content == one.content for other in others)
                lines[name] = [json.loads(line) for line in one.content.splitlines()]
        good, bad = lines.values()
        if not {end["output_file_id"], end["error_file_id"]} & self.doomed:
            if not end["request_counts"]["total"]:  # cancelled before its file was checked
                names = []
            assert sorted(line["custom_id"] for line in good + bad) == sorted(names), (end, good, bad)
            counts = {"total": len(names), "completed": len(good), "failed": len(bad)}
            assert end["request_counts"] == counts
        bodies = [line["response"]["body"] for line in good]
        assert all(TEXT.startswith(body["choices"][0]["message"]["content"]) for body in bodies)
        return sum(body["usage"]["completion_tokens"] for body in bodies)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
async def test_batches_steered_at_random_answer_each_request_once(tmp_path: Path, seed: int, count: int) -> None:
    async with fleet(tmp_path, count, seed, batch_requests=4) as servers:
        steered = Steered(servers)
        await servers.steer(steered.move, MOVES, concurrent=(1, 1, 3), disturbed=0.5)
        await servers.wait_until(steered.all_ended)
        await servers.wait_until_idle()
        await steered.check()
        assert servers.leftovers() == []
