"""Mixtures of experts: read from either layout, kept quantised, and independent per token."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapters.kernels import ExpertWeights, native
from adapters.offline import merge
from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.sizes import EXTRAS
from server.engine.engine import Engine
from server.model import UnservableModel
from tests.support.offline import Answer, load_engine, publish, request, run, solo
from tests.support.single_experts import single_experts_adapter
from tests.support.tiny import tiny_adapter, tiny_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# PEFT looks for modules, so patterns for parameters match none.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.*did not match any targeted module")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Sizes are not square, so that a transposed matrix does not fit.
SERVED: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {"moe_intermediate_size": 96},
    "Mixtral": {"num_local_experts": 8, "intermediate_size": 96},
    "GptOss": {"num_local_experts": 8, "intermediate_size": 96, "tie_word_embeddings": False},
}
SIZES = {
    "num_hidden_layers": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "head_dim": 16,
    "norm_topk_prob": True,
}


def mixture(path: Path, config: str = "Qwen3Moe", **settings: Any) -> Path:
    return tiny_model(
        path,
        config_class=getattr(transformers, f"{config}Config"),
        model_class=getattr(transformers, f"{config}ForCausalLM"),
        **(SIZES | settings),
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture(tmp_path_factory.mktemp("mixture") / "model")


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_engine(model, tmp_path_factory.mktemp("cache"))


def test_fused_and_single_experts_in_the_files_give_one_base(model: Path, engine: Engine, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    assert any(".experts.7.up_proj." in name for name in tensors)  # transformers writes one tensor per expert
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = {
            part: torch.stack([tensors.pop(f"{prefix}{expert}.{part}.weight") for expert in range(8)])
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{prefix}gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], 1)
        tensors[f"{prefix}down_proj"] = parts["down_proj"]
    fused = tmp_path / "fused"
    fused.mkdir()
    for path in model.iterdir():
        (fused / path.name).write_bytes(path.read_bytes())
    save_file(tensors, fused / "model.safetensors", metadata={"format": "pt"})
    assert load_engine(fused, tmp_path / "cache").base_digest == engine.base_digest
    assert load_engine(fused, tmp_path / "cache").base_digest == engine.base_digest  # from the quantised copy


def test_experts_are_quantised_one_at_a_time(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive, quantised = 0, []
    quantize = ExpertWeights.quantize

    def counting(dense: Any, *args: Any) -> Any:
        def one_by_one() -> Any:
            nonlocal alive
            for weight in dense:
                quantised.append(tuple(weight.shape))
                yield weight

        return quantize(one_by_one(), *args)

    monkeypatch.setattr(ExpertWeights, "quantize", counting)
    base = load_engine(model, tmp_path / "cache").base
    assert sorted(set(quantised)) == [(64, 64), (128, 64)]
    assert len(quantised) == 2 * 2 * 8
    floating = [name for name, tensor in base.model.named_parameters() if "experts" in name and tensor.dim() > 2]
    assert not floating


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ("Qwen3Moe", {}),
        ("Mixtral", {"num_local_experts": 8, "intermediate_size": 64}),
        ("Glm4Moe", {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}),
        ("Qwen2Moe", {"shared_expert_intermediate_size": 64}),  # a gate of one number per token
    ],
)
def test_outputs_are_bit_identical_in_any_batch(config: str, settings: dict[str, Any], tmp_path: Path) -> None:
    directory = mixture(tmp_path / "model", config, **settings)
    engine = load_engine(directory, tmp_path / "cache")
    adapters = [
        publish(engine, tiny_adapter(tmp_path / str(rank), directory, r=rank, seed=rank, target_modules=ATTENTION))
        for rank in (3, 8)
    ]
    of_experts = tiny_adapter(
        tmp_path / "experts", directory, r=3, b_std=0.02, target_modules=["q_proj"], target_parameters=EXPERTS
    )
    adapters.append(publish(engine, of_experts))
    generator = torch.Generator().manual_seed(0)
    work = [
        request(
            f"r{i}",
            torch.randint(3, 500, (5 + 11 * i,), generator=generator).tolist(),
            [*adapters, None][i % 4],
            max_tokens=8 + i,
            prompt_logprobs=0,
        )
        for i in range(7)
    ]
    expected = solo(engine, work)
    assert run(load_engine(directory, tmp_path / "cache", prefix_caching=False), work, every=2) == expected
    small = load_engine(directory, tmp_path / "cache", max_batch_tokens=19, prefix_caching=False)
    assert run(small, work) == expected


def peft_logprobs(model: Path, adapter: Path, prompt: list[int]) -> list[float]:
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, str(adapter))
    ids = torch.tensor(prompt)
    with torch.no_grad():
        scores = adapted(ids[None]).logits[0, :-1].log_softmax(-1)
    found: list[float] = scores.gather(1, ids[1:, None])[:, 0].tolist()
    return found


def check_merged(engine: Engine, model: Path, adapter: Path, target: Path) -> None:
    """Check that a checkpoint of a published adapter equals PEFT's own merge."""
    import peft

    target.mkdir()
    ready = engine.ready()
    experts = {name: size._asdict() for name, size in ready.experts.items()}
    order = {"base": str(model), "adapter": str(adapter), "target": str(target), "experts": experts}
    merge.carry_out(order | {"renamed": ready.renamed, "transposed": ready.transposed})
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    theirs = peft.PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict()
    ours = transformers.AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert set(ours) == set(theirs)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name].float(), weight, rtol=2**-8, atol=1e-6)
    adapted = [size.parameter for size in AdapterSpec.read(adapter).variants.experts.values()]
    assert not any(torch.allclose(theirs[name], before[name], rtol=2**-7) for name in adapted)


