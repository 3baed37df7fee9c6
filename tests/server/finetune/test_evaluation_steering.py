"""Evaluations while servers, adapters and files come and go, at random: each has the numbers of its version."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from server.finetune.evaluations import RESULTS
from server.messages.protocol import Generate
from server.services import TENANT
from tests.support.harness import write_adapter
from tests.support.scripted import BASE, EOS, encode
from tests.support.several import EXAMPLES
from tests.support.steering import MOVES, SEEDS, Fleet, Killed, Life, fleet

ENDS = {"succeeded", "failed"}
NAMES = ("mine", "other")
VERSIONS = 3


def reply(request: Generate) -> list[int]:
    """Each version has an answer of its own."""
    said = request.adapters[0].digest[-6:] if request.adapters else "it is 3"
    return [*encode(said), EOS]


class Steered:
    """Evaluations whose creation was acknowledged, and what is known of each."""

    def __init__(self, servers: Fleet) -> None:
        self.servers, self.choose = servers, servers.choose
        self.files: list[str] = []
        self.made: dict[str, dict[str, Any]] = {}  # as they were begun
        self.ends: dict[str, dict[str, Any]] = {}
        self.doomed: set[str] = set()  # those that were to be deleted
        self.deleted: set[str] = set()  # and are, as was said

    async def upload(self, life: Life) -> None:
        part = {"file": ("data.jsonl", EXAMPLES)}
        response = await life.ask("POST", "/v1/files", files=part, data={"purpose": "fine-tune"})
        if response is not None and response.status_code == 200:
            self.files.append(response.json()["id"])

    async def publish(self, life: Life) -> None:
        seed, name = self.choose.randrange(VERSIONS), self.choose.choice(NAMES)
        directory = write_adapter(self.servers.root / f"version-{seed}", seed)
        disturbances = -1 if life.disturbed else life.disturbances
        with life.as_current():
            publisher = life.served.services.registry.publisher
            publishing = asyncio.create_task(publisher.import_directory(TENANT, name, directory))
        try:
            await publishing
        except (Exception, asyncio.CancelledError, Killed):
            assert disturbances != life.disturbances

    async def unpublish(self, life: Life) -> None:
        response = await life.ask("DELETE", f"/v1/adapters/{self.choose.choice(NAMES)}")
        assert response is None or response.status_code in (200, 404, 409, 503, 507), response.text

    async def delete_file(self, life: Life) -> None:
        if self.files:
            await life.ask("DELETE", f"/v1/files/{self.choose.choice(self.files)}")

    async def create(self, life: Life) -> None:
        if not self.files:
            return
        body = {"model": self.choose.choice((BASE, *NAMES)), "file": self.choose.choice(self.files)}
        response = await life.ask("POST", "/v1/evaluations", json=body)
        if response is None or response.status_code >= 500:
            return
        if response.status_code == 200:
            self.made[response.json()["id"]] = response.json()
        else:
            assert response.status_code in (400, 404), response.text

    async def get(self, life: Life) -> None:
        if self.made:
            await self.find(life, self.choose.choice(list(self.made)))

    async def find(self, life: Life, id_: str) -> None:
        gone, ended = id_ in self.deleted, self.servers.url is None and id_ in self.ends
        response = await life.ask("GET", f"/v1/evaluations/{id_}")
        if response is None or response.status_code >= 500:
            return
        if response.status_code == 404:
            assert id_ in self.doomed
            return
        assert response.status_code == 200, response.text
        found = response.json()
        assert not gone or self.servers.url is not None  # others hear of it a little later
        assert found["status"] in ENDS or not ended
        if found["status"] in ENDS:
            assert self.ends.setdefault(id_, found) == found

    async def delete(self, life: Life) -> None:
        if not self.made:
            return
        id_ = self.choose.choice(list(self.made))
        self.doomed.add(id_)
        response = await life.ask("DELETE", f"/v1/evaluations/{id_}")
        if response is not None and response.status_code == 200:
            self.deleted.add(id_)

    async def move(self) -> None:
        kinds = [self.create, self.create, self.create, self.get, self.delete, self.publish, self.publish]
        kind = self.choose.choice([*kinds, self.upload, self.unpublish, self.delete_file])
        self.servers.log.append(kind.__name__)
        await kind(self.servers.any)

    async def all_ended(self) -> bool:
        """All servers show all that there are as they ended, and none that is deleted."""
        for life in self.servers.lives:
            for id_ in list(self.made):
                await self.find(life, id_)
        gone = [await self.servers.ask_all("GET", f"/v1/evaluations/{id_}") for id_ in self.deleted]
        return (
            all(answer.status_code == 404 for answers in gone for answer in answers)
            and self.made.keys() <= self.ends.keys() | self.doomed
        )

    async def check(self) -> None:
        for id_, begun in self.made.items():
            if id_ in self.doomed:
                continue
            end = self.ends[id_]
            if end["status"] == "failed":
                assert end["error"]["code"] in ("file_not_found", "adapter_not_found", "engine_died"), end
                assert end["result_files"] == []
                continue
            result = end["result_files"][0]
            one, *others = await self.servers.ask_all("GET", f"/v1/files/{result}/content")
            assert one.status_code == 200, (end, one.text)
            assert all(other.content == one.content for other in others)
            rows = [json.loads(line) for line in one.text.splitlines()]
            assert len(rows) == end["examples"] == 8
            assert {row["base"]["answer"] for row in rows} == {"it is 3"}
            if begun["model"] != BASE:
                assert {row["adapter"]["answer"] for row in rows} == {begun["digest"][-6:]}

    async def results_listed(self) -> bool:
        """There are the files of all that there are, and of none that is deleted."""
        wanted = {
            end["result_files"][0] for id_, end in self.ends.items() if id_ not in self.doomed and end["examples"]
        }
        doubtful = {f"file-{id_.removeprefix('eval-')}r" for id_ in self.doomed - self.deleted}
        for page in await self.servers.ask_all("GET", f"/v1/files?purpose={RESULTS}"):
            listed = {file["id"] for file in page.json()["data"]} - doubtful
            acknowledged = {id_ for id_ in listed if f"eval-{id_[5:-1]}" in self.made}
            if not wanted - doubtful <= listed or not acknowledged <= wanted:
                return False
        return True


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
async def test_evaluations_steered_at_random_have_the_numbers_of_their_version(
    tmp_path: Path, seed: int, count: int
) -> None:
    async with fleet(tmp_path, count, seed, reply=reply, evaluation_requests=8) as servers:
        steered = Steered(servers)
        await steered.upload(servers.any)
        await servers.steer(steered.move, MOVES, concurrent=(1, 2, 4), disturbed=0.4)
        await servers.wait_until(steered.all_ended)
        await servers.wait_until_idle()
        await servers.wait_until(steered.results_listed)
        await steered.check()
        assert servers.leftovers() == []
