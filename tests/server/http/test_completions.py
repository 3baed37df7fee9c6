"""`/v1/completions` in front of a scripted engine: responses, stopping, adapters, failures."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from server.messages.protocol import Generate
from server.tenants.caller import OPERATOR_CALLER
from tests.support.completions import complete, events, joined
from tests.support.scripted import BASE, BASE_DIGEST, EOS, TEXT, Served, encode, serving, unavailable


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


# --- responses ---------------------------------------------------------------------------------------


async def test_an_answer_has_openais_shape(served: Served) -> None:
    response = await complete(served)
    assert response.status_code == 200
    assert response.headers["x-adapter-digest"] == BASE_DIGEST
    body = response.json()
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 1.7e9
    generated = len(encode(TEXT)) + 1
    assert body == {
        "object": "text_completion",
        "model": BASE,
        "system_fingerprint": BASE_DIGEST,
        "choices": [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
        "usage": {
            "prompt_tokens": len(encode("Hi")),
            "completion_tokens": generated,
            "total_tokens": len(encode("Hi")) + generated,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_a_stream_says_the_same_and_ends_with_done(served: Served) -> None:
    chunks = events(await complete(served, stream=True))
    assert chunks[-1] == "[DONE]"
    assert joined(chunks) == TEXT
    assert len(chunks) > 5
    assert {chunk["id"] for chunk in chunks[:-1]} == {chunks[0]["id"]}
    assert all("usage" not in chunk for chunk in chunks[:-1])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-2:] == [None, "stop"]


async def test_usage_comes_last_when_asked_for(served: Served) -> None:
    served.engine.cached_tokens = 1
    chunks = events(await complete(served, stream=True, stream_options={"include_usage": True}))
    assert all(chunk["usage"] is None for chunk in chunks[:-2])
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert chunks[-2]["usage"]["completion_tokens"] == len(encode(TEXT)) + 1


async def test_drafts_are_predictions_in_the_usage(served: Served) -> None:
    served.engine.drafted = (3, 1)
    usage = (await complete(served)).json()["usage"]
    steps = len(encode(TEXT)) + 1
    assert usage["completion_tokens"] == steps, "rejected drafts are not completion tokens"
    predictions = {"accepted_prediction_tokens": steps, "rejected_prediction_tokens": 2 * steps}
    assert usage["completion_tokens_details"] == predictions


async def test_a_request_speculates_as_it_asks_or_else_as_the_server_is_set(tmp_path: Path) -> None:
    async with serving(tmp_path, speculative_tokens=4) as served:
        for asked in (None, 0, 7):
            await complete(served, speculative_tokens=asked)
        assert [request.sampling.speculative_tokens for request in served.engine.requests] == [4, 0, 7]
        refused = await complete(served, speculative_tokens=33)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "speculative_tokens")


async def test_max_tokens_is_16_unless_told(served: Served) -> None:
    served.engine.reply = lambda request: encode(TEXT * 3)
    body = (await complete(served, max_tokens=None)).json()
    assert body["usage"]["completion_tokens"] == 16
    assert body["choices"][0]["finish_reason"] == "length"


# --- prompts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("Hi", [encode("Hi")]),
        (["Hi", "the fox"], [encode("Hi"), encode("the fox")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        ("<|im_start|>x", [[1, *encode("x")]]),
    ],
)
async def test_prompts_come_as_text_and_as_ids(served: Served, prompt: Any, sent: list[list[int]]) -> None:
    body = (await complete(served, prompt=prompt)).json()
    assert [request.prompt for request in served.engine.requests] == sent
    assert [choice["index"] for choice in body["choices"]] == list(range(len(sent)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, sent))


@pytest.mark.parametrize("prompt", ["", [], [[]], [5, "x"], ["x", 5], [True], [-1], [512], [[5], [512]], {}, 5, 1.5])
async def test_other_prompts_are_refused(served: Served, prompt: Any) -> None:
    response = await complete(served, prompt=prompt)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert served.engine.requests == []


@pytest.mark.parametrize("prompt", [[-1], [5, 1 << 40], [[5], [-1]], [10**300]])
async def test_an_id_that_no_model_has_is_told_so(served: Served, prompt: Any) -> None:
    response = await complete(served, prompt=prompt)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt")
    assert "a token id is from 0" in response.json()["error"]["message"]


# --- several samples ---------------------------------------------------------------------------------


async def test_samples_have_seeds_of_their_own_and_share_a_prompt(served: Served) -> None:
    served.engine.cached_tokens = 1
    served.engine.reply = lambda request: [*encode(f" sample {request.sampling.seed}"), EOS]
    body = (await complete(served, prompt=["a", "b"], n=3, seed=7)).json()
    assert [choice["text"] for choice in body["choices"]] == [" sample 7", " sample 8", " sample 9"] * 2
    assert body["usage"]["prompt_tokens"] == 2
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    assert body["usage"]["completion_tokens"] == 6 * (len(encode(" sample 7")) + 1)


async def test_further_samples_wait_for_the_first_ones_prompt(served: Served) -> None:
    seen: list[tuple[int, int]] = []

    async def gate(request: Generate, step: int) -> None:
        seen.append((request.sampling.seed, step))
        await asyncio.sleep(0)

    served.engine.gate = gate
    chunks = events(await complete(served, n=3, seed=0, stream=True))
    assert seen[0] == (0, 0)
    assert seen.index((1, 0)) > seen.index((0, 0))
    assert served.engine.requests[1].sampling.seed == 1
    for index in range(3):
        assert joined(chunks, index) == TEXT


async def test_without_a_seed_every_request_has_another(served: Served) -> None:
    for _ in range(2):
        await complete(served)
    first, second = served.engine.requests
    assert first.sampling.seed != second.sampling.seed


# --- stopping -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_text_and_the_work(served: Served, stream: bool) -> None:
    response = await complete(served, stop=["jumps", "zebra"], stream=stream)
    choice = events(response)[-2]["choices"][0] if stream else response.json()["choices"][0]
    text = joined(events(response)) if stream else choice["text"]
    assert text == TEXT.partition("jumps")[0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "jumps")
    assert len(served.engine.aborted) == 1
    assert served.engine.steps < len(encode(TEXT))


async def test_stops_may_be_kept_or_postponed(served: Served) -> None:
    kept = (await complete(served, stop="jumps", include_stop_str_in_output=True)).json()["choices"][0]
    assert kept["text"] == TEXT.partition("jumps")[0] + "jumps"
    all_of_it = (await complete(served, stop="jumps", min_tokens=len(encode(TEXT)))).json()["choices"][0]
    assert all_of_it["text"] == TEXT


async def test_a_stop_token_is_told(served: Served) -> None:
    third = encode(TEXT)[2]
    choice = (await complete(served, stop_token_ids=[third])).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", third)
    assert TEXT.startswith(choice["text"])


async def test_special_tokens_are_shown_on_request(served: Served) -> None:
    served.engine.reply = lambda request: [5, 1, 6]
    hidden = (await complete(served)).json()["choices"][0]["text"]
    shown = (await complete(served, skip_special_tokens=False)).json()["choices"][0]["text"]
    assert "<|im_start|>" in shown
    assert hidden == shown.replace("<|im_start|>", "")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kept", [False, True])
async def test_a_stop_string_may_be_a_special_token(served: Served, stream: bool, kept: bool) -> None:
    """The text of the response does not show the special token."""
    served.engine.reply = lambda request: [*encode(" one<|im_start|> two"), EOS]
    asked = {"stop": ["<|im_start|>"], "include_stop_str_in_output": kept, "stream": stream, "max_tokens": 99}
    for path, prompt in (
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ):
        response = await served.client.post(path, json={"model": BASE} | prompt | asked)
        choices = [chunk["choices"][0] for chunk in (events(response)[:-1] if stream else [response.json()])]
        texts = [choice.get("delta") or choice.get("message") or {"content": choice.get("text")} for choice in choices]
        assert "".join(text.get("content") or "" for text in texts) == " one" + "<|im_start|>" * kept
        assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "<|im_start|>")
    assert len(served.engine.aborted) == 2


# --- logprobs and echo -------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_are_columns_that_agree_with_the_text(served: Served, stream: bool) -> None:
    response = await complete(served, logprobs=2, stream=stream)
    if stream:
        parts = [chunk["choices"][0]["logprobs"] for chunk in events(response)[:-1]]
        logprobs = {name: [item for part in parts for item in part[name]] for name in parts[0]}
    else:
        logprobs = response.json()["choices"][0]["logprobs"]
    ids = encode(TEXT)
    assert "".join(logprobs["tokens"]) == TEXT
    assert logprobs["token_logprobs"] == [-id_ / 1000 for id_ in ids]
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert TEXT[offset:].startswith(token)
    assert all(
        len(top) == 2 and token in top for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
    )


async def test_logprobs_0_tells_the_token_alone(served: Served) -> None:
    logprobs = (await complete(served, logprobs=0)).json()["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"][0] == {logprobs["tokens"][0]: logprobs["token_logprobs"][0]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["The fox ", encode("The fox ")])
async def test_echo_repeats_the_prompt_in_every_choice(served: Served, stream: bool, prompt: Any) -> None:
    response = await complete(served, prompt=prompt, echo=True, n=2, stream=stream)
    for index in range(2):
        text = joined(events(response), index) if stream else response.json()["choices"][index]["text"]
        assert text == "The fox " + TEXT


@pytest.mark.parametrize("prompt", ["The 漢 fox", encode("The 漢 fox")])
@pytest.mark.parametrize("max_tokens", [0, 3])
async def test_echo_with_logprobs_scores_the_prompt(served: Served, prompt: Any, max_tokens: int) -> None:
    body = (await complete(served, prompt=prompt, echo=True, logprobs=1, max_tokens=max_tokens, n=2)).json()
    ids = encode("The 漢 fox")
    new = encode(TEXT)[:max_tokens]
    assert served.engine.requests[0].sampling.prompt_logprobs == 1
    assert served.engine.requests[1].sampling.prompt_logprobs is None  # the prompt is scored once
    for choice in body["choices"]:
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"] == [None, *(-id_ / 1000 for id_ in [*ids[1:], *new])]
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["text_offset"][0] == 0
        assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
        if max_tokens:
            assert choice["text"][logprobs["text_offset"][len(ids)] :].startswith(logprobs["tokens"][len(ids)])
    assert body["usage"]["completion_tokens"] == 2 * max_tokens


# --- adapters -------------------------------------------------------------------------------------------


async def test_the_adapter_is_named_in_three_ways(served: Served, tmp_path: Path) -> None:
    digest = await served.add_adapter(tmp_path, "poet")
    for body in ({"model": "poet"}, {"adapter_id": "poet"}, {"model": f"poet@{digest.removeprefix('sha256:')[:8]}"}):
        response = await complete(served, **body)
        assert response.headers["x-adapter-digest"] == response.json()["system_fingerprint"] == digest
        (ref,) = served.engine.requests[-1].adapters
        assert (ref.digest, ref.weight) == (digest, 1.0)
        assert (Path(ref.path) / "adapter_model.safetensors").is_file()
    assert (await complete(served, model="poet", adapter_id="poet")).status_code == 200


async def test_an_older_version_is_served_by_its_digest(served: Served, tmp_path: Path) -> None:
    old = await served.add_adapter(tmp_path, "poet", seed=1)
    new = await served.add_adapter(tmp_path, "poet", seed=2)
    assert (await complete(served, model="poet")).headers["x-adapter-digest"] == new
    assert (await complete(served, model=f"poet@{old}")).headers["x-adapter-digest"] == old


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"model": "nobody"}, 404, "model", "model_not_found"),
        ({"adapter_id": "nobody"}, 404, "adapter_id", "model_not_found"),
        ({"model": "nobody", "adapter_id": "poet"}, 404, "model", "model_not_found"),
        ({"model": "poet", "adapter_id": "other"}, 400, "adapter_id", None),
        ({"model": "poet@" + "0" * 8}, 404, "model", "model_not_found"),
        ({"model": "poet@123"}, 400, "model", None),
        ({"model": "poet@not-hexadecimal"}, 400, "model", None),
        ({"model": "../poet"}, 404, "model", "model_not_found"),
        ({"model": "x" * 10_000}, 404, "model", "model_not_found"),
        ({"model": "\x00"}, 404, "model", "model_not_found"),
    ],
)
async def test_unknown_names(
    served: Served, tmp_path: Path, body: Any, status: int, param: str, code: str | None
) -> None:
    await served.add_adapter(tmp_path, "poet")
    response = await complete(served, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert len(error["message"]) < 400


async def test_the_adapters_files_stay_while_it_answers(served: Served, tmp_path: Path) -> None:
    await served.add_adapter(tmp_path, "poet")
    present: list[bool] = []

    async def gate(request: Generate, step: int) -> None:
        if step == 1:
            await served.services.registry.delete(OPERATOR_CALLER, "poet")
        present.append((Path(request.adapters[0].path) / "adapter_model.safetensors").is_file())

    served.engine.gate = gate
    assert (await complete(served, model="poet")).status_code == 200
    assert all(present)
    assert (await complete(served, model="poet")).status_code == 404


# --- failures ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_dies_before_the_first_token_is_a_503(served: Served, stream: bool) -> None:
    served.engine.fail = {0: unavailable()}
    response = await complete(served, stream=stream)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert response.json()["error"]["type"] == "service_unavailable"


@pytest.mark.parametrize("n", [1, 2])
async def test_an_engine_that_dies_later_ends_the_stream_with_an_error(served: Served, n: int) -> None:
    served.engine.fail = {3: unavailable()}
    chunks = events(await complete(served, stream=True, n=n))
    assert chunks[0]["choices"]
    assert chunks[-1]["error"]["type"] == "service_unavailable"
    assert "[DONE]" not in chunks
    assert served.engine.running == set()


@pytest.mark.parametrize(
    ("code", "status"), [("context_length_exceeded", 400), ("non_finite_logits", 400), ("adapter_load_failed", 500)]
)
async def test_a_sequence_that_fails_alone(served: Served, code: str, status: int) -> None:
    served.engine.fail = {0: code}
    response = await complete(served)
    assert response.status_code == status


async def test_nothing_of_an_unexpected_failure_is_told(served: Served) -> None:
    served.engine.fail = {0: RuntimeError("/secret/path at 0x7f")}
    response = await complete(served)
    assert response.status_code == 500
    assert "secret" not in response.text
    served.engine.fail = {2: RuntimeError("/secret/path at 0x7f")}
    response = await complete(served, stream=True)
    assert events(response)[-1]["error"]["code"] == "internal_error"
    assert "secret" not in response.text


async def test_before_the_engine_is_up_there_is_a_503(served: Served) -> None:
    served.engine.info, served.engine.unready_reason = None, "the engine is loading the model"
    response = await complete(served)
    assert response.status_code == 503
    assert "retry-after" in response.headers


async def test_a_full_queue_is_a_429(tmp_path: Path) -> None:
    async with serving(tmp_path, max_queued_requests=2) as served:
        opened = asyncio.Event()

        async def gate(request: Generate, step: int) -> None:
            await opened.wait()

        served.engine.gate = gate
        waiting = [asyncio.create_task(complete(served)) for _ in range(2)]
        while len(served.engine.requests) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        response = await complete(served)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
        assert (await complete(served, n=3)).status_code == 400
        opened.set()
        assert [(await task).status_code for task in waiting] == [200, 200]
        assert (served.services.admission.requests, served.services.admission.tokens) == (0, 0)


# --- metrics and logs ------------------------------------------------------------------------------------


async def test_requests_are_counted(served: Served, tmp_path: Path) -> None:
    await served.add_adapter(tmp_path, "poet")
    await complete(served, model="poet")
    served.engine.fail = {1: unavailable()}
    await complete(served)
    value = served.services.metrics.registry.get_sample_value
    assert value("lorakeet:request_success_total", {"finished_reason": "stop"}) == 1
    assert value("lorakeet:request_success_total", {"finished_reason": "error"}) == 1
    assert value("lorakeet:lora_requests_total", {"adapter_name": "poet"}) == 1
    assert value("lorakeet:generation_tokens_total") == len(encode(TEXT)) + 2


async def test_the_access_line_tells_adapter_and_tokens(
    served: Served, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await served.add_adapter(tmp_path, "poet")
    with caplog.at_level(logging.INFO, "server.access"):
        for stream in (False, True):
            await served.client.post("/v1/completions", json={"model": "poet", "prompt": "Hi", "stream": stream})
        await served.client.post("/v1/completions", json={"model": BASE, "prompt": "Hi"})
        await served.client.post("/v1/completions", json={"model": BASE, "prompt": "Hi" * 10_000})
    tokens = f"prompt_tokens={len(encode('Hi'))} completion_tokens={len(encode(TEXT)) + 1}"
    assert [record.getMessage().split(" s ")[1] for record in caplog.records if record.name == "server.access"] == [
        f"adapter=poet {tokens}",
        f"adapter=poet {tokens}",
        tokens,
        "code=context_length_exceeded",
    ]


# --- size of a response -----------------------------------------------------------------------------------


async def test_an_answer_that_would_be_too_large_is_refused_before_any_work(tmp_path: Path) -> None:
    async with serving(tmp_path, max_response_bytes=120_000) as served:
        asked = {"prompt": [5] * 200, "echo": True, "logprobs": 20, "max_tokens": 1}
        assert (await complete(served, **asked | {"logprobs": 10})).status_code == 200
        served.engine.requests.clear()
        response = await complete(served, **asked, n=2)
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "response_too_large", "logprobs")
        assert "`n`" in error["message"]
        assert served.engine.requests == []
        response = await complete(served, prompt=["x" * 240] * 7, echo=True, n=128, max_tokens=1)
        assert response.json()["error"]["param"] == "echo"
        assert served.engine.requests == []
        assert events(await complete(served, **(asked | {"stream": True, "n": 2})))[-1] == "[DONE]"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_an_answer_that_grows_too_large_ends(tmp_path: Path, path: str) -> None:
    async with serving(tmp_path, max_response_bytes=4000) as served:
        body: dict[str, Any] = {"model": BASE, "max_tokens": 100, "n": 20}
        body |= (
            {"prompt": "Hi", "logprobs": 5}
            if path == "/v1/completions"
            else {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 5}
        )
        response = await served.client.post(path, json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "response_too_large")
        assert served.engine.running == set()
        streamed = await served.client.post(path, json=body | {"stream": True})
        assert events(streamed)[-1] == "[DONE]"


async def test_the_estimate_of_an_answer_is_near_its_size(served: Served) -> None:
    for logprobs in (0, 5, 20):
        asked = {"prompt": [*range(100, 300)], "echo": True, "logprobs": logprobs, "max_tokens": 0}
        size = len((await complete(served, **asked)).content)
        assert 0.5 < 200 * (40 + 25 * (1 + logprobs)) / size < 3
