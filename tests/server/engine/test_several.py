"""Several adapters on the same tokens: equal to PEFT's mixture, and the same alone or in a batch."""

from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from server.messages.protocol import AdapterRef, Generate, Sampling
from tests.support.offline import Answer, load_engine, publish, request, run
from tests.support.tiny import tiny_adapter

PROMPT = torch.randint(3, 500, (70,), generator=torch.Generator().manual_seed(2)).tolist()
WEIGHTS = (0.75, -1.5)


def peft_logprobs(model: Path, adapters: list[Path]) -> torch.Tensor:
    """Both adapters, weighted and added, by PEFT on the same NF4 base."""
    quantisation = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=quantisation, dtype=torch.float32, device_map={"": "cpu"}
    )
    module: Any
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # otherwise it repacks the weight
    wrapped: Any = peft.PeftModel.from_pretrained(base, adapters[0], adapter_name="0", torch_device="cpu")
    wrapped.load_adapter(adapters[1], "1", torch_device="cpu")
    wrapped.base_model.add_weighted_adapter(["0", "1"], list(WEIGHTS), "mix", combination_type="cat")
    wrapped.set_adapter("mix")
    with torch.no_grad():
        logits = wrapped(torch.tensor([PROMPT])).logits[0]
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]


def logprobs(answer: Answer) -> torch.Tensor:
    assert answer.error is None
    return torch.tensor([entry.logprob for entry in answer.prompt_logprobs if entry is not None])


def test_several_adapters_equal_pefts_mixture_alone_and_in_company(
    model_dir: Path, cache_dir: Path, tmp_path: Path
) -> None:
    shapes: list[dict[str, Any]] = [{"r": 8}, {"r": 5, "target_modules": ["q_proj", "down_proj"]}]
    paths = [tiny_adapter(tmp_path / str(i), model_dir, seed=i, **shape) for i, shape in enumerate(shapes)]
    engine = load_engine(model_dir, cache_dir, prefix_caching=False)
    refs = [publish(engine, path) for path in paths]
    mixture = [AdapterRef(ref.digest, ref.path, weight) for ref, weight in zip(refs, WEIGHTS, strict=True)]
    scored = Sampling(max_tokens=0, prompt_logprobs=0)

    def mixed(id: str) -> Generate:  # noqa: A002
        return Generate(id=id, prompt=PROMPT, sampling=scored, adapters=mixture)

    alone = logprobs(run(engine, [mixed("mixed")])["mixed"])
    torch.testing.assert_close(alone, peft_logprobs(model_dir, paths), atol=1e-3, rtol=0)

    company = [request(f"one {i}", PROMPT, ref, max_tokens=0, prompt_logprobs=0) for i, ref in enumerate(refs)]
    answers = run(engine, [company[0], mixed("again"), mixed("mixed"), company[1], request("base", PROMPT[:9])])
    assert torch.equal(logprobs(answers["mixed"]), alone)
    assert torch.equal(logprobs(answers["again"]), alone)
    for i in range(2):
        assert (logprobs(answers[f"one {i}"]) - alone).abs().max() > 0.01
