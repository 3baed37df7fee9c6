"""The parts of the Ray Serve application that need no Ray: routing, relaying of responses, and child processes."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import lorakeet_child as child
import lorakeet_relay as relay
import pytest

from server.errors import EngineUnavailable, RequestTooLarge, TooManyRequests, error_response
from server.http.operations import Operation
from tests.support.running import alive, eventually
from tests.support.scripted import serving

BASE = frozenset({"tiny", "/models/tiny"})


def _request(path: str, body: Any = None, method: str = "POST") -> relay.Request:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return relay.Request(method, path, [], content)


# --- routing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "adapter"),
    [
        ({"model": "poet"}, "poet"),
        ({"model": "poet@sha256:0123"}, "poet"),
        ({"model": "tiny"}, ""),
        ({"model": "/models/tiny"}, ""),
        ({"model": "tiny", "adapter_id": "poet"}, "poet"),
        ({"model": "tiny", "adapters": [{"id": "poet", "weight": 1}, {"id": "clerk"}]}, "poet"),
        ({"model": "tiny", "adapters": []}, ""),
        ({"model": "tiny", "adapters": ["poet"]}, ""),
        ({"model": ["poet"]}, ""),
        ({}, ""),
        (["poet"], ""),
        (b'{"model": "poet"', ""),
        (b"[" * 100_000, ""),
        (b"\xff\xfe", ""),
    ],
)
def test_the_body_names_the_adapter(body: Any, adapter: str) -> None:
    for path, shared in itertools.product(sorted(relay.BY_ADAPTER), (False, True)):
        assert relay.place(_request(path, body), BASE, shared=shared) == relay.Place(adapter=adapter)


@pytest.mark.parametrize("shared", [False, True])
def test_responses_that_are_kept_go_to_the_writer_unless_there_is_a_store(shared: bool) -> None:
    one, place = {"model": "poet", "input": "Hi"}, partial(relay.place, base=BASE, shared=shared)
    assert place(_request("/v1/responses", one | {"store": False})) == relay.Place(adapter="poet")
    wanted = relay.Place(writer=not shared, adapter="poet" if shared else "", repeatable=False)
    for more in ({}, {"store": True}, {"store": False, "previous_response_id": "resp_1"}):
        assert place(_request("/v1/responses", one | more)) == wanted


@pytest.mark.parametrize("what", ["merge", "warm", "verify"])
def test_routes_of_one_adapter_go_to_its_replica(what: str) -> None:
    paths = f"org/poet/{what}", f"org%2Fpoet%40sha256:1/{what}"
    for method, path in itertools.product(("GET", "POST", "DELETE"), paths):
        place = relay.place(_request(f"/v1/adapters/{path}", {}, method), BASE, shared=True)
        assert place == relay.Place(adapter="org/poet", repeatable=method == "GET")


async def test_every_body_that_names_an_adapter_to_use_goes_where_it_is(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        uses = {
            one.path
            for one in served.app.routes
            if isinstance(one, Operation)
            and not one.changes
            and any("model" in body.model_fields for body in one.bodies)
        }
    assert uses - {"/v1/fine_tuning/estimate"} == relay.BY_ADAPTER | {relay.RESPONSES}


async def _elsewhere(directory: Path, *, shared: bool) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """All routes, and those not routed to the writer."""
    async with serving(directory) as served:
        routes = {(one.method, one.path) for one in served.app.routes if isinstance(one, Operation)}
    away = set()
    for method, path in routes:
        found = relay.place(_request(path, {"store": False}, method), BASE, shared=shared)
        if not found.writer:
            away.add((method, path))
        if (method, path.rstrip("/")) not in BY_BODY:
            assert found.repeatable == (method == "GET")
    return routes, away


BY_BODY = {("POST", path) for path in relay.BY_ADAPTER | {"/v1/responses"}}


async def test_without_a_store_local_objects_are_requested_from_the_writer(tmp_path: Path) -> None:
    _, away = await _elsewhere(tmp_path, shared=False)
    assert away == BY_BODY | {("GET", path) for path in relay.BY_ANY_SERVER}


async def test_with_a_store_there_is_no_writer(tmp_path: Path) -> None:
    routes, away = await _elsewhere(tmp_path, shared=True)
    assert routes == away


def test_an_adapters_name_leads_nowhere_else() -> None:
    for name in ("poet/rollback#", "../files?x=", "a b", "100%", "org/poet"):
        path = relay.warm_path(name)
        assert re.fullmatch(r"/v1/adapters/[\w.%-]+/warm", path)
        assert unquote(path) == f"/v1/adapters/{name}/warm"


# --- headers, events, errors -------------------------------------------------------------------------------------


def test_headers_of_the_connection_stay_behind() -> None:
    given = [
        ("Host", "a"),
        ("Connection", "close, X-Mine"),
        ("x-mine", "1"),
        ("Authorization", "Bearer k"),
        ("TE", "x"),
    ]
    assert relay.forwarded(given) == [("host", "a"), ("authorization", "Bearer k")]
    assert relay.forwarded(given, but=frozenset({"host"})) == [("authorization", "Bearer k")]


def test_a_batch_ends_where_an_event_does() -> None:
    stream = b'data: {"a": 1}\n\ndata: {"b": 2}\n\ndata: [DONE]\n\n'
    for cut in range(len(stream) + 1):
        events, rest = relay.whole_events(stream[:cut])
        assert events + rest == stream[:cut]
        assert events == b"" or events.endswith(b"\n\n")
        assert b"\n\n" not in rest


class _Lost(Exception):
    pass


async def _dies(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
    raise _Lost


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages", "/v1/responses"])
async def test_a_stream_whose_server_dies_ends_with_an_error(path: str) -> None:
    stream = relay.ended_well(path, _dies(b"data: 1\n\n", b"data: 2\n\n"), lambda exc: isinstance(exc, _Lost))
    received = b"".join([chunk async for chunk in stream])
    assert received.startswith(b"data: 1\n\ndata: 2\n\n")
    *names, data = received.split(b"\n\n")[2].split(b"\n")
    assert names == ([] if path == "/v1/completions" else [b"event: error"])
    fields = json.loads(data.removeprefix(b"data: "))
    assert fields["error"]["message"] == "The server died; the answer is incomplete."
    assert received.endswith(b"}\n\n")


async def test_other_faults_are_not_hidden() -> None:
    stream = relay.ended_well("/v1/completions", _dies(b"data: 1\n\n"), lambda exc: False)
    with pytest.raises(_Lost):
        assert [chunk async for chunk in stream]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/messages"])
def test_refusals_have_the_servers_shape(path: str) -> None:
    ours = {
        503: EngineUnavailable("It died."),
        429: TooManyRequests("It died.", retry_after=1),
        413: RequestTooLarge("It died."),
    }
    for status, error in ours.items():
        wanted = json.loads(bytes(error_response(error, path).body))
        assert json.loads(relay.error(path, status, "It died.", str(error.code))) == wanted


def test_only_an_unknown_model_is_retried_at_another_server() -> None:
    body = b'{"error":{"message":"The model `x` does not exist.","param":"model","code":"model_not_found"}}'
    assert relay.is_unknown_model(relay.Head(404, []), body)
    assert not relay.is_unknown_model(relay.Head(400, []), body)
    assert not relay.is_unknown_model(relay.Head(404, []), body.replace(b"model_not_found", b"not_found"))


def test_the_metrics_of_all_are_one_page() -> None:
    gauge, counter = "# HELP up Whether.\n# TYPE up gauge\nup 1.0\n", "# HELP n_total Some.\n# TYPE n_total counter\n"
    page = gauge + counter + 'n_total{a="x} y"} 2.0\n'
    assert relay.merged_metrics({"r1": page, "r2": page}) == (
        '# HELP up Whether.\n# TYPE up gauge\nup{replica="r1"} 1.0\nup{replica="r2"} 1.0\n'
        "# HELP n_total Some.\n# TYPE n_total counter\n"
        'n_total{replica="r1",a="x} y"} 2.0\nn_total{replica="r2",a="x} y"} 2.0\n'
    )


# --- the child process ---------------------------------------------------------------------------------------------

_PARENT = """
import sys, time, lorakeet_child as child
one = child.Child([sys.executable, "-c", "import time; time.sleep(600)"], {}, print)
print(one.pid, flush=True)
time.sleep(600)
"""


def test_a_killed_parent_takes_its_child_along() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(child.__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", _PARENT], env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert alive(pid)
        time.sleep(0.3)  # also after exec of the command
        assert alive(pid)
        parent.send_signal(signal.SIGKILL)
    eventually(lambda: not alive(pid), 30, "the child's end")


def test_a_child_that_ends_is_told_and_one_that_is_stopped_is_not(tmp_path: Path) -> None:
    ended: list[int] = []
    child.Child([sys.executable, "-c", "raise SystemExit(3)"], os.environ, ended.append)
    eventually(lambda: ended == [3], 30, "its end")
    other = child.Child([sys.executable, "-c", "import time; time.sleep(600)"], os.environ, ended.append)
    other.stop(10)
    assert not other.running
    assert ended == [3]


def test_a_directory_is_free_again_when_its_child_has_gone(tmp_path: Path) -> None:
    first, lock = child.take_directory(tmp_path, "server")
    holder = child.Child([sys.executable, "-c", "import time; time.sleep(600)"], os.environ, print, lock)
    os.close(lock)
    second, other = child.take_directory(tmp_path, "server")
    assert (first.name, second.name) == ("server-0", "server-1")
    os.close(other)
    holder.stop(10)
    again, lock = child.take_directory(tmp_path, "server")
    assert again == first
    os.close(lock)


def test_the_command_is_this_environments_unless_told() -> None:
    assert child.command({}) == [str(Path(sys.executable).with_name("lorakeet")), "serve"]
    assert child.command({"LORAKEET_RAY_COMMAND": "/opt/x/python -c 'a b' serve"}) == [
        "/opt/x/python",
        "-c",
        "a b",
        "serve",
    ]
