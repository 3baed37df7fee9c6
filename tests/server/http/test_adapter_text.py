"""Adapters with their own tokens and chat template on a real server; other adapters are not affected."""

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.server.engine.test_new_tokens import NEW, peft_scores, save_resized
from tests.support.harness import adapter_files
from tests.support.running import BASE, RunningServer
from tests.support.scripted import serving
from tests.support.tiny import VOCAB, _tokenizer, tiny_adapter, tiny_model

FIRST = len(_tokenizer())  # fewer than the base's rows, as in models with a padded vocabulary
WORDS = [f"<tool_{id_}>" for id_ in range(FIRST, VOCAB + NEW)]
TEXT = f"The quick <tool_{VOCAB}>brown fox<tool_{VOCAB + 4}> jumps over the lazy dog"
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}|{{ m['content'] }}]{% endfor %}"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
MESSAGES = [{"role": "user", "content": "Hi"}]
pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore::UserWarning")


def tokenizer_json(words: list[str], first: int = FIRST) -> bytes:
    document = json.loads(_tokenizer().backend_tokenizer.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document["added_tokens"] += [
        {"id": first + i, "content": word, "special": i == 0, **flags} for i, word in enumerate(words)
    ]
    return json.dumps(document).encode()


async def upload(client: httpx.AsyncClient, name: str, directory: Path, **more: bytes | str) -> httpx.Response:
    files: dict[str, Any] = {
        "config": (directory / "adapter_config.json").read_bytes(),
        "weights": (directory / "adapter_model.safetensors").read_bytes(),
    }
    return await client.post("/v1/adapters", data={"name": name}, files=files | more)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunningServer, Path, Path, Path]]:
    root = tmp_path_factory.mktemp("text")
    model = tiny_model(root / "model")
    resized = save_resized(root / "resized", model, {}, 3)
    plain = tiny_adapter(root / "plain", model)
    limits = ("--adapter-template-seconds", "60", "--adapter-template-cpu-seconds", "1")
    server = RunningServer(model, root, root / "data", "--allow-adapter-chat-templates", *limits)
    try:
        server.ensure()
        yield server, model, resized, plain
    finally:
        server.stop()


async def test_requests_see_the_adapters_vocabulary(world: tuple[RunningServer, Path, Path, Path]) -> None:
    server, model, resized, plain = world
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        made = await upload(client, "tools", resized, tokenizer=tokenizer_json(WORDS))
        assert made.status_code == 201, made.text
        assert (made.json()["new_tokens"], made.json()["tokenizer_tokens"]) == (NEW, len(WORDS))
        assert (await upload(client, "plain", plain)).status_code == 201
        bare = (await upload(client, "bare", resized)).json()
        assert bare["digest"] != made.json()["digest"], "the same weights with a different tokenizer"

        async def ids(model: str) -> list[int]:
            answer = await client.post("/tokenize", json={"model": model, "prompt": TEXT})
            tokens: list[int] = answer.json()["tokens"]
            return tokens

        own = await ids("tools")
        assert [token for token in own if token >= VOCAB] == [VOCAB, VOCAB + 4]
        assert max(await ids("plain")) < VOCAB
        assert await ids("plain") == await ids(BASE) == await ids("bare")
        back = await client.post("/detokenize", json={"model": "tools", "tokens": own})
        assert back.json()["prompt"] == TEXT
        assert (await client.post("/detokenize", json={"model": BASE, "tokens": own})).status_code == 400

        body = {"model": "tools", "prompt": TEXT, "max_tokens": 2, "temperature": 0, "logprobs": 0, "echo": True}
        alone = (await client.post("/v1/completions", json=body)).json()["choices"][0]["logprobs"]["token_logprobs"]
        others = [client.post("/v1/completions", json=body | {"model": name}) for name in ("plain", BASE)]
        together, *answers = await asyncio.gather(client.post("/v1/completions", json=body), *others)
        assert together.json()["choices"][0]["logprobs"]["token_logprobs"] == alone
        assert [answer.status_code for answer in answers] == [200, 200]
        expected = peft_scores(model, resized, own)
        torch.testing.assert_close(torch.tensor(alone[1 : len(own)]), expected, atol=1e-3, rtol=0)

        forced = {"prompt": own, "max_tokens": 2, "logit_bias": {str(VOCAB + 1): 100}}
        answer = await client.post("/v1/completions", json={"model": "tools"} | forced)
        assert answer.json()["choices"][0]["text"] == f"<tool_{VOCAB + 1}>" * 2
        for name in ("plain", BASE):
            answer = await client.post("/v1/completions", json={"model": name} | forced)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logit_bias")
        answer = await client.post("/v1/completions", json={"model": "tools", "prompt": [VOCAB + NEW]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
        merge = await client.post("/v1/adapters/tools/merge", json={"to": "resident", "dtype": "bf16"})
        assert (merge.status_code, merge.json()["error"]["code"]) == (400, "unsupported_adapter_feature")


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (b"{}", "added_tokens"),
        (tokenizer_json([*WORDS, "<more>"]), "rows"),
        (tokenizer_json(WORDS, first=2**31), "numbered from"),
        (tokenizer_json(WORDS, first=FIRST - 1), "numbered from"),
    ],
)
async def test_tokenizers_that_do_not_fit(
    tokenizer: bytes, words: str, world: tuple[RunningServer, Path, Path, Path]
) -> None:
    server, _, resized, _ = world
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        refused = await upload(client, "bad", resized, tokenizer=tokenizer)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tokenizer")
        assert words in refused.json()["error"]["message"]


