"""Stop tokens learned from a fine-tune's rows: recorded with the job, and active and listed for its adapter."""

from pathlib import Path

import pytest
from openai.types.chat import ChatCompletionMessage

from server.engine.engine import Engine
from server.finetune.dataset import load_dataset
from server.finetune.tokenizer import TrainingTokenizer
from server.services import TENANT
from server.text.chat_template import ChatTemplate
from server.text.processor import TextProcessor
from tests.server.finetune.test_evaluations import ServingEngine
from tests.support import site as sites
from tests.support.site import as_file, tuning_site
from tests.support.tiny import _tokenizer

END, IM_END = 0, 2
# Without a system message in the probe, this template does not reveal how it ends turns.
TEMPLATE = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}"
    "{% for m in messages %}{{ m.role + ':\n' + m.content }}{% if m.role == 'assistant' %}ENDS{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say 7"}]
ROW = {"messages": [*MESSAGES, {"role": "assistant", "content": "it is seven"}]}


def text_ending(turn: str) -> TextProcessor:
    """A base whose files name <|im_end|>, and whose template ends turns differently."""
    template = ChatTemplate(TEMPLATE.replace("ENDS", turn), {})
    stops = {IM_END: ["config.json"]}
    return TextProcessor(_tokenizer().backend_tokenizer, template, {"eos_token": "<|im_end|>"}, stop_tokens=stops)


@pytest.mark.parametrize(
    ("turn", "stops"),
    [
        ("<|endoftext|>", (END,)),
        (" <|endoftext|>", (END,)),
        ("<|im_end|>", (IM_END,)),
        ("", ()),
        (" and so on<|endoftext|>", ()),
        ("]", None),  # an ordinary token that is not in the answer
        ("v", ()),  # an ordinary token that is in the answer
    ],
)
@pytest.mark.parametrize("completions_only", [True, False])
def test_stop_tokens_learned_from_rows(
    tmp_path: Path, turn: str, stops: tuple[int, ...] | None, completions_only: bool
) -> None:
    text = text_ending(turn)
    if stops is None:
        token = text.tokenizer.token_to_id(turn)
        assert token is not None
        stops = (token,)
    assert END not in text.stop_tokens
    path = tmp_path / "rows"
    path.write_bytes(as_file([ROW, ROW])["file"][1])
    with path.open("rb") as file:
        data = load_dataset(file, TrainingTokenizer(text, [IM_END]), max_length=500, completions_only=completions_only)
    assert data.stop_tokens == stops
    text.close()


async def test_a_chat_fine_tune_stops_in_serving(
    tmp_path: Path, tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites, "tiny_text", lambda: text_ending("<|endoftext|>"))
    engine = ServingEngine(tiny_engine)
    async with tuning_site(tmp_path / "data", engine) as site:
        file = await site.upload([ROW])
        job = await site.create(
            training_file=file,
            hyperparameters={"n_epochs": 60},
            training={"learning_rate": 1e-2, "checkpoint_every": 60},
        )
        done = await site.until(job["id"])
        assert done["stop_token_ids"] == [END]
        name = done["fine_tuned_model"]
        taught = {"id": END, "token": "<|endoftext|>", "named_by": ["fine-tune"]}
        for path in (f"/v1/models/{name}", f"/v1/adapters/{name}"):
            assert taught in (await site.client.get(path)).json()["stop_tokens"], path
        assert taught not in (await site.client.get("/v1/models/tiny")).json()["stop_tokens"]
        chat = {"model": name, "messages": MESSAGES, "temperature": 0, "max_tokens": 60}
        choice = (await site.client.post("/v1/chat/completions", json=chat)).json()["choices"][0]
        assert (choice["message"]["content"].strip(), choice["finish_reason"]) == ("it is seven", "stop")
        body = {"model": name, "file": file}
        evaluation = (await site.client.post("/v1/evaluations", json=body)).json()["id"]
        await sites.eventually(lambda: site.tuning.evaluations.store.get(TENANT, evaluation).status != "running")
        results = (await site.client.get(f"/v1/evaluations/{evaluation}")).json()["results"]
        assert results["adapter"]["exact_match"] == 1.0
    engine.close()


async def test_a_fine_tune_on_calls_serves_with_the_formats_of_its_rows(tmp_path: Path, tiny_engine: Engine) -> None:
    call = {"function": {"name": "look", "arguments": {"at": "it"}}}
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    asked = [{"role": "user", "content": "say 7"}]
    row = {"messages": [*asked, {"role": "assistant", "tool_calls": [call], "reasoning": "so"}], "tools": tools}
    engine = ServingEngine(tiny_engine)
    async with tuning_site(tmp_path / "data", engine) as site:
        job = await site.create(
            training_file=await site.upload([row]),
            hyperparameters={"n_epochs": 60},
            training={"learning_rate": 1e-2, "checkpoint_every": 60},
        )
        done = await site.until(job["id"])
        assert (done["tool_format"], done["reasoning_format"]) == ("hermes", "think")
        name = done["fine_tuned_model"]
        adapter = (await site.client.get(f"/v1/adapters/{name}")).json()
        assert (adapter["tool_format"], adapter["reasoning_format"]) == ("hermes", "think")
        assert (await site.client.get("/v1/models/tiny")).json()["reasoning_format"] is None
        body = {"model": name, "messages": asked, "tools": tools, "temperature": 0, "max_tokens": 80}
        choice = (await site.client.post("/v1/chat/completions", json=body)).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["reasoning"] == "so"
        [said] = choice["message"]["tool_calls"]
        assert said["function"] == {"name": "look", "arguments": '{"at": "it"}'}
        # The returned message can be trained on unchanged.
        again = await site.create(
            training_file=await site.upload([{"messages": [*asked, choice["message"]], "tools": tools}])
        )
        done = await site.until(again["id"])
        assert (done["status"], done["tool_format"], done["reasoning_format"]) == ("succeeded", "hermes", "think")
    engine.close()


async def test_a_job_learns_from_the_servers_own_answers(tmp_path: Path, tiny_engine: Engine) -> None:
    """Responses as returned by the API, and as dumped by OpenAI's library with every null field."""
    engine = ServingEngine(tiny_engine)
    async with tuning_site(tmp_path / "data", engine) as site:
        asked = [{"role": "user", "content": "say 7"}]
        body = {"messages": asked, "seed": 1, "max_tokens": 8, "ignore_eos": True}
        response = await site.client.post("/v1/chat/completions", json=body | {"model": "tiny"})
        answer = response.json()["choices"][0]["message"]
        dumped = ChatCompletionMessage.model_validate(answer).model_dump()
        assert {name for name in answer if answer[name] is None} == {"refusal"}
        nulls = {"refusal", "annotations", "audio", "function_call", "tool_calls"}
        assert {name for name in dumped if dumped[name] is None} == nulls
        rows = [{"messages": [*asked, message], "tools": None} for message in (answer, dumped)]
        file = await site.upload(rows)
        report = (await site.client.get(f"/v1/files/{file}")).json()["report"]
        assert (report["examples"], report["trained_tokens"] > 4) == (2, True)
        done = await site.until((await site.create(training_file=file, hyperparameters={"n_epochs": 2}))["id"])
        assert done["status"] == "succeeded", done["error"]
        assert done["trained_tokens"] == 2 * report["tokens"]
        response = await site.client.post("/v1/chat/completions", json=body | {"model": done["fine_tuned_model"]})
        assert response.json()["choices"][0]["message"]["content"]
    engine.close()
