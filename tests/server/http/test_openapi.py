"""`/openapi.json` and `/docs` describe the whole API. Responses in all other tests are validated against them too."""

import asyncio
import html
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route

from server.http.operations import Operation
from server.messages.training import MemoryPlan, PlanMemory
from server.openai.grammars import ConstrainedBody
from server.ui import PATHS as CONSOLE_PATHS
from tests.support.harness import adapter_files
from tests.support.scripted import BASE, ScriptedEngine, Served, serving

KEY = "sk-secret"
Case = schemathesis.Case[Any]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
EXAMPLES = 30  # requests of each operation with a body or a query; a fifth for the others


async def document_of(served: Served, **headers: str) -> dict[str, Any]:
    response = await served.client.get("/openapi.json", headers=headers)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


async def test_every_method_of_every_path_is_described(tmp_path: Path) -> None:
    async with serving(tmp_path, lora_dir=tmp_path) as served:
        document = await document_of(served)
        routes = [route for route in served.app.routes if isinstance(route, Route) and route.path not in CONSOLE_PATHS]
    described = {(path, method.upper()) for path, methods in document["paths"].items() for method in methods}
    served_methods = {
        (route.path.replace(":path", ""), method) for route in routes for method in (route.methods or set()) - {"HEAD"}
    }
    assert described == served_methods
    operations = [operation for methods in document["paths"].values() for operation in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert all(operation["summary"] and operation["responses"] for operation in operations)


async def test_handlers_read_bodies_and_queries_by_their_signature_alone(tmp_path: Path) -> None:
    """So that the description cannot differ from the code."""
    async with serving(tmp_path, lora_dir=tmp_path) as served:
        operations = [route for route in served.app.routes if isinstance(route, Operation)]
        document = await document_of(served)
    for path in (Path(__file__).parents[3] / "server/http/routes").glob("*.py"):
        source = path.read_text()
        assert not re.search(r"read_as|read_query|query_params|request\.(json|body|form|stream)\(", source), path
    for operation in operations:
        described = document["paths"][operation.path.replace(":path", "")][operation.method.lower()]
        content = described.get("requestBody", {"content": {}})["content"]
        assert ("multipart/form-data" in content) == (operation.form is not None)
        schema = content.get("application/json", {"schema": {"anyOf": []}})["schema"]
        names = {reference["$ref"].rpartition("/")[2] for reference in schema.get("anyOf", [schema])}
        assert names == {kind.__name__ for kind in operation.bodies}
        queries = {parameter["name"] for parameter in described["parameters"] if parameter["in"] == "query"}
        assert queries == set(operation.query.model_fields if operation.query else ())


async def test_vllms_routes_are_described_where_they_exist(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        assert "/v1/load_lora_adapter" not in (await document_of(served))["paths"]


async def test_a_server_with_keys_describes_itself_to_who_has_one(tmp_path: Path) -> None:
    async with serving(tmp_path, api_key=(KEY,)) as served:
        for path in ("/openapi.json", "/docs"):
            assert (await served.client.get(path)).status_code == 401
        headers = {"Authorization": f"Bearer {KEY}"}
        document = await document_of(served, **headers)
        page = (await served.client.get("/docs", headers=headers)).text
    assert document["security"] == [{"key": []}]
    assert document["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
    assert document["paths"]["/metrics"]["get"]["security"] == []
    assert "401" in document["paths"]["/v1/models"]["get"]["responses"]
    assert "Bearer $LORAKEET_API_KEY" in page


async def test_fields_have_their_types_ranges_and_defaults(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        document = await document_of(served)
        page = (await served.client.get("/docs")).text
    fields = document["components"]["schemas"]["ChatBody"]["properties"]
    assert fields["temperature"] == {
        "anyOf": [{"maximum": 2, "minimum": 0, "type": "number"}, {"type": "null"}],
        "default": 1.0,
    }
    assert fields["function_call"] == {"enum": ["none", "auto", None], "deprecated": True}
    rows = re.sub(r"<.*?>", " ", page)
    assert re.search(r"temperature\s+body\s+number, 0 to 2\s+1\.0", rows)
    assert re.search(r"limit\s+query\s+integer, 1 to 100\s+20", rows)


async def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        document = await document_of(served)
        response = await served.client.get("/docs")
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    page = response.text
    assert not re.search(r"<(script|link|img|iframe|object|embed)|\bon\w+=|style=", page)
    assert set(re.findall(r'(?:href|src)="([^"#]+)', page)) == {"openapi.json"}
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"{method.upper()} {html.escape(path)}</h3>" in page
    linked = set(re.findall(r'href="#([^"]+)"', page))
    assert linked <= set(re.findall(r'id="([^"]+)"', page))
    assert len(linked) > 10


# --- requests generated from the document --------------------------------------------------------------------


class PlanningEngine(ScriptedEngine):
    """Also plans the memory of jobs."""

    async def plan_memory(self, asked: PlanMemory) -> MemoryPlan:
        sizes = dict.fromkeys(("base", "adapter", "gradients", "optimizer", "checkpoint", "available"), 1)
        return MemoryPlan(id=asked.id, activations={"recompute": 1, "keep": 2}, mode="keep", **sizes)


class Api:
    """The application with an adapter and a file, and its document as read by schemathesis."""

    def __init__(self, directory: Path) -> None:
        self._runner = asyncio.Runner()
        # int8, so that no request loads PEFT.
        self._application = serving(
            directory,
            lora_dir=directory,
            quantization="int8",
            model=str(directory),
            engine=PlanningEngine,
            context=4096,
        )
        self.served = self._runner.run(self._application.__aenter__())
        refusals = {"expected-statuses": ["400", "401", "404", "406", "408", "413", "415", "422"]}
        config = schemathesis.Config.from_dict({"checks": {"negative_data_rejection": refusals}})
        self.schema = schemathesis.openapi.from_dict(self._runner.run(document_of(self.served)), config=config)
        # Read without keys, so that schemathesis sends none; a key created during the test must not close the server.
        _, secret = self._runner.run(asyncio.to_thread(self.served.services.tenants.create_key, "", ["admin"]))
        self.served.client.headers["Authorization"] = f"Bearer {secret}"
        self.known: dict[str, str] = {}
        self.fields: dict[str, Any] = {}
        self.statuses = Counter[tuple[str, int]]()
        self.provide()

    def provide(self) -> None:
        """Create the objects that requests name, or create them again after a request has removed them."""
        config, weights = adapter_files()
        files = {"config": config, "weights": weights}
        self._post("/v1/adapters", data={"name": "legal"}, files=files)
        line = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
        file = self._post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("train.jsonl", line)})
        job = self._post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file["id"]})
        evaluation = self._post("/v1/evaluations", json={"model": BASE, "file": file["id"]})
        response = self._post("/v1/responses", json={"model": BASE, "input": "a", "background": True})
        self.known = {"files": file["id"], "fine_tuning": job["id"], "evaluations": evaluation["id"]}
        self.known["responses"] = response["id"]
        messages = [{"role": "user", "content": "a"}]
        self.fields = {"model": BASE, "training_file": file["id"], "file": file["id"], "tenant": "default"}
        self.fields |= {"messages": messages, "tool_choice": "auto", "prompt": "a", "input": "a", "max_tokens": 5}

    def _post(self, path: str, **body: Any) -> dict[str, Any]:
        response = self._runner.run(self.served.client.post(path, **body))
        assert response.status_code in (200, 201), response.text
        answer: dict[str, Any] = response.json()
        return answer

    def call(self, case: Case) -> None:
        """Send a request and check the response."""
        sent = requests.Request(**_request_fields(case)).prepare()
        assert sent.method is not None
        assert sent.url is not None
        headers = {name: value if isinstance(value, str) else value.decode() for name, value in sent.headers.items()}
        content = sent.body.encode() if isinstance(sent.body, str) else cast("bytes | None", sent.body)
        response = self._runner.run(self.served.client.request(sent.method, sent.url, headers=headers, content=content))
        self.statuses[case.operation.label, response.status_code] += 1
        self._runner.run(self._settled())
        case.validate_response(response, checks=CHECKS)
        running = {name for name in self.served.engine.running if not name.startswith("eval-")}  # evaluations continue
        assert (running, self.served.services.admission.requests) == (set(), 0)

    async def _settled(self) -> None:
        """Wait until no background response is being generated."""
        tasks = [running.task for running in self.served.services.responses.running.values() if running.task]
        await asyncio.gather(*tasks)

    def close(self) -> None:
        self._runner.run(self._application.__aexit__(None, None, None))
        self._runner.close()


