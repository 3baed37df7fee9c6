"""A fine-tune on every servable kind of base: it trains, or fails with a reason, and the engine keeps serving."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import peft
import pytest
import transformers

from adapters.kernels import native
from server.finetune import hyperparameters
from server.finetune.hyperparameters import LoraOptions
from tests.server.engine.test_states import FAMILIES
from tests.support import offline as engines
from tests.support.running import RunningServer, eventually
from tests.support.site import EXAMPLES, TrainingEngine, as_file, tuning_site
from tests.support.tiny import ALL_LINEAR, _tokenizer, tiny_model
from tests.sweep.families import tiny_family


@dataclass(frozen=True)
class Case:
    """A base, its load options, and the expected outcome of a fine-tune."""

    make: Callable[[Path], object] = tiny_model
    engine: dict[str, Any] = field(default_factory=dict)
    within: Callable[[], AbstractContextManager[object]] = nullcontext
    lora: dict[str, Any] = field(default_factory=dict)
    code: str | None = None  # the error code of its failure


def opt(path: Path) -> None:
    """Create a model with linears before and after its layers."""
    tiny_model(
        path,
        config_class=transformers.OPTConfig,
        model_class=transformers.OPTForCausalLM,
        word_embed_proj_dim=32,
        ffn_dim=128,
    )


CASES = {
    "bf16": Case(engine={"dtype": "bfloat16"}),
    "no compiler": Case(within=native.switched_off),
    "fp4": Case(engine={"quantization": "fp4"}),
    "int8": Case(engine={"quantization": "int8"}),
    "width 160": Case(partial(tiny_model, hidden_size=160, intermediate_size=224)),
    "untied": Case(partial(tiny_model, tie_word_embeddings=False)),
    "linears outside": Case(opt),
    "linears outside, asked for": Case(opt, lora={"target_modules": ["project_in", "q_proj"]}, code="not_trainable"),
    "several streams": Case(partial(tiny_family, "gemma3n_text")),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_it_trains_or_fails_with_a_reason(case: Case, tmp_path: Path) -> None:
    case.make(tmp_path / "model")
    with case.within():
        engine = TrainingEngine(engines.load_engine(tmp_path / "model", tmp_path / "cache", **case.engine))
        async with tuning_site(tmp_path / "data", engine) as site:
            file = await site.upload(EXAMPLES[:3])
            done = await site.until((await site.create(training_file=file, lora={"r": 4} | case.lora))["id"])
            assert (done["error"] or {}).get("code") == case.code, await site.messages(done["id"])
            assert done["status"] == ("failed" if case.code else "succeeded")
            body = {"model": "tiny", "lora": case.lora}
            estimate = await site.client.post("/v1/fine_tuning/estimate", json=body)
            if case.code:
                assert (estimate.status_code, estimate.json()["error"]["code"]) == (400, case.code), estimate.text
            else:
                assert estimate.json()["mode"] == "keep"
        engine.close()


def test_all_linear_is_what_peft_would_load(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", **FAMILIES["falcon_h1"])
    engine = engines.load_engine(tmp_path / "model", tmp_path / "cache")
    targets = hyperparameters.adapter_config(LoraOptions(), "tiny", engine.ready())["target_modules"]
    assert set(targets) == {"in_proj", *ALL_LINEAR}
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    peft.get_peft_model(stock, peft.LoraConfig(target_modules=targets))  # raises for `out_proj`


@pytest.fixture
def untrainable(tmp_path: Path) -> Iterator[RunningServer]:
    opt(tmp_path / "model")
    _tokenizer().save_pretrained(tmp_path / "model")
    server = RunningServer(tmp_path / "model", tmp_path, tmp_path / "data")
    server.ensure()
    yield server
    server.stop()


def test_an_untrainable_job_does_not_kill_the_engine(untrainable: RunningServer) -> None:
    """Planning the memory of an untrainable job used to kill every restarted engine, until it was given up."""
    server = untrainable
    pid = server.engine_pid
    files, data = as_file(EXAMPLES[:3]), {"purpose": "fine-tune"}
    file = httpx.post(f"{server.url}/v1/files", files=files, data=data, timeout=60).json()["id"]
    body = {"model": "tiny", "training_file": file, "lora": {"target_modules": ["project_in", "q_proj"]}}
    created = httpx.post(f"{server.url}/v1/fine_tuning/jobs", json=body, timeout=60).json()

    def ended() -> Any:
        job = server.get(f"/v1/fine_tuning/jobs/{created['id']}").json()
        return job if job["finished_at"] else None

    done = eventually(ended, 120, "the job ends")
    assert (done["status"], done["error"]["code"]) == ("failed", "not_trainable")
    assert server.engine_pid == pid
    prompt = {"model": "tiny", "prompt": "Hello", "max_tokens": 2}
    assert httpx.post(f"{server.url}/v1/completions", json=prompt, timeout=60).status_code == 200
