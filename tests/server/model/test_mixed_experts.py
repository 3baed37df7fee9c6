"""Several adapters of experts with weights: in one request, and mixed into one, in either layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from msgspec.structs import replace
from safetensors.torch import load_file
from torch import Tensor

from adapters.offline import mix
from adapters.peft_format.directory import AdapterSpec
from server.engine.engine import Engine
from tests.server.model.test_experts import EXPERTS, PEFT_WARNS, SERVED, logprobs, mixture, peft_logprobs
from tests.support.offline import load_engine, publish, request, run
from tests.support.single_experts import on_single_experts, single_experts_adapter
from tests.support.tiny import tiny_adapter

pytestmark = PEFT_WARNS
PARTS = ["gate_proj", "up_proj", "down_proj"]
WEIGHTS = {"both": 0.7, "apart": -0.4, "down": 1.2, "attention": 0.5}
PROMPT = torch.randint(3, 500, (40,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture(tmp_path_factory.mktemp("mixture") / "model", **SERVED["Qwen3Moe"])


@pytest.fixture(scope="module")
def engine(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_engine(model, tmp_path_factory.mktemp("cache"), quantization="none")


@pytest.fixture(scope="module")
def adapters(model: Path, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    made = {
        "down": tiny_adapter(folder / "down", model, r=2, seed=2, target_modules=[], target_parameters=EXPERTS[1:]),
        "both": tiny_adapter(
            folder / "both", model, r=3, seed=1, b_std=0.04, target_modules=["q_proj"], target_parameters=EXPERTS
        ),
        "apart": single_experts_adapter(folder / "apart", model, "mlp", PARTS),
        "attention": tiny_adapter(folder / "attention", model, r=4, seed=3, target_modules=["q_proj", "o_proj"]),
    }
    for directory in made.values():
        publish(engine, directory)
    return made


def scored(model: Any) -> list[float]:
    ids = torch.tensor(PROMPT)
    with torch.no_grad():
        scores = model(ids[None]).logits[0, :-1].log_softmax(-1)
    found: list[float] = scores.gather(1, ids[1:, None])[:, 0].tolist()
    return found


@pytest.fixture(scope="module")
def expected(model: Path, adapters: dict[str, Path]) -> list[float]:
    """Log-probabilities of the base plus the weighted sum of the changes in PEFT's merges, in fp32."""
    import peft

    def base() -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    summed = base()
    before: Mapping[str, Tensor] = {name: weight.clone() for name, weight in summed.state_dict().items()}
    with torch.no_grad():
        for name, directory in adapters.items():
            merged = peft.PeftModel.from_pretrained(base(), str(directory)).merge_and_unload().state_dict()
            for parameter, weight in summed.state_dict().items():
                weight += WEIGHTS[name] * (merged[parameter] - before[parameter])
    return scored(summed)


def mixed(engine: Engine, sources: dict[str, Path], target: Path, method: str, **options: Any) -> Path:
    """Mix adapters as the server does."""
    target.mkdir()
    experts = {name: json.loads(json.dumps(size._asdict())) for name, size in engine.ready().experts.items()}
    order = {
        "sources": [str(path) for path in sources.values()],
        "recipe": {"method": method, "weights": tuple(WEIGHTS[name] for name in sources), **options},
        "target": str(target),
        "base": None,
        "experts": experts,
    }
    mix.carry_out(order)
    return target


def served(engine: Engine, directory: Path) -> list[float]:
    work = request("r", PROMPT, publish(engine, directory), max_tokens=1, prompt_logprobs=0)
    return logprobs(run(engine, [work])["r"])


def test_one_request_with_all_of_them(engine: Engine, adapters: dict[str, Path], expected: list[float]) -> None:
    used = [replace(publish(engine, path), weight=WEIGHTS[name]) for name, path in adapters.items()]
    work = replace(request("r", PROMPT, max_tokens=1, prompt_logprobs=0), adapters=used)
    assert logprobs(run(engine, [work])["r"]) == pytest.approx(expected, abs=1e-3)
    base = logprobs(run(engine, [request("r", PROMPT, max_tokens=1, prompt_logprobs=0)])["r"])
    assert base != pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(("method", "rank"), [("cat", None), ("svd", 16)])
def test_all_of_them_mixed(
    method: str,
    rank: int | None,
    engine: Engine,
    model: Path,
    adapters: dict[str, Path],
    expected: list[float],
    tmp_path: Path,
) -> None:
    """The first has neither gate nor up; the file's order is still the base's."""
    made = mixed(engine, adapters, tmp_path / "mixed", method, rank=rank)
    assert served(engine, made) == pytest.approx(expected, abs=1e-3)
    assert peft_logprobs(model, made, PROMPT) == pytest.approx(expected, abs=1e-3)
    assert set(AdapterSpec.read(made).variants.experts) == set(engine.ready().experts)


def test_linear_mixes_of_single_experts_are_pefts(engine: Engine, model: Path, tmp_path: Path) -> None:
    """There each expert's linear is a module, which PEFT can mix; it cannot mix parameters."""
    sources = {
        name: single_experts_adapter(tmp_path / name, model, "mlp", PARTS, seed=seed, lora_alpha=5 * seed)
        for seed, name in enumerate(("both", "apart"), start=1)
    }
    for directory in sources.values():
        publish(engine, directory)
    made = mixed(engine, sources, tmp_path / "mixed", "linear")
    theirs: Any = on_single_experts(model, sources["both"], "mlp", PARTS)
    config = theirs.peft_config["default"]
    theirs.add_adapter("other", type(config).from_pretrained(str(sources["apart"])))
    parameters = {name.replace(".other.", "."): value for name, value in theirs.named_parameters() if ".other." in name}
    with torch.no_grad():
        for name, tensor in load_file(sources["apart"] / "adapter_model.safetensors").items():
            parameters.pop(name).copy_(tensor)
    assert not parameters
    theirs.base_model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "mixed", combination_type="linear")
    theirs.set_adapter("mixed")
    assert served(engine, made) == pytest.approx(scored(theirs), abs=1e-3)