@PEFT_WARNS
def test_a_checkpoint_has_what_peft_merges_whatever_the_files(model: Path, engine: Engine, tmp_path: Path) -> None:
    adapter = tiny_adapter(
        tmp_path / "adapter", model, r=3, b_std=0.2, target_modules=["q_proj"], target_parameters=EXPERTS
    )
    publish(engine, adapter)
    check_merged(engine, model, adapter, tmp_path / "of single experts")
    fused = tmp_path / "fused"
    fused.mkdir()
    for path in model.iterdir():
        (fused / path.name).write_bytes(path.read_bytes())
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    held = load_file(model / "model.safetensors")
    whole = {name: weight for name, weight in whole.items() if name in held or "experts" in name}
    save_file(whole, fused / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="square weights"):  # experts' down_proj is 64 x 64 here
        check_merged(engine, fused, adapter, tmp_path / "square")
    up_alone = tiny_adapter(
        tmp_path / "up", model, r=3, b_std=0.2, target_modules=["q_proj"], target_parameters=EXPERTS[:1]
    )
    publish(engine, up_alone)
    check_merged(engine, fused, up_alone, tmp_path / "of all experts")


def logprobs(answer: Answer) -> list[float]:
    return [entry.logprob for entry in answer.prompt_logprobs if entry is not None]


