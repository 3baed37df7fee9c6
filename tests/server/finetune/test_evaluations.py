"""Evaluations: the figures against a straightforward computation, and their course on a real engine."""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from server.client.engine import EngineDied
from server.engine.engine import Engine
from server.finetune import evaluations
from server.messages.protocol import Generate, Output
from server.services import TENANT
from tests.support import offline as engines
from tests.support.site import EXAMPLES, TrainingEngine, TuningSite, eventually, tuning_site
from tests.support.tiny import tiny_adapter


class ServingEngine(TrainingEngine):
    """Also generates, one step per turn of the event loop."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._engine = engine
        self._outputs: dict[str, list[Output]] = {}
        self.deaths = 0  # number of sequences still to die after their first step

    async def generate(self, request: Generate) -> AsyncGenerator[Output, None]:
        self._outputs[request.id] = []
        self._engine.add(request)
        while True:
            for output in self._engine.step()[0]:
                self._outputs[output.id].append(output)
            if self.deaths:
                self.deaths -= 1
                self._engine.abort(request.id)
                raise EngineDied("died")
            for output in self._outputs[request.id]:
                yield output
                if output.finish_reason or output.error:
                    return
            self._outputs[request.id].clear()
            await asyncio.sleep(0)


@pytest.fixture
async def site(tmp_path: Path, tiny_engine: Engine) -> AsyncIterator[TuningSite]:
    engine = ServingEngine(tiny_engine)
    async with tuning_site(tmp_path / "data", engine) as site:
        yield site
    engine.close()


async def evaluate(site: TuningSite, **body: Any) -> dict[str, Any]:
    """Create an evaluation and return it once it has ended."""
    response = await site.client.post("/v1/evaluations", json=body)
    assert response.status_code == 200, response.text
    return await over(site, response.json()["id"])


async def over(site: TuningSite, evaluation_id: str) -> dict[str, Any]:
    """The evaluation once it has ended."""
    await eventually(lambda: site.tuning.evaluations.store.get(TENANT, evaluation_id).status != "running")
    found: dict[str, Any] = (await site.client.get(f"/v1/evaluations/{evaluation_id}")).json()
    return found


def by_hand(engine: Engine, site: TuningSite, line: dict[str, Any], adapter: Any) -> tuple[float, int, str]:
    """Summed loss of the answer's tokens, their number, and the text generated in their place."""
    ask, answer = (message["content"] for message in line["messages"])
    tokenizer = site.text.tokenizer
    prompt = tokenizer.encode(f"<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n").ids
    expected = tokenizer.encode(f"{answer}<|im_end|>").ids
    score = engines.request("a", [*prompt, *expected], adapter, max_tokens=0, prompt_logprobs=0)
    free = engines.request("b", prompt, adapter, max_tokens=len(expected) + 8, ignore_eos=False)
    answers = engines.run(engine, [score, free])
    logprobs = [entry.logprob for entry in answers["a"].prompt_logprobs[-len(expected) :] if entry is not None]
    return -sum(logprobs), len(expected), tokenizer.decode(answers["b"].tokens)


async def test_the_numbers(site: TuningSite, tiny_engine: Engine, model_dir: Path, tmp_path: Path) -> None:
    directory = tiny_adapter(tmp_path / "adapter", model_dir)
    version, _ = await site.services.registry.publisher.import_directory(TENANT, "mine", directory)
    reference = engines.publish(tiny_engine, directory)
    lines = EXAMPLES[:4]
    done = await evaluate(site, model="mine", file=await site.upload(lines))
    assert (done["status"], done["examples"], done["digest"]) == ("succeeded", 4, version.digest)
    for name, adapter in (("base", None), ("adapter", reference)):
        rows = [by_hand(tiny_engine, site, line, adapter) for line in lines]
        tokens = sum(count for _, count, _ in rows)
        assert done["tokens"] == tokens
        loss = sum(loss for loss, _, _ in rows) / tokens
        assert done["results"][name]["loss"] == pytest.approx(loss, rel=1e-5)
        assert done["results"][name]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        texts = [
            (text.strip(), line["messages"][1]["content"].strip())
            for (_, _, text), line in zip(rows, lines, strict=True)
        ]
        assert done["results"][name]["exact_match"] == sum(a == b for a, b in texts) / 4


async def test_a_memorised_example_matches_exactly(site: TuningSite) -> None:
    file = await site.upload(EXAMPLES[:1])
    job = await site.create(
        training_file=file, hyperparameters={"n_epochs": 60}, training={"learning_rate": 1e-2, "checkpoint_every": 60}
    )
    tuned = (await site.until(job["id"]))["fine_tuned_model"]
    results = (await evaluate(site, model=tuned, file=file))["results"]
    assert (results["base"]["exact_match"], results["adapter"]["exact_match"]) == (0.0, 1.0)
    assert results["adapter"]["loss"] < 0.1 < results["base"]["loss"]