async def test_chat_templates_of_adapters(world: tuple[RunningServer, Path, Path, Path]) -> None:
    server, _, _, plain = world
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        made = await upload(client, "polite", plain, chat_template=TEMPLATE)
        assert made.status_code == 201, made.text
        assert made.json()["chat_template"] is True

        async def prompt(model: str) -> str:
            ids = (await client.post("/tokenize", json={"model": model, "messages": MESSAGES})).json()["tokens"]
            text: str = (await client.post("/detokenize", json={"tokens": ids})).json()["prompt"]
            return text

        assert await prompt("polite") == "[user|Hi]"
        assert "<|im_start|>" in await prompt(BASE)
        chat = {"messages": MESSAGES, "max_tokens": 2}
        assert (await client.post("/v1/chat/completions", json=chat | {"model": "polite"})).status_code == 200

        refused = await upload(client, "broken", plain, chat_template="{% if %}")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template")
        refused = await upload(client, "broken", plain, chat_template=b"\xff")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template")

        assert (await upload(client, "loop", plain, chat_template=LOOP)).status_code == 201
        began = time.monotonic()
        others = [client.post("/v1/chat/completions", json=chat | {"model": name}) for name in (BASE, "polite")]
        loops = [client.post("/v1/chat/completions", json=chat | {"model": "loop"}) for _ in range(3)]
        answers = await asyncio.gather(*loops, *others)
        assert [answer.status_code for answer in answers] == [400, 400, 400, 200, 200]
        assert answers[0].json()["error"]["code"] == "chat_template_failed"
        assert time.monotonic() - began < 300


async def test_a_template_that_writes_too_much_is_refused(
    world: tuple[RunningServer, Path, Path, Path],
) -> None:
    server, _, _, plain = world
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        flood = "{% for i in range(3000) %}{{ 'x' * 10000 }}{% endfor %}"
        assert (await upload(client, "flood", plain, chat_template=flood)).status_code == 201
        for path in ("/v1/chat/completions", "/tokenize"):
            refused = await client.post(path, json={"model": "flood", "messages": MESSAGES})
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (400, "chat_template_failed")
            assert "The adapter's chat template writes more than" in error["message"]


async def test_a_rendered_template_leaves_nothing_at_the_end(world: tuple[RunningServer, Path, Path, Path]) -> None:
    server, _, _, plain = world
    server.ensure()
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        assert (await upload(client, "last", plain, chat_template=TEMPLATE)).status_code in (200, 201)
        assert (await client.post("/tokenize", json={"model": "last", "messages": MESSAGES})).status_code == 200
    helpers = [path for path in Path("/proc").glob("[0-9]*") if _is_helper(path, server.process.pid)]
    assert helpers
    server.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(server.process.wait, 20) == 0
    assert not any(helper.exists() for helper in helpers)
    assert "Traceback" not in server.log


def _is_helper(process: Path, parent: int) -> bool:
    with contextlib.suppress(OSError):
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        return int(fields[1]) == parent and b"server.children.programs" in (process / "cmdline").read_bytes()
    return False


async def test_without_permission_a_template_is_left_out_with_a_warning(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        config, weights = adapter_files()
        files = {"chat_template": TEMPLATE.encode(), "config": config, "weights": weights}
        made = await served.client.post("/v1/adapters", data={"name": "a"}, files=files)
        assert made.status_code == 201, made.text
        assert "chat_template" not in made.json()
        assert any("chat template is not used" in warning for warning in made.json()["warnings"])
        answer = await served.client.post("/tokenize", json={"model": "a", "messages": MESSAGES})
        same = await served.client.post("/tokenize", json={"messages": MESSAGES})
        assert answer.json()["tokens"] == same.json()["tokens"]