@PEFT_WARNS
@pytest.mark.parametrize("config", list(SERVED))
def test_adapters_of_experts_equal_peft_in_a_mixed_batch(config: str, tmp_path: Path) -> None:
    model = mixture(tmp_path / "model", config, **SERVED[config])
    engine = load_engine(model, tmp_path / "cache", quantization="none")
    adapters: dict[str, dict[str, Any]] = {
        "both": {"r": 3, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
        "one": {"r": 4, "target_modules": [], "target_parameters": EXPERTS[1:], "use_rslora": True},
        "ranks": {
            "target_modules": ["o_proj"],
            "target_parameters": ["gate_up_proj", "down_proj"],
            "rank_pattern": {"experts.gate_up_proj": 2, r"layers\.1\..*down_proj": 5},
            "alpha_pattern": {"down_proj": 3},
        },
        "attention": {"r": 3, "target_modules": ATTENTION},
    }
    generator = torch.Generator().manual_seed(0)
    work, expected = [], {}
    for seed, (name, settings) in enumerate(adapters.items()):
        directory = tiny_adapter(tmp_path / name, model, seed=seed, b_std=0.04, **settings)
        prompt = torch.randint(3, 500, (20 + 7 * seed,), generator=generator).tolist()
        work.append(request(name, prompt, publish(engine, directory), max_tokens=1, prompt_logprobs=0))
        expected[name] = peft_logprobs(model, directory, prompt)
    plain = request("base", work[0].prompt, max_tokens=1, prompt_logprobs=0)
    answers = run(engine, [*work[:2], plain, *work[2:]])
    for name, scores in expected.items():
        assert logprobs(answers[name]) == pytest.approx(scores, abs=1e-3), name
    assert logprobs(answers["base"]) == logprobs(run(engine, [plain])["base"])
    assert logprobs(answers["base"]) != pytest.approx(expected["both"], abs=0.1)


@PEFT_WARNS
@pytest.mark.parametrize(
    ("config", "module", "parts"),
    [
        ("Qwen3Moe", "mlp", ["gate_proj", "up_proj", "down_proj"]),
        ("Mixtral", "block_sparse_moe", ["w1", "w3", "w2"]),
    ],
)
def test_adapters_of_single_experts_equal_peft(config: str, module: str, parts: list[str], tmp_path: Path) -> None:
    model = mixture(tmp_path / "model", config, **SERVED[config])
    engine = load_engine(model, tmp_path / "cache", quantization="none")
    directory = single_experts_adapter(tmp_path / "a", model, module, parts)
    reference = publish(engine, directory)
    spec = AdapterSpec.read(directory)
    assert spec.variants.names == ["experts"]
    assert spec.rows()[EXTRAS] * 1024 >= 2 * 8 * 4 * 3 * (2 * (64 + 2 * 96) + 96 + 64)  # including B's zeros
    prompt = torch.randint(3, 500, (40,)).tolist()
    answer = run(engine, [request("r", prompt, reference, max_tokens=1, prompt_logprobs=0)])["r"]
    assert logprobs(answer) == pytest.approx(peft_logprobs(model, directory, prompt), abs=1e-3)
    check_merged(engine, model, directory, tmp_path / "merged")
    tensors = load_file(directory / "adapter_model.safetensors")
    for name in [name for name in tensors if ".experts.5." in name]:
        del tensors[name]
    save_file(tensors, directory / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"target_modules asks for .*experts\.5"):
        publish(engine, directory)


def test_adapters_of_more_than_the_weights_of_experts_are_refused_by_name(tmp_path: Path) -> None:
    model = mixture(tmp_path / "model", "GptOss", **SERVED["GptOss"])
    engine = load_engine(model, tmp_path / "cache")
    for number, parameter in enumerate(("experts.down_proj_bias", "q_proj.weight")):
        directory = tiny_adapter(
            tmp_path / str(number), model, target_modules=["k_proj"], target_parameters=[*EXPERTS, parameter]
        )
        with pytest.raises(AdapterError, match=f"'{parameter}', which means .*only the weights of experts") as fault:
            publish(engine, directory)
        assert fault.value.param == "target_parameters"


def test_files_without_an_expert_are_refused_by_its_name(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.7.down_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnservableModel, match=r"layers\.1\.mlp\.experts\.down_proj lacks expert 7"):
        load_engine(broken, tmp_path / "cache")


def test_mxfp4_files_give_the_base_of_the_numbers_that_they_mean(tmp_path: Path) -> None:
    settings = {"num_local_experts": 4, "intermediate_size": 64, "tie_word_embeddings": False}
    plain = mixture(tmp_path / "plain", "GptOss", **settings)
    packed = tmp_path / "packed"
    packed.mkdir()
    for path in plain.iterdir():
        (packed / path.name).write_bytes(path.read_bytes())
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (packed / "config.json").write_text(json.dumps(config))
    tensors = load_file(plain / "model.safetensors")
    coded = dict(tensors)
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat([values, -values])
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inner, out = coded.pop(name).shape
        blocks = torch.randint(256, (experts, out, inner // 32, 16), dtype=torch.uint8)  # the low nibble comes first
        scales = torch.randint(120, 124, (experts, out, inner // 32), dtype=torch.uint8)
        nibbles = torch.stack([blocks & 15, blocks >> 4], -1).flatten(3)
        dense = values[nibbles.long()] * torch.exp2(scales.float() - 127)[..., None]
        tensors[name] = dense.flatten(2).transpose(1, 2).contiguous()
        coded[f"{name}_blocks"], coded[f"{name}_scales"] = blocks, scales
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(coded, packed / "model.safetensors", metadata={"format": "pt"})
    expected = load_engine(plain, tmp_path / "cache").base_digest
    assert load_engine(packed, tmp_path / "cache").base_digest == expected
    assert load_engine(packed, tmp_path / "cache").base_digest == expected  # from the quantised copy


def test_the_planned_decoder_runs_experts_and_their_adapters_do_not(
    engine: Engine, model: Path, tmp_path: Path
) -> None:
    if native.load() is None:
        pytest.skip("no C++ compiler, or LORAKEET_NATIVE=0")
    assert engine.runner.weights.plan is not None
    of_experts = publish(
        engine, tiny_adapter(tmp_path / "experts", model, r=2, target_modules=["q_proj"], target_parameters=EXPERTS)
    )
    threads: list[int] = []
    hook = engine.base.decoder.register_forward_hook(lambda *_: threads.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        solo(engine, [request("planned", [3, 4, 5], None, max_tokens=2)])
        assert not threads
        solo(engine, [request("modules", [3, 4, 5], of_experts, max_tokens=2)])
        assert set(threads) == {1}, "torch's threads would take the cores of the native kernels' threads"
    finally:
        hook.remove()
        torch.set_num_threads(before)
