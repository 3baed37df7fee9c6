"""Responses in the background while servers and engines come and go, at random: each has one end, told to all."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.storage.bucket import Bucket
from server.responses.shared import PREFIX
from tests.support.scripted import BASE, TEXT
from tests.support.steering import MOVES, SEEDS, Fleet, Life, fleet

ENDS = {"completed", "failed", "cancelled", "incomplete"}
LAST = {f"response.{end}" for end in ENDS} | {"error"}


class Steered:
    """Responses whose beginning was acknowledged, and what is known of each."""

    def __init__(self, servers: Fleet) -> None:
        self.servers, self.choose = servers, servers.choose
        self.begun: dict[str, dict[str, Any]] = {}  # the bodies
        self.ends: dict[str, dict[str, Any]] = {}
        self.events: dict[str, dict[int, Any]] = {}  # by their numbers
        self.doomed: set[str] = set()  # those that were to be deleted
        self.deleted: set[str] = set()  # and are, as was said
        self.cancelled: set[str] = set()
        self.following: list[asyncio.Task[None]] = []

    async def create(self, life: Life) -> None:
        body = {"background": self.choose.random() < 0.8, "stream": False}
        body["stream"] = body["background"] and self.choose.random() < 0.5
        earlier = self.choose.choice([None, *self.begun])
        asked = {"model": BASE, "input": "Hi", "previous_response_id": earlier, **body}
        work = self.follow(life, None, body, asked) if body["stream"] else self.begin(life, body, asked)
        self.following.append(asyncio.create_task(work))  # the engine may be held up
        await asyncio.sleep(self.choose.random() / 50)

    async def begin(self, life: Life, body: dict[str, Any], asked: dict[str, Any]) -> None:
        earlier = asked["previous_response_id"]
        response = await life.ask("POST", "/v1/responses", json=asked)
        if response is None or response.status_code >= 500:
            return
        if response.status_code == 200:
            self.begun[response.json()["id"]] = body
            self.look(response.json())
        elif response.status_code == 404:
            assert earlier in self.doomed
        else:
            assert response.status_code == 400, response.text

    async def follow(
        self, life: Life, id_: str | None, body: dict[str, Any], asked: dict[str, Any] | None = None, after: int = -1
    ) -> None:
        if asked is not None:
            response = await life.ask("POST", "/v1/responses", json=asked)
        else:
            query = {"stream": "true"} | ({} if after < 0 else {"starting_after": str(after)})
            response = await life.ask("GET", f"/v1/responses/{id_}", params=query)
        if response is None or response.status_code >= 500:
            return
        if response.status_code != 200:
            where = response.text, self.begun.get(str(id_))
            if asked is not None:
                earlier = asked["previous_response_id"]
                assert earlier in self.doomed if response.status_code == 404 else response.status_code == 400, where
            else:
                assert id_ in self.doomed if response.status_code == 404 else not body["stream"], where
            return
        self.take(response, id_, body, after)

    def take(self, response: httpx.Response, id_: str | None, body: dict[str, Any], after: int) -> None:
        """Events follow each other from the one that was wanted, whoever tells them, up to the last one."""
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: ")]
        if id_ is None:
            if not events or events[0]["type"] == "error":
                return
            id_ = events[0]["response"]["id"]
            self.begun[id_] = body
        known = self.events.setdefault(id_, {})
        for number, event in enumerate(events, start=after + 1):
            if event["type"] == "error":
                break
            assert event["sequence_number"] == number, (after, events)
            if event["type"] != "response.failed":  # of one that its server did not bring to its end, events are lost
                assert known.setdefault(number, event) == event
            known[number] = event
            if event["type"] in LAST:
                self.look(event["response"])

    def some(self) -> str:
        return self.choose.choice(list(self.begun))

    async def stream(self, life: Life) -> None:
        id_ = self.some()
        follow = self.follow(life, id_, self.begun[id_], after=self.choose.randrange(-1, 4))
        self.following.append(asyncio.create_task(follow))

    async def get(self, life: Life) -> None:
        await self.find(life, self.some())

    async def find(self, life: Life, id_: str) -> None:
        gone, ended = id_ in self.deleted, id_ in self.ends
        response = await life.ask("GET", f"/v1/responses/{id_}")
        if response is not None and response.status_code < 500:
            if response.status_code == 200:
                assert not gone, response.text
                assert not ended or response.json()["status"] in ENDS, (response.text, self.ends[id_])
                self.look(response.json())
            else:
                assert response.status_code == 404
                assert id_ in self.doomed

    async def cancel(self, life: Life) -> None:
        id_ = self.some()
        response = await life.ask("POST", f"/v1/responses/{id_}/cancel")
        if response is None or response.status_code >= 500:
            return
        if response.status_code == 200:
            assert response.json()["status"] in ENDS or self.servers.disturbed, response.text
            self.cancelled.add(id_)
            self.look(response.json())
        elif response.status_code == 404:
            assert id_ in self.doomed
        else:
            assert not self.begun[id_]["background"], response.text

    async def delete(self, life: Life) -> None:
        id_ = self.some()
        self.doomed.add(id_)
        response = await life.ask("DELETE", f"/v1/responses/{id_}")
        if response is not None and response.status_code == 200:
            self.deleted.add(id_)

    def look(self, response: dict[str, Any]) -> None:
        """A response that has ended stays as it is; only what there was of one that was cancelled may come later."""
        id_, status = response["id"], response["status"]
        if status not in ENDS:
            return
        known = self.ends.setdefault(id_, response)
        if known["status"] == status == "cancelled" and len(str(response["output"])) > len(str(known["output"])):
            self.ends[id_] = known = response
        if status == "cancelled":
            assert known["status"] == status
        else:
            assert known == response

    async def move(self) -> None:
        kinds = [self.create, self.create, self.get, self.stream, self.cancel, self.delete]
        kind = self.choose.choice(kinds if self.begun else [self.create])
        self.servers.log.append(kind.__name__)
        await kind(self.servers.any)

    async def all_ended(self) -> bool:
        for life in self.servers.lives:
            for id_ in list(self.begun):
                await self.find(life, id_)
        return all(task.done() for task in self.following) and self.begun.keys() <= self.ends.keys() | self.doomed

    async def check(self) -> None:
        spent = 0
        for id_ in self.begun:
            if id_ in self.doomed:
                continue
            body, end = self.begun[id_], self.ends[id_]
            text = "".join(part["text"] for item in end["output"] for part in item["content"])
            assert text == TEXT if end["status"] == "completed" else TEXT.startswith(text), end
            assert end["status"] != "cancelled" or id_ in self.cancelled or self.servers.log.count("cancel")
            spent += end["usage"]["output_tokens"] if end["status"] == "completed" else 0
            for life in self.servers.lives:
                if body["stream"]:
                    before = dict(self.events.get(id_, {}))
                    await self.follow(life, id_, body)
                    told = self.events.get(id_, {})
                    assert told, (id_, end, before)
                    types = {event["type"] for event in told.values()} & LAST
                    assert types == (set() if end["status"] == "cancelled" else {f"response.{end['status']}"}), end
        if not self.servers.lost_usage:
            assert spent <= self.servers.recorded_tokens()
        assert self.servers.recorded_tokens() <= self.servers.generated_tokens()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("seed", SEEDS)
async def test_responses_steered_at_random_have_one_end(tmp_path: Path, seed: int, count: int) -> None:
    async with fleet(tmp_path, count, seed) as servers:
        steered = Steered(servers)
        await servers.steer(steered.move, MOVES, concurrent=(1, 2, 4), disturbed=0.4)
        await servers.wait_until(steered.all_ended)
        await asyncio.gather(*steered.following)
        await servers.wait_until_idle()
        await steered.check()
        assert servers.leftovers() == []
        if servers.url is not None:
            kept = {entry.path.rpartition("/")[2].removesuffix(".json") for entry in Bucket(servers.url).list(PREFIX)}
            assert not kept & steered.deleted