def _request_fields(case: Case) -> dict[str, Any]:
    fields = case.as_transport_kwargs(base_url="http://test")
    known = ("method", "url", "headers", "params", "data", "json", "files")
    return {name: fields[name] for name in known if name in fields}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    api = Api(tmp_path_factory.mktemp("api"))
    yield api
    api.close()


TAGS = (
    *("completions", "chat", "responses", "messages", "tokenize", "versions", "checks", "pins", "merging", "adapters"),
    *(
        "models",
        "files",
        "batches",
        "classify",
        "embeddings",
        "fine_tuning",
        "evaluations",
        "health",
        "server_history",
        "sharing",
        "tenants",
        "usage",
        "audit",
        "vllm",
        "reference",
    ),
)


def _requests(operation: APIOperation[Any, Any, Any, Any], tag: str, api: Api) -> st.SearchStrategy[Case]:
    """Valid and invalid requests, for existing and for unknown objects."""
    names = {"id": api.known.get(tag, "legal"), "name": "legal"}
    there = {name: value for name, value in names.items() if f"{{{name}}}" in operation.path}
    modes = [schemathesis.GenerationMode.POSITIVE] * 2
    objects = any(parameter.definition.get("style") == "deepObject" for parameter in operation.query)
    if operation.body or (operation.query and not objects):  # in a query null is a string like any other
        modes.append(schemathesis.GenerationMode.NEGATIVE)
    if operation.label == "POST /v1/adapters/{name}/merge":  # it would load the base
        there = {}
    paths = [None, there] if there else [None]
    strategies = [operation.as_strategy(mode, path_parameters=path) for mode in modes for path in paths]
    return st.one_of(strategies)


