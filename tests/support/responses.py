"""Requests to `/v1/responses` with a scripted engine."""

import asyncio
from typing import Any

import httpx

from tests.support.scripted import BASE, Served


async def post(served: Served, **body: Any) -> httpx.Response:
    return await served.client.post("/v1/responses", json={"model": BASE, "input": "Hi"} | body)


async def made(served: Served, **body: Any) -> dict[str, Any]:
    response = await post(served, **body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def get(served: Served, path: str, **query: Any) -> Any:
    response = await served.client.get(f"/v1/responses/{path}", params=query)
    assert response.status_code == 200, response.text
    return response.json()


async def ended(served: Served, id_: str) -> dict[str, Any]:
    """Wait for a background response to end; return it."""
    if (running := served.services.responses.running.get(id_)) is not None:
        async with asyncio.timeout(60):
            _ = [event async for event in running.follow(-1)]
    found: dict[str, Any] = await get(served, id_)
    return found
