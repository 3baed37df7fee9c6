"""A canary split, its promotion and a rollback under load: no request fails or mixes versions."""

import asyncio
from typing import Any

import httpx

from tests.faults.conftest import Files
from tests.support.running import RunningServer

TOKENS = 12
CLIENTS = 4


async def ask(client: httpx.AsyncClient, model: str, user: str | None = None) -> tuple[str, str]:
    """The digest that served the request, and the answer."""
    body: dict[str, Any] = {"model": model, "prompt": "The quick", "max_tokens": TOKENS, "temperature": 0, "user": user}
    response = await client.post("/v1/completions", json=body | {"ignore_eos": True})
    assert response.status_code == 200, response.text
    return response.headers["x-adapter-digest"], response.json()["choices"][0]["text"]


async def test_a_canary_from_first_share_to_rollback_under_load(server: RunningServer, made: Files) -> None:
    old = made.upload(server, "song", "red").json()["digest"]
    new = made.upload(server, "song", "green").json()["digest"]
    async with httpx.AsyncClient(base_url=server.url, timeout=180) as client:
        expected = {digest: (await ask(client, f"song@{digest}"))[1] for digest in (old, new)}
        assert expected[old] != expected[new]
        seen: list[dict[str, list[tuple[str, str]]]] = [{}]  # by the phase in which a request began, and by user
        stop = asyncio.Event()

        async def load(user: str) -> None:
            while not stop.is_set():
                begun_in = seen[-1].setdefault(user, [])
                begun_in.append(await ask(client, "song", user))

        async def phase(path: str, body: Any) -> set[str]:
            """Change the pointer; return the digests that serve requests begun after that."""
            response = await client.post(f"/v1/adapters/song/{path}", json=body)
            assert response.status_code == 200, response.text
            seen.append({})
            async with asyncio.timeout(60):
                while sum(len(answers) >= 5 for answers in seen[-1].values()) < CLIENTS:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            return {digest for answers in seen[-1].values() for digest, _ in answers}

        clients = [asyncio.create_task(load(f"user-{i}")) for i in range(CLIENTS)]
        assert await phase("promote", {"digest": old}) == {old}
        assert await phase("promote", {"split": {old: 0.5, new: 0.5}}) == {old, new}
        assert await phase("promote", {"digest": new}) == {new}
        assert await phase("rollback", None) == {old}
        stop.set()
        await asyncio.gather(*clients)
        given = [answer for phase in seen for answers in phase.values() for answer in answers]
        assert all(text == expected[digest] for digest, text in given)
        assert (await client.delete("/v1/adapters/song")).status_code == 200


async def test_a_warm_adapter_is_on_the_device_and_a_verified_one_does_something(server: RunningServer) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=150) as client:
        warmed = await client.post("/v1/adapters/blue/warm")
        assert warmed.status_code == 200, warmed.text
        assert warmed.json()["seconds"] >= 0
        await ask(client, "blue")  # only requested names have their own series
        assert server.metric("lora_adapter_loaded", adapter_name="blue", level="device") == 1
        verified = (await client.post("/v1/adapters/blue/verify", json={"peft": True})).json()
        assert verified["changes_anything"]
        assert verified["logprob_difference"]["max"] > 0.01
        assert verified["difference_from_peft"]["max"] < 1e-3
