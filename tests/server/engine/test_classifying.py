"""Classifiers: scores equal those of transformers and PEFT, and are bit-identical in any batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from server.engine.engine import Engine
from server.messages.protocol import AdapterRef, Generate
from tests.server.engine.test_parity import quantisation
from tests.support.offline import Answer, load_engine, publish, request, run, solo, tight_engine
from tests.support.tiny import tiny_adapter, tiny_model

PROMPT = torch.randint(3, 290, (90,), generator=torch.Generator().manual_seed(4)).tolist()

# PEFT's advice about tied embeddings; transformers' warning about a head missing in the checkpoint.
pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore::UserWarning:peft")

ADAPTERS: dict[str, dict[str, Any]] = {
    "two labels": {"labels": 2},
    "a reward": {"labels": 1, "target_modules": ["q_proj", "v_proj"]},
    "DoRA, rsLoRA": {"labels": 5, "use_dora": True, "use_rslora": True},
    "all-linear, bf16": {"labels": 3, "target_modules": "all-linear", "dtype": torch.bfloat16},
    "saved norms and embedding": {"labels": 3, "modules_to_save": ["norm", "embed_tokens"]},
    "adapted embedding": {"labels": 3, "target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"labels": 3, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": PROMPT[7:9]}},
}


def peft_scores(model: Path, adapter: Path, quantization: str, prompt: list[int]) -> torch.Tensor:
    """Scores of the classification head, by transformers, bitsandbytes and PEFT."""
    labels = load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"].shape[0]
    base: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        model,
        num_labels=labels,
        quantization_config=quantisation(quantization),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # otherwise it repacks the weight
    classifier = peft.PeftModel.from_pretrained(base, adapter, torch_device="cpu")
    with torch.no_grad():
        scores: torch.Tensor = classifier(torch.tensor([prompt])).logits[0]
    return scores


def question(id: str, adapter: AdapterRef, prompt: list[int] | None = None) -> Generate:  # noqa: A002
    return request(id, prompt or PROMPT, adapter, max_tokens=0, classify=True, logprobs=None)


def our_scores(engine: Engine, adapter: Path) -> torch.Tensor:
    answer = run(engine, [question("a", publish(engine, adapter))])["a"]
    assert (answer.error, answer.tokens) == (None, [])
    return torch.tensor(answer.scores)


@pytest.fixture(scope="module")
def engine(model_dir: Path, cache_dir: Path) -> Engine:
    return load_engine(model_dir, cache_dir)


@pytest.mark.parametrize("name", ADAPTERS)
def test_scores_equal_peft(name: str, engine: Engine, model_dir: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path, model_dir, seed=len(name), **ADAPTERS[name])
    ours = our_scores(engine, adapter)
    torch.testing.assert_close(ours, peft_scores(model_dir, adapter, "nf4", PROMPT), atol=1e-3, rtol=0)
    assert ours.abs().max() > 0.1, "otherwise this test shows nothing"


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scores_equal_peft_on_an_unquantised_base(family: str, cache_dir: Path, tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "llama": {"tie_word_embeddings": False},
        "qwen2": {"config_class": transformers.Qwen2Config, "model_class": transformers.Qwen2ForCausalLM},
    }
    model = tiny_model(tmp_path / "model", **kinds[family])
    adapter = tiny_adapter(tmp_path / "adapter", model, labels=4, bias="all" if family == "qwen2" else "none")
    ours = our_scores(load_engine(model, cache_dir, quantization="none"), adapter)
    torch.testing.assert_close(ours, peft_scores(model, adapter, "none", PROMPT), atol=1e-3, rtol=0)


def test_a_vocabulary_that_grew_by_a_padding_token(
    engine: Engine, model_dir: Path, cache_dir: Path, tmp_path: Path
) -> None:
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=2)
    base.resize_token_embeddings(513)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=4, init_lora_weights=False)
    classifier = peft.get_peft_model(base, config)
    classifier.save_pretrained(str(tmp_path), save_embedding_layers=True)
    prompt = [*PROMPT[:20], 512, *PROMPT[20:30]]
    with torch.no_grad():
        expected = classifier(torch.tensor([prompt])).logits[0]
    reference = publish(engine, tmp_path)
    unquantised = load_engine(model_dir, cache_dir, quantization="none")
    answers = run(unquantised, [question("a", reference, prompt), request("b", PROMPT, max_tokens=2)])
    torch.testing.assert_close(torch.tensor(answers["a"].scores), expected, atol=1e-3, rtol=0)


def test_a_bias_and_other_spellings_of_the_head(engine: Engine, model_dir: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path, model_dir, labels=3)
    plain = our_scores(engine, adapter)
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    head = tensors.pop("base_model.model.score.weight")
    bias = torch.tensor([1.0, -2.0, 0.5])
    for place in ("score", "score.modules_to_save", "classifier"):
        named = {f"base_model.model.{place}.weight": head, f"base_model.model.{place}.bias": bias}
        save_file(tensors | named, weights)
        torch.testing.assert_close(our_scores(engine, adapter), plain + bias)


def test_the_batch_chunks_preemption_and_the_cache_change_no_bit(
    engine: Engine, model_dir: Path, cache_dir: Path, tmp_path: Path
) -> None:
    made: dict[str, dict[str, Any]] = {"two": {"labels": 2}, "reward": {"labels": 1}, "dora": ADAPTERS["DoRA, rsLoRA"]}
    made |= {"causal": {}, "causal dora": {"use_dora": True}}
    references: dict[str, AdapterRef | None] = {"base": None}
    for name, config in made.items():
        references[name] = publish(engine, tiny_adapter(tmp_path / name, model_dir, seed=len(references), **config))
    requests: list[Generate] = []
    for i, (name, reference) in enumerate(references.items()):
        for prompt in (PROMPT[i:], PROMPT[: 40 + 3 * i], PROMPT[: 1 + i]):
            id_ = f"{name} {len(prompt)}"
            if reference is not None and made[name].get("labels"):
                requests.append(question(id_, reference, prompt))
            else:
                requests.append(request(id_, prompt, reference, max_tokens=6))
    alone = solo(engine, requests)
    assert all(answer.error is None for answer in alone.values())
    assert sum(bool(answer.scores) for answer in alone.values()) == 9

    def company(engine: Engine, every: int = 0) -> dict[str, Answer]:
        found = run(engine, requests, every)
        return {id_: replace(answer, cached_tokens=0) for id_, answer in found.items()}

    engine.blocks.reset_cache()
    assert company(engine) == alone
    warm = run(engine, requests)
    assert all(warm[id_].cached_tokens for id_, answer in alone.items() if answer.scores and int(id_.split()[-1]) > 16)
    assert company(engine) == alone
    tight = tight_engine(engine, model_dir, cache_dir, blocks=9, longest=128)
    assert company(tight, every=2) == alone
    assert company(load_engine(model_dir, cache_dir, depth=1), every=1) == alone


def test_a_head_that_overflows_fails_alone(engine: Engine, model_dir: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path, model_dir, labels=2)
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.score.weight"].fill_(3e38)
    save_file(tensors, weights)
    answers = run(engine, [question("bad", publish(engine, adapter)), request("good", PROMPT, max_tokens=3)])
    assert answers["bad"].code == "non_finite_logits"
    assert (answers["good"].error, len(answers["good"].tokens)) == (None, 3)
