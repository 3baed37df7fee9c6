"""`/tokenize` and `/detokenize`."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jinja2
import pytest

from tests.support.scripted import BASE, EOS, Served, encode, serving


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


async def test_a_text_there_and_back(served: Served) -> None:
    text = "Wörter, 漢字 and <|im_start|>"
    body = (await served.client.post("/tokenize", json={"model": BASE, "prompt": text})).json()
    assert body == {"count": len(encode(text)), "max_model_len": 256, "tokens": encode(text), "token_strs": None}
    back = await served.client.post("/detokenize", json={"tokens": body["tokens"]})
    assert back.json() == {"prompt": text}


async def test_token_strings_on_request(served: Served) -> None:
    body = (await served.client.post("/tokenize", json={"prompt": "The fox", "return_token_strs": True})).json()
    assert "".join(body["token_strs"]) == "The fox"


async def test_what_lm_eval_asks_of_a_remote_tokenizer(served: Served) -> None:
    """The requests of its `RemoteTokenizer`: special tokens by name, ids from /tokenize, chats rendered locally."""
    info = (await served.client.get("/tokenizer_info")).json()
    assert info["eos_token"] == "<|im_end|>"
    assert info["model_max_length"] == 256
    assert "bos_token" not in info
    body = {"prompt": info["eos_token"], "add_special_tokens": False}
    assert (await served.client.post("/tokenize", json=body)).json()["tokens"] == [EOS]
    messages = [{"role": "user", "content": "Hi"}]
    rendered = jinja2.Template(info["chat_template"]).render(messages=messages, add_generation_prompt=True)
    asked = await served.client.post("/tokenize", json={"messages": messages})
    assert asked.json()["tokens"] == encode(rendered)


async def test_a_conversation_is_tokenised_as_chat_does(served: Served) -> None:
    conversation = {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": False}
    body = (await served.client.post("/tokenize", json=conversation)).json()
    await served.client.post("/v1/chat/completions", json=conversation | {"model": BASE})
    assert body["tokens"] == served.engine.requests[-1].prompt == encode("<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "nobody"}, 404, "model"),
        ("/tokenize", {"prompt": "x", "stream": True}, 400, "stream"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [5, 512]}, 400, "tokens.1"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [2**70]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": "5"}, 400, "tokens"),
    ],
)
async def test_refusals_name_the_field(served: Served, path: str, body: Any, status: int, param: str) -> None:
    response = await served.client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