async def test_every_example_has_a_row_in_the_result_file(site: TuningSite, tmp_path: Path, model_dir: Path) -> None:
    directory = tiny_adapter(tmp_path / "adapter", model_dir)
    await site.services.registry.publisher.import_directory(TENANT, "mine", directory)
    done = await evaluate(site, model="mine", file=await site.upload(EXAMPLES[:3]))
    [result] = done["result_files"]
    content = (await site.client.get(f"/v1/files/{result}/content")).text
    rows = [json.loads(line) for line in content.splitlines()]
    assert [row["example"] for row in rows] == [1, 2, 3]
    asked = [[message["content"] for message in line["messages"]] for line in EXAMPLES[:3]]
    for row, (question, answer) in zip(rows, asked, strict=True):
        assert question in row["prompt"]
        assert row["expected"] == answer.strip()
        assert row["adapter"]["exact_match"] == (row["adapter"]["answer"] == row["expected"])
        assert row["adapter"]["loss"] != row["base"]["loss"]
    await site.client.delete(f"/v1/evaluations/{done['id']}")
    assert (await site.client.get(f"/v1/files/{result}")).status_code == 404


async def test_the_base_alone_and_a_text_without_answer(site: TuningSite) -> None:
    done = await evaluate(site, model="tiny", file=await site.upload([{"text": "The quick brown fox"}]))
    assert done["results"]["adapter"] is None
    assert done["results"]["base"]["exact_match"] is None
    assert done["results"]["base"]["loss"] > 0


async def test_an_engine_that_dies_costs_only_time(site: TuningSite) -> None:
    file = await site.upload(EXAMPLES[:3])
    calm = await evaluate(site, model="tiny", file=file)
    assert isinstance(site.engine, ServingEngine)
    site.engine.deaths = 1
    assert (await evaluate(site, model="tiny", file=file))["results"] == calm["results"]


async def test_an_engine_that_dies_twice_ends_it(site: TuningSite) -> None:
    file = await site.upload(EXAMPLES[:3])
    assert isinstance(site.engine, ServingEngine)
    site.engine.deaths = 100
    failed = await evaluate(site, model="tiny", file=file)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "engine_died")


async def test_an_evaluation_tries_again_when_its_adapter_is_late(
    tmp_path: Path, tiny_engine: Engine, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--adapter-store-seconds applies wherever a version is opened."""
    engine = ServingEngine(tiny_engine)
    async with tuning_site(tmp_path / "data", engine, adapter_store_seconds=0.1) as site:
        directory = tiny_adapter(tmp_path / "adapter", model_dir)
        await site.services.registry.publisher.import_directory(TENANT, "mine", directory)
        file = await site.upload(EXAMPLES[:1])
        engine.unready_reason = "still loading"
        created = (await site.client.post("/v1/evaluations", json={"model": "mine", "file": file})).json()

        tries = []

        async def never(_: object) -> None:
            tries.append(1)
            await asyncio.Event().wait()

        with monkeypatch.context() as patch:
            patch.setattr(evaluations, "SPACE_SECONDS", 0.01)
            patch.setattr(site.store, "has", lambda _: False)
            patch.setattr(site.store, "wait_until_ready", never)
            engine.unready_reason = None
            await eventually(lambda: len(tries) > 2)
            assert (await site.client.get(f"/v1/evaluations/{created['id']}")).json()["status"] == "running"
        assert (await over(site, created["id"]))["status"] == "succeeded"
    engine.close()


async def test_an_evaluation_begins_again_after_a_restart(tmp_path: Path, tiny_engine: Engine) -> None:
    engine = ServingEngine(tiny_engine)
    async with tuning_site(tmp_path / "data", engine) as site:
        file = await site.upload(EXAMPLES[:3])
        response = await site.client.post("/v1/evaluations", json={"model": "tiny", "file": file, "max_examples": 2})
    async with tuning_site(tmp_path / "data", engine) as site:
        found = await over(site, response.json()["id"])
    assert (found["status"], found["examples"]) == ("succeeded", 2)
    engine.close()


async def test_lists_and_refusals(site: TuningSite) -> None:
    file = await site.upload(EXAMPLES[:1])
    ids = [(await evaluate(site, model="tiny", file=file))["id"] for _ in range(2)]
    listed = (await site.client.get("/v1/evaluations?limit=1")).json()
    assert ([e["id"] for e in listed["data"]], listed["has_more"]) == (ids[:0:-1], True)
    assert (await site.client.delete(f"/v1/evaluations/{ids[0]}")).json()["deleted"]
    assert (await site.client.get(f"/v1/evaluations/{ids[0]}")).status_code == 404
    for body, param in (
        ({"model": "nobody", "file": file}, "model"),
        ({"model": "tiny", "file": "nobody"}, "file"),
        ({"model": "tiny"}, "file"),
        ({"model": "tiny", "file": file, "max_examples": 0}, "max_examples"),
        ({"model": "tiny", "file": file, "max_examples": 2**63}, "max_examples"),
        ({"model": "tiny", "file": file, "max_examples": True}, "max_examples"),
    ):
        response = await site.client.post("/v1/evaluations", json=body)
        assert response.status_code in (400, 404), response.text
        assert response.json()["error"]["param"] == param
    gone = await site.upload(EXAMPLES[:1])
    site.engine.unready_reason = "still loading"
    response = await site.client.post("/v1/evaluations", json={"model": "tiny", "file": gone})
    await site.client.delete(f"/v1/files/{gone}")
    site.engine.unready_reason = None
    assert (await over(site, response.json()["id"]))["error"]["code"] == "file_not_found"
