"""Adapters saved after `resize_token_embeddings`, compared with PEFT on a resized base: alone and in a batch."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from adapters.peft_format.fields import AdapterError
from server.engine.engine import Engine
from server.messages.protocol import AdapterRef
from tests.server.engine.test_parity import PROMPT, quantisation
from tests.support.offline import load_engine, publish, request, run
from tests.support.tiny import VOCAB, tiny_adapter, tiny_model
from tests.support.variants import BASES

NEW = 5
PROMPT_WITH_NEW = [*PROMPT[:20], VOCAB, *PROMPT[20:40], VOCAB + NEW - 1, VOCAB + 1, *PROMPT[40:60]]
KINDS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "saved embedding": {"modules_to_save": ["embed_tokens"]},
    "saved both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "new tokens trained": {"trainable_token_indices": [VOCAB + i for i in range(NEW)]},
    "some tokens trained": {"trainable_token_indices": [VOCAB + 1, 7]},
    "adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "adapted, DoRA": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True},
}
pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore::UserWarning")


def resized(model: Path, **options: Any) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)
    base.resize_token_embeddings(VOCAB + NEW)
    return base


def save_resized(path: Path, model: Path, config: dict[str, Any], seed: int) -> Path:
    """A random adapter of a base with more tokens, saved by PEFT."""
    base = resized(model)
    torch.manual_seed(seed)
    with torch.no_grad():  # the new rows of tied or untied matrices
        for table in {id(t): t for t in (base.get_input_embeddings(), base.get_output_embeddings())}.values():
            table.weight[VOCAB:].normal_(0.0, 1.0)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(**({"target_modules": ["q_proj"]} | config)))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                parameter.normal_(0.0, 0.1)
            elif parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
            if "magnitude" in name:
                parameter.abs_().add_(0.5)
    wrapped.save_pretrained(str(path))
    return path


def peft_scores(model: Path, adapter: Path, prompt: list[int]) -> torch.Tensor:
    """Log-probabilities of a prompt's tokens over the larger vocabulary."""
    base = resized(model, quantization_config=quantisation("nf4"), device_map={"": "cpu"})
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    wrapped = peft.PeftModel.from_pretrained(base, adapter, torch_device="cpu")
    with torch.no_grad():
        logits = wrapped(torch.tensor([prompt])).logits[0]
    assert logits.shape[1] == VOCAB + NEW
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]


class World:
    def __init__(self, name: str, root: Path, cache: Path) -> None:
        self.model = tiny_model(root / "model", **BASES[name])
        self.adapters = {
            kind: save_resized(root / kind, self.model, config, seed)
            for seed, (kind, config) in enumerate(KINDS.items())
        }
        self.plain = tiny_adapter(root / "plain", self.model)
        self.engine: Engine = load_engine(self.model, cache, adapter_bytes=8 << 20)
        self.references = {kind: publish(self.engine, path) for kind, path in self.adapters.items()}


@pytest.fixture(scope="module", params=["tied", "untied"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> World:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return World(request.param, tmp_path_factory.mktemp(request.param), cache_dir)


def test_resized_adapters_equal_peft_alone_and_among_others(world: World) -> None:
    engine = world.engine
    plain: dict[str, AdapterRef | None] = {"plain": publish(engine, world.plain), "base": None}

    def requests() -> list[Any]:
        made = [
            request(kind, PROMPT_WITH_NEW, reference, max_tokens=4, prompt_logprobs=0)
            for kind, reference in world.references.items()
        ]
        return made + [request(kind, PROMPT, ref, max_tokens=4, prompt_logprobs=0) for kind, ref in plain.items()]

    alone = {single.id: run(engine, [single])[single.id] for single in requests()}
    assert run(engine, requests(), every=2) == alone
    for kind, adapter in world.adapters.items():
        expected = peft_scores(world.model, adapter, PROMPT_WITH_NEW)
        ours = torch.tensor([entry.logprob for entry in alone[kind].prompt_logprobs if entry is not None])
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0, msg=partial("{}: {}".format, kind))
    assert engine.base.digest() == engine.base_digest
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in engine.base.model.modules())


def test_new_tokens_are_drawn_only_with_their_adapter(world: World) -> None:
    bias = {"logit_bias": {VOCAB + 2: 100.0}, "max_tokens": 3}
    answer = run(world.engine, [request("a", PROMPT, world.references["frozen"], **bias)])["a"]
    assert answer.tokens == [VOCAB + 2] * 3


def test_the_receipt_counts_them(world: World) -> None:
    from adapters.peft_format.directory import AdapterSpec
    from adapters.storage.receipt import receipt_of

    spec = AdapterSpec.read(world.adapters["frozen"])
    assert receipt_of(spec)["new_tokens"] == NEW
    assert "new_tokens" in receipt_of(spec)["variants"]
    # Copies of the base's rows are not held on the device again.
    assert spec.variants.device_bytes == 2 * NEW * 64 * 4


def test_a_vocabulary_that_cannot_be(world: World, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = world.adapters["frozen"]
    tensors = load_file(source / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    name = "base_model.model.model.embed_tokens.weight"

    def refused(change: dict[str, torch.Tensor | None], match: str) -> None:
        made = {key: value for key, value in (tensors | change).items() if value is not None}
        save_file(made, tmp_path / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=match):
            publish(world.engine, tmp_path)

    refused({name: tensors[name][: VOCAB - 1], "base_model.model.lm_head.weight": None}, "must both have")
    refused({name: tensors[name][: VOCAB + 1]}, "must both have")
    refused({name: tensors[name] + 1}, "differs from the served base's")
    refused({name: torch.zeros(VOCAB + 65537, 64)}, "at most 65536")
    if world.model.parent.name.startswith("untied"):
        refused({name: None}, "no 'base_model.model.model.embed_tokens.weight'")
