"""Request ids, keys, draining, slow bodies, CORS and the access log around a small app."""

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from server.admission import Drain
from server.errors import EXCEPTION_HANDLERS
from server.http import middleware as middleware_module
from server.http.middleware import middleware
from server.logs import JsonFormatter
from server.settings import Settings
from server.tenants.keys import Tenants

KEY = "sk-secret"


async def echo(request: Request) -> Response:
    return PlainTextResponse(await request.body())


async def fail(request: Request) -> Response:
    raise RuntimeError("the prompt was: hunter2")


def client(
    drain: Drain | None = None, keys: Sequence[str] = (), origins: Sequence[str] = (), **settings: Any
) -> httpx.AsyncClient:
    paths = ["/v1/echo", "/health", "/ready", "/metrics", "/version"]
    routes = [Route(path, echo, methods=["GET", "POST"]) for path in paths] + [Route("/v1/fail", fail)]
    no_database: Any = None  # no test here changes data
    tenants = Tenants(no_database, keys)
    stack = middleware(drain or Drain(), Settings(allowed_origins=tuple(origins), **settings), tenants)
    app = Starlette(routes=routes, middleware=stack, exception_handlers=EXCEPTION_HANDLERS)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def error(response: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


@pytest.mark.parametrize("given", ["abc-1.2_3:4", "x" * 128])
async def test_a_valid_request_id_is_echoed(given: str) -> None:
    response = await client().get("/v1/echo", headers={"X-Request-Id": given})
    assert response.headers["X-Request-Id"] == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", 'a"b', "ü"])
async def test_any_other_is_replaced(given: str) -> None:
    response = await client().get("/v1/echo", headers={b"X-Request-Id": given.encode()})
    assert response.headers["X-Request-Id"].startswith("req-")


async def test_errors_carry_the_request_id_too() -> None:
    for path in ("/nowhere", "/v1/fail"):
        response = await client().get(path, headers={"X-Request-Id": "mine"})
        assert response.headers["X-Request-Id"] == "mine"
        error(response)


async def test_an_unexpected_failure_says_nothing_of_the_inside(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        response = await client().get("/v1/fail")
    assert response.status_code == 500
    assert "hunter2" not in response.text
    assert "hunter2" not in caplog.text
    assert "RuntimeError at test_middleware.py:" in caplog.text


@pytest.mark.parametrize(
    "header", [None, "", KEY, f"Basic {KEY}", "Bearer", "Bearer ", f"Bearer {KEY}x", "Bearer sk-secre", "Bearer ü"]
)
async def test_without_a_known_key_guarded_paths_are_closed(header: str | None) -> None:
    headers = {} if header is None else {b"Authorization": header.encode()}
    for path in ("/v1/echo", "/nowhere", "/health/", "http://test//health"):
        response = await client(keys=[KEY]).get(path, headers=headers)
        assert response.status_code == 401, path
        assert error(response)["code"] == "invalid_api_key"
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert response.headers["X-Request-Id"]


@pytest.mark.parametrize("key", [KEY, "zweiter-schlüssel"])
async def test_every_configured_key_opens(key: str) -> None:
    headers = {b"Authorization": f"Bearer {key}".encode()}
    response = await client(keys=[KEY, "zweiter-schlüssel"]).get("/v1/echo", headers=headers)
    assert response.status_code == 200


async def test_two_authorization_headers_are_none() -> None:
    headers = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer other")]
    assert (await client(keys=[KEY]).get("/v1/echo", headers=headers)).status_code == 401


async def test_probes_and_metrics_need_no_key() -> None:
    for path in ("/health", "/ready", "/metrics", "/version"):
        assert (await client(keys=[KEY]).get(path)).status_code == 200


async def test_metrics_and_readiness_may_ask_for_the_key() -> None:
    guarded = client(keys=[KEY], guard_metrics=True)
    for path, status in (("/health", 200), ("/version", 200), ("/ready", 401), ("/metrics", 401)):
        assert (await guarded.get(path)).status_code == status, path
        assert (await guarded.get(path, headers={"Authorization": f"Bearer {KEY}"})).status_code == 200


async def test_keys_are_not_kept_as_they_are() -> None:
    no_database: Any = None
    assert KEY not in repr(vars(Tenants(no_database, [KEY])))


async def test_while_draining_new_requests_are_refused_and_probes_answered() -> None:
    drain = Drain()
    drain.begin()
    response = await client(drain).get("/v1/echo")
    assert response.status_code == 503
    assert error(response)["code"] == "draining"
    assert response.headers["Retry-After"]
    assert response.headers["Connection"] == "close"
    assert (await client(drain).get("/health")).status_code == 200


async def test_drain_waits_for_open_requests() -> None:
    drain = Drain()
    release = asyncio.Event()

    async def body() -> Any:
        yield b"a"
        await release.wait()
        yield b"b"

    request = asyncio.create_task(client(drain).post("/v1/echo", content=body()))
    while not drain.open_requests:  # noqa: ASYNC110 - the request is on its way
        await asyncio.sleep(0)
    drain.begin()
    idle = asyncio.create_task(drain.idle())
    await asyncio.sleep(0.01)
    assert not idle.done()
    release.set()
    assert (await request).text == "ab"
    await asyncio.wait_for(idle, 60)


async def test_a_body_that_stops_coming_is_refused() -> None:
    async def body() -> Any:
        yield b"a"
        await asyncio.sleep(60)

    response = await client(body_idle_seconds=0.1).post("/v1/echo", content=body())
    assert response.status_code == 408
    assert error(response)["code"] == "request_timeout"


async def test_a_body_that_only_drips_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware_module, "BODY_GRACE_SECONDS", 0.1)

    async def body() -> Any:
        for _ in range(50):
            yield b"a"
            await asyncio.sleep(0.01)

    assert (await client().post("/v1/echo", content=body())).status_code == 408
    assert (await client(min_body_rate=1).post("/v1/echo", content=body())).status_code == 200
    assert (await client(min_body_rate=0).post("/v1/echo", content=body())).status_code == 200


async def test_cors_is_off_unless_an_origin_is_allowed() -> None:
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    response = await client().get("/v1/echo", headers=asked)
    assert "access-control-allow-origin" not in response.headers

    allowed = client(keys=[KEY], origins=["https://app.example"])
    preflight = await allowed.options("/v1/echo", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    refused = await allowed.get("/v1/echo", headers=asked)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example"
    assert {"ETag", "X-Adapter-Digest"} <= set(refused.headers["access-control-expose-headers"].split(", "))
    foreign = await allowed.options("/v1/echo", headers=asked | {"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in foreign.headers


async def test_the_access_log_is_structured_and_holds_no_secrets(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        await client(keys=[KEY]).post(
            "/v1/echo?prompt=hunter2",
            content=b"hunter2",
            headers={"Authorization": f"Bearer {KEY}", "X-Request-Id": "mine"},
        )
    [record] = [record for record in caplog.records if record.name == "server.access"]
    line = json.loads(JsonFormatter().format(record))
    assert line["method"] == "POST"
    assert line["path"] == "/v1/echo"
    assert line["status"] == 200
    assert line["request_id"] == "mine"
    assert line["seconds"] >= 0
    logged = record.getMessage() + json.dumps(line)
    assert "hunter2" not in logged
    assert KEY not in logged


async def test_polls_are_logged_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for path in ("/health", "/ready", "/metrics", "/v1/echo"):
            await client().get(path)
    records = [record for record in caplog.records if record.name == "server.access"]
    levels = {record.getMessage().split()[1]: record.levelname for record in records}
    assert levels == {"/health": "DEBUG", "/ready": "DEBUG", "/metrics": "DEBUG", "/v1/echo": "INFO"}


async def test_a_refusal_is_logged_with_its_code(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        await client(keys=[KEY]).get("/v1/echo")
        await client().get("/v1/fail")
        await client().get("/v1/echo")
    records = [record for record in caplog.records if record.name == "server.access"]
    lines = [json.loads(JsonFormatter().format(record)) for record in records]
    assert [line.get("code") for line in lines] == ["invalid_api_key", "internal_error", None]
    assert [record.getMessage().split(" s ")[1:] for record in records] == [
        ["code=invalid_api_key"],
        ["code=internal_error"],
        [],
    ]


async def test_a_path_cannot_forge_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        await client().get("/a%0Ab%1b[31m")
    [record] = [record for record in caplog.records if record.name == "server.access"]
    assert record.getMessage().isprintable()


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd", "gzip, identity"])
async def test_a_compressed_body_is_refused_as_such(coding: str) -> None:
    response = await client().post("/v1/echo", content=b"\x1f\x8b", headers={"Content-Encoding": coding})
    assert response.status_code == 415
    assert error(response)["param"] == "Content-Encoding"
    assert response.headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("coding", ["identity", "Identity", ""])
async def test_a_body_with_identity_encoding_is_read(coding: str) -> None:
    response = await client().post("/v1/echo", content=b"x", headers={"Content-Encoding": coding})
    assert (response.status_code, response.text) == (200, "x")