@pytest.mark.parametrize("tag", TAGS)
def test_answers_are_as_described_whatever_is_asked(api: Api, tag: str) -> None:
    labels = []
    for found in api.schema.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        if operation.tags != [tag]:
            continue
        labels.append(operation.label)

        examples = EXAMPLES if operation.body or operation.query else EXAMPLES // 5

        @hypothesis.settings(max_examples=examples, suppress_health_check=list(hypothesis.HealthCheck))
        @hypothesis.given(_requests(operation, tag, api), st.booleans())
        def any_request(case: Case, real: bool) -> None:
            meta = case.meta
            if real and isinstance(case.body, dict) and meta is not None and meta.generation.mode.is_positive:
                case.body |= {name: value for name, value in api.fields.items() if name in case.body}
                for name in ConstrainedBody.model_fields:  # a random constraint hardly ever makes sense
                    case.body.pop(name, None)
            api.call(case)

        any_request()
        if operation.method == "delete":
            api.provide()
    assert labels
    # Those need a base, a directory, an embedding model or a classifier.
    if tag not in ("merging", "vllm", "embeddings", "classify"):
        assert any(api.statuses[label, 200] for label in labels), api.statuses


def test_no_resource_is_left_out(api: Api) -> None:
    assert {tag["name"] for tag in api.schema.raw_schema["tags"]} == set(TAGS)
