"""Isolation of tenants on every route: another tenant's object gets the same response as a nonexistent one."""

import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.http.operations import Operation
from tests.support.scripted import BASE, Served, serving
from tests.support.tenancy import Headers, Owned, answer, furnish, key

# The kind of the object in a path, by the beginning of the path.
KINDS = {
    "/v1/models/{id:path}": "adapter",
    "/v1/adapters/{name:path}": "adapter",
    "/v1/files/{id}": "file",
    "/v1/fine_tuning/jobs/{id}": "job",
    "/v1/evaluations/{id}": "evaluation",
    "/v1/batches/{id}": "batch",
    "/v1/responses/{id}": "response",
    "/v1/admin/keys/{id}": "key",
    "/v1/admin/tenants/{id}": "tenant",
}
NOBODYS = Owned(
    adapter="nobody",
    digest="0123456789abcdef" * 4,
    file="file-0123456789abcdef01234567",
    batch_file="file-0123456789abcdef01234567",
    job="ftjob-0123456789abcdef01234567",
    evaluation="eval-nobody",
    batch="batch_0123456789abcdef01234567",
    response=f"resp_{'0' * 32}",
    key="lk-00000000",
    tenant="nobody",
)
_HI = [{"role": "user", "content": "Hi"}]
# Bodies of routes without an object in the path: `{kind}` stands for an object's id, `{own}` for the caller's file.
# None: the body names no object.
BODIES: dict[str, list[dict[str, Any]] | None] = {
    "POST /v1/completions": [
        {"model": "{adapter}", "prompt": "Hi"},
        {"model": "{adapter}@{digest}", "prompt": "Hi"},
        {"model": BASE, "adapter_id": "{adapter}", "prompt": "Hi"},
        {"model": BASE, "adapters": [{"id": "{adapter}"}], "prompt": "Hi"},
    ],
    "POST /v1/chat/completions": [
        {"model": "{adapter}", "messages": _HI},
        {"model": BASE, "adapter_id": "{adapter}", "messages": _HI},
        {"model": BASE, "adapters": [{"id": "{adapter}", "weight": 0.5}], "messages": _HI},
    ],
    "POST /v1/messages": [{"model": "{adapter}", "max_tokens": 4, "messages": _HI}],
    "POST /v1/messages/count_tokens": [{"model": "{adapter}", "messages": _HI}],
    "POST /v1/responses": [
        {"model": "{adapter}", "input": "Hi"},
        {"model": BASE, "adapter_id": "{adapter}", "input": "Hi"},
        {"model": BASE, "adapters": [{"id": "{adapter}"}], "input": "Hi"},
        {"model": BASE, "input": "Hi", "previous_response_id": "{response}"},
        {"model": BASE, "input": [{"type": "item_reference", "id": "msg_{response}"}]},
    ],
    "POST /v1/responses/input_tokens": [
        {"model": "{adapter}", "input": "Hi"},
        {"model": BASE, "adapter_id": "{adapter}", "input": "Hi"},
        {"model": BASE, "adapters": [{"id": "{adapter}"}], "input": "Hi"},
        {"model": BASE, "input": "Hi", "previous_response_id": "{response}"},
        {"model": BASE, "input": [{"type": "item_reference", "id": "msg_{response}"}]},
    ],
    "POST /v1/embeddings": [{"model": "{adapter}", "input": "Hi"}],
    "POST /v1/classify": [
        {"model": "{adapter}", "input": "Hi"},
        {"model": "{adapter}", "messages": _HI},
        {"model": BASE, "adapter_id": "{adapter}", "input": "Hi"},
        {"model": BASE, "adapter_id": "{adapter}", "messages": _HI},
    ],
    "POST /tokenize": [{"model": "{adapter}", "prompt": "Hi"}, {"model": "{adapter}", "messages": _HI}],
    "POST /detokenize": [{"model": "{adapter}", "tokens": [1]}],
    "POST /v1/adapters": [{"name": "mixed", "mix": [{"adapter": "{adapter}"}], "method": "cat"}],
    "POST /v1/load_lora_adapter": [{"lora_name": "{adapter}", "lora_path": "nothing"}],
    "POST /v1/unload_lora_adapter": [{"lora_name": "{adapter}"}],
    "POST /v1/fine_tuning/jobs": [
        {"model": BASE, "training_file": "{file}"},
        {"model": BASE, "training_file": "{own}", "validation_file": "{file}"},
        {"model": "{adapter}", "training_file": "{own}"},
    ],
    "POST /v1/fine_tuning/estimate": [{"model": "{adapter}"}],
    "POST /v1/evaluations": [{"model": "{adapter}", "file": "{own}"}, {"model": BASE, "file": "{file}"}],
    "POST /v1/batches": [
        {"input_file_id": "{batch_file}", "endpoint": "/v1/completions", "completion_window": "24h"},
    ],
    "POST /v1/files": None,
    "POST /v1/admin/tenants": None,
    "POST /v1/admin/keys": [{"tenant": "{tenant}"}],
}
# Fields of bodies that name an object; each must occur in the bodies above.
NAMING = {
    *("model", "adapter_id", "adapters[].id", "mix[].adapter", "lora_name", "digest", "tenant"),
    *("file", "training_file", "validation_file", "input_file_id", "previous_response_id", "input[].id"),
}
# Fields that name none, by the end of their paths: text, choices, and names chosen by the sender.
OTHERS = {
    *(
        "prompt",
        "prompt[]",
        "prompts[]",
        "input",
        "input[]",
        "content",
        "text",
        "instructions",
        "system",
        "data",
        "output",
    ),
    *("thinking", "signature", "reasoning", "reasoning_content", "encrypted_content", "refusal", "arguments"),
    *("stop", "stop[]", "stop_sequences[]", "guided_choice[]", "guided_grammar", "guided_json", "guided_regex"),
    *("guided_whitespace_pattern", "whitespace_pattern", "choice[]", "grammar", "json", "regex", "structural_tag"),
    *("begin", "end", "triggers[]", "description", "reasoning_effort", "verbosity", "scope", "mode", "ttl"),
    *("cache_salt", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user", "user_id"),
    *("tool_call_id", "tool_use_id", "call_id", "content[].id", "previous_message_id"),
    *("suffix", "bias", "modules_to_save[]", "target_modules", "target_modules[]", "target_parameters[]"),
    *("name", "source", "lora_path", "tenants[]", "adapters[]"),  # of objects created, fetched, shared or bound
    "base_model_name",  # a note that is never looked up
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# Bodies of routes with an object in the path.
OPTIONAL_FILES: dict[str, dict[str, Any]] = {
    "promote": {"digest": "{digest}"},
    "merge": {"to": "checkpoint"},
    "share": {"tenants": ["acme"]},
    "/v1/admin/tenants/{id}": {"limits": {}},
}


@asynccontextmanager
async def two_tenants(directory: Path) -> AsyncIterator[tuple[Served, Headers, Owned, Owned]]:
    """An application, the headers and objects of one tenant, and the objects of another."""
    async with serving(directory, lora_dir=directory / "lora", allowed_origins=("*",)) as served:
        headers = {tenant: await key(served, tenant) for tenant in ("acme", "rival")}
        ours = await furnish(served, directory, "acme", "ours", headers["acme"])
        theirs = await furnish(served, directory, "rival", "theirs", headers["rival"])
        yield served, headers["acme"], ours, theirs


def operations(served: Served) -> list[Operation]:
    return [route for route in served.app.routes if isinstance(route, Operation)]


def filled(value: Any, ids: Mapping[str, str]) -> Any:
    """The path or body with the ids inserted by kind."""
    if isinstance(value, str):
        for kind, id_ in ids.items():
            value = value.replace(f"{{{kind}}}", id_.removeprefix("resp_") if f"msg_{{{kind}}}" in value else id_)
        return value
    if isinstance(value, dict):
        return {name: filled(item, ids) for name, item in value.items()}
    return [filled(item, ids) for item in value] if isinstance(value, list) else value


def asked(operation: Operation) -> list[tuple[str, dict[str, Any] | None]]:
    """An operation's paths and bodies that name objects. Fails for an operation missing from the tables above."""
    name = f"{operation.method} {operation.path}"
    if not operation.param_convertors:
        if not (operation.bodies or operation.form):
            return []
        assert name in BODIES, f"{name}: which objects does its body name?"
        return [(operation.path, body) for body in BODIES[name] or []]
    path = next((path for path in KINDS if operation.path.startswith(path)), None)
    assert path is not None, f"{name}: what does its path name?"
    rest = operation.path.removeprefix(path).replace("{file}", "model.safetensors")
    body = None
    if operation.method == "POST":
        body = OPTIONAL_FILES.get(operation.path) or OPTIONAL_FILES.get(operation.path.rpartition("/")[2])
    return [(f"{path.partition('{')[0]}{{{KINDS[path]}}}{rest}", body)]


async def test_other_tenants_objects_answer_like_unknown_ones(tmp_path: Path) -> None:
    async with two_tenants(tmp_path) as (served, headers, ours, theirs):
        seen = 0
        for operation in operations(served):
            for path, body in asked(operation):
                told = []
                for owned in (theirs, NOBODYS):
                    ids = vars(owned) | {"own": ours.file}
                    json = {} if body is None else {"json": filled(body, ids)}
                    response = await served.client.request(operation.method, filled(path, ids), headers=headers, **json)
                    told.append(answer(response, *vars(owned).values(), owned.response.removeprefix("resp_")))
                assert told[0] == told[1], f"{operation.method} {path} {body}"
                assert told[0][0] in (400, 403, 404), f"{operation.method} {path} {body}: {told[0]}"
                assert told[0][0] != 403 or path.startswith("/v1/admin"), path
                seen += 1
        assert seen > 60
        # Nothing of the other tenant has been removed.
        everything = [(path, theirs) for path in KINDS if "/admin/" not in path]
        rival = await key(served, "rival")
        for path, owned in everything:
            found = await served.client.get(f"{path.partition('{')[0]}{getattr(owned, KINDS[path])}", headers=rival)
            assert found.status_code == 200, found.text
        assert ours.adapter


def text_fields(schema: Mapping[str, Any], defined: Mapping[str, Any], path: str, seen: frozenset[str]) -> set[str]:
    """Paths of all fields of a JSON schema that accept any text."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return set() if name in seen else text_fields(defined[name], defined, path, seen | {name})
    found = {path} if schema.get("type") == "string" and not {"enum", "const"} & schema.keys() else set()
    parts = [(path, part) for key in ("anyOf", "oneOf", "allOf") for part in schema.get(key, ())]
    parts += [(f"{path}.{name}".lstrip("."), part) for name, part in schema.get("properties", {}).items()]
    parts += [(f"{path}[]", schema["items"])] if isinstance(schema.get("items"), dict) else []
    return found.union(*(text_fields(part, defined, place, seen) for place, part in parts))


def mentioned(value: Any, path: str = "") -> set[str]:
    """Paths of a body's fields that contain an object's id."""
    if isinstance(value, dict):
        return set[str]().union(*(mentioned(item, f"{path}.{name}".lstrip(".")) for name, item in value.items()))
    if isinstance(value, list):
        return set[str]().union(*(mentioned(item, f"{path}[]") for item in value))
    return {path} if isinstance(value, str) and "{" in value else set()


async def test_every_body_field_that_may_name_an_object_is_tried(tmp_path: Path) -> None:
    async with two_tenants(tmp_path) as (served, *_):
        for operation in operations(served):
            name = f"{operation.method} {operation.path}"
            bodies = [body for _, body in asked(operation) if body is not None]
            for kind in operation.bodies:
                schema = kind.model_json_schema()
                fields = text_fields(schema, schema.get("$defs", {}), "", frozenset())
                unknown = {
                    field
                    for field in fields - NAMING - {"id"}  # the id of a new tenant
                    if OTHERS.isdisjoint({field, field.rpartition(".")[2], ".".join(field.split(".")[-2:])})
                }
                assert unknown == set(), f"{name}: do these name an object?"
                tried = set[str]().union(*map(mentioned, bodies))
                assert fields & NAMING <= tried, f"{name}: some fields that may name an object are not tried"


async def test_all_methods_and_query_parameters_hide_other_tenants_objects(tmp_path: Path) -> None:
    """With every method, and with another tenant's id in any query parameter, such as the cursor of a list."""
    async with two_tenants(tmp_path) as (served, headers, _, theirs):

        async def told(method: str, path: str, owned: Owned, **options: Any) -> Any:
            response = await served.client.request(method, path, headers=headers, **options)
            return answer(response, *vars(owned).values(), owned.response.removeprefix("resp_"))

        seen = 0
        for operation in operations(served):
            for path, _ in asked(operation) if operation.param_convertors else []:
                for method in METHODS:
                    both = [await told(method, filled(path, vars(one)), one) for one in (theirs, NOBODYS)]
                    assert both[0] == both[1], f"{method} {path}"
                    assert both[0][0] >= 400 or method == "OPTIONS", f"{method} {path}: {both[0]}"
            for parameter in operation.query.model_fields if operation.query else ():
                for path, _ in asked(operation) or [(operation.path, None)]:
                    for kind in vars(theirs):
                        both = [
                            await told(
                                operation.method,
                                filled(path, vars(one)),
                                one,
                                params={parameter: getattr(one, kind)},
                            )
                            for one in (theirs, NOBODYS)
                        ]
                        assert both[0] == both[1], f"{operation.method} {path}?{parameter}= a {kind}"
                        seen += 1
        assert seen > 200


async def test_lists_show_only_the_callers_objects(tmp_path: Path) -> None:
    async with two_tenants(tmp_path) as (served, headers, _, theirs):
        lists = [
            operation
            for operation in operations(served)
            if operation.method == "GET" and not operation.param_convertors and operation.path.startswith("/v1/")
        ]
        for operation in lists:
            response = await served.client.get(operation.path, headers=headers)
            assert response.status_code == (403 if operation.path == "/v1/server/history" else 200), response.text
            for kind, id_ in vars(theirs).items():
                assert id_ not in response.text, f"{operation.path} shows their {kind}"
            if response.status_code == 200 and "/admin/" not in operation.path:
                assert len(response.json()["data"]) >= 1, operation.path


async def test_tenants_have_separate_names_and_share_the_base(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        headers = {tenant: await key(served, tenant) for tenant in ("", "acme", "rival")}
        digests = {}
        for tenant, sender in headers.items():
            owned = await furnish(served, tmp_path, tenant, f"{tenant}x", sender)
            version, _ = await served.services.registry.publisher.import_directory(
                tenant, "same", tmp_path / f"of-{tenant}-{tenant}x"
            )
            digests[tenant] = version.digest
            assert owned.digest in version.digest
        for tenant, sender in headers.items():
            for model, digest in (("same", digests[tenant]), (BASE, served.engine.info.base_digest)):  # type: ignore[union-attr]
                body = {"model": model, "prompt": "Hi", "max_tokens": 2}
                response = await served.client.post("/v1/completions", json=body, headers=sender)
                assert response.headers["X-Adapter-Digest"] == digest
                assert served.engine.requests[-1].tenant == tenant, "a KV block's key begins with it"
        assert len(set(digests.values())) == 3
        gone = await served.client.delete("/v1/adapters/same", headers=headers["acme"])
        assert gone.status_code == 200
        listed = await served.client.get("/v1/models", headers=headers["rival"])
        assert "same" in [model["id"] for model in listed.json()["data"]]


async def test_use_of_equal_names_is_counted_apart(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        for tenant, requests in (("", 1), ("acme", 2)):
            sender = await key(served, tenant)
            directory = tmp_path / f"of-{tenant}-same"
            await furnish(served, tmp_path, tenant, "same", sender)
            assert directory.is_dir()
            for _ in range(requests):
                body = {"model": "same", "prompt": "Hi", "max_tokens": 2}
                await served.client.post("/v1/completions", json=body, headers=sender)
            adapter = (await served.client.get("/v1/adapters/same", headers=sender)).json()
            assert adapter["requests"] == requests


async def test_content_lasts_as_long_as_any_tenant_names_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        first, second = await key(served, "acme"), await key(served, "rival")
        await furnish(served, tmp_path, "acme", "one", first)
        publisher = served.services.registry.publisher
        version, _ = await publisher.import_directory("rival", "two", tmp_path / "of-acme-one")
        assert (await served.client.delete("/v1/adapters/one", headers=first)).status_code == 200
        body = {"model": "two", "prompt": "Hi", "max_tokens": 2}
        response = await served.client.post("/v1/completions", json=body, headers=second)
        assert (response.status_code, response.headers["X-Adapter-Digest"]) == (200, version.digest)
        assert (await served.client.get("/v1/adapters/two/weights", headers=second)).status_code == 200


async def _times(
    directory: Path, tries: int, alike: Callable[[list[float], list[float]], bool]
) -> dict[str, list[list[float]]]:
    """Seconds taken by requests for another tenant's and for a nonexistent object of every kind, in random order.

    If they are not `alike`, they are measured again, twice at most, since the machine may be busy.
    """
    found: dict[str, list[list[float]]] = {}
    async with (
        two_tenants(directory) as (served, headers, _, theirs),
        # Without schema validation of responses, which takes longer, and as long as the response itself.
        httpx.AsyncClient(transport=httpx.ASGITransport(served.app), base_url="http://test") as client,
    ):
        for path, kind in [one for one in KINDS.items() for _ in range(3)]:
            if path in found and alike(*found[path]):
                continue
            paths = [path.partition("{")[0] + getattr(owned, kind) for owned in (theirs, NOBODYS)]
            times: list[list[float]] = [[], []]
            for i in random.Random(3).sample([0, 1] * tries, 2 * tries):
                started = time.perf_counter()
                response = await client.get(paths[i], headers=headers)
                times[i].append(time.perf_counter() - started)
                refusal = response.json()["error"]
                assert response.status_code == 404
                assert refusal["param"] is not None, "the object is unknown, not the route"
            found[path] = times
    return found


async def test_a_refusal_takes_about_as_long(tmp_path: Path) -> None:
    def alike(theirs: list[float], nobodys: list[float]) -> bool:
        return min(theirs) == pytest.approx(min(nobodys), rel=0.5)

    for path, times in (await _times(tmp_path, 40, alike)).items():
        assert alike(*times), path


@pytest.mark.slow
async def test_a_refusal_takes_as_long(tmp_path: Path) -> None:
    def alike(theirs: list[float], nobodys: list[float]) -> bool:
        return statistics.median(theirs) == pytest.approx(statistics.median(nobodys), rel=0.05)

    for path, times in (await _times(tmp_path, 1000, alike)).items():
        theirs, nobodys = map(statistics.median, times)
        print(f"{path}: {theirs * 1e6:.0f} and {nobodys * 1e6:.0f} us")
        assert alike(*times), path
