"""Mixed adapters against PEFT's `add_weighted_adapter`."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from adapters.offline.factors import Factors, read_factors
from adapters.offline.mix import mix, write_mixed
from adapters.offline.recipe import Recipe
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.inspection import inspect
from adapters.peft_format.outline import Outline
from tests.support.tiny import tiny_adapter

WEIGHTS = (0.7, -1.2, 0.4)
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cat": {},
    "svd": {},
    "svd of a given rank": {"rank": 3},
    "ties": {"density": 0.3},
    "ties by number": {"density": 0.3, "majority_sign": "frequency"},
    "ties_svd": {"density": 0.5},
    "dare_linear": {"density": 0.6},
    "dare_linear_svd": {"density": 0.6},
    "dare_ties": {"density": 0.6},
    "dare_ties_svd": {"density": 0.6},
    "magnitude_prune": {"density": 0.2},
    "magnitude_prune_svd": {"density": 0.2},
    "magnitude_prune of everything": {"density": 1.0},
}


@pytest.fixture(scope="module")
def made(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of rank 6 on partly the same modules, each with its own scalings."""
    root = tmp_path_factory.mktemp("mix")
    shapes: list[dict[str, Any]] = [
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 9},
        {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 3},
        {"target_modules": ["q_proj", "v_proj"], "dtype": torch.bfloat16},
    ]
    return [tiny_adapter(root / str(i), model_dir, seed=i, r=6, **shape) for i, shape in enumerate(shapes)]


@pytest.fixture(scope="module")
def linears(model_dir: Path) -> dict[str, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir)

    class Size:
        def __init__(self, name: str, linear: torch.nn.Linear) -> None:
            self.kind, self.in_features, self.out_features = name, linear.in_features, linear.out_features

    return {
        name: Size(name.rpartition(".")[2], module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    }


@pytest.fixture(scope="module")
def sources(made: list[Path], linears: dict[str, Any]) -> list[dict[str, Factors]]:
    for directory in made:
        inspect(directory, linears, "LlamaForCausalLM").save(directory)
    return [read_factors(directory) for directory in made]


def by_peft(model: Path, adapters: list[Path], method: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Module -> delta weight, mixed by PEFT."""
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    wrapped: Any = peft.PeftModel.from_pretrained(base, adapters[0], adapter_name="0")
    for i, adapter in enumerate(adapters[1:], start=1):
        wrapped.load_adapter(adapter, str(i))
    wrapped.base_model.add_weighted_adapter(
        [str(i) for i in range(len(adapters))],
        list(WEIGHTS[: len(adapters)]),
        "mix",
        combination_type=method,
        svd_rank=options.get("rank"),
        density=options.get("density"),
        majority_sign_method=options.get("majority_sign", "total"),
    )
    modules: dict[str, Any] = dict(wrapped.named_modules())
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("mix").detach()
        for name, module in modules.items()
        if hasattr(module, "get_delta_weight") and "mix" in module.lora_A
    }


@pytest.mark.filterwarnings("ignore:The density 1.0")
@pytest.mark.parametrize("case", METHODS)
def test_every_method_equals_pefts(
    case: str, made: list[Path], sources: list[dict[str, Factors]], model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, options = case.partition(" ")[0], METHODS[case]
    mixed = mix(sources, Recipe(method, WEIGHTS, seed=5, **options))  # type: ignore[arg-type]

    generator, bernoulli = torch.Generator().manual_seed(5), torch.bernoulli
    monkeypatch.setattr("peft.utils.merge_utils.torch.bernoulli", lambda share: bernoulli(share, generator=generator))
    expected = by_peft(model_dir, made, method, options)
    assert list(mixed) == list(expected)  # the order matters: random numbers are drawn in it
    for name, delta in expected.items():
        a, b = mixed[name]
        torch.testing.assert_close(b @ a, delta, atol=2e-6, rtol=1e-4)


def test_one_adapter_is_only_weighted(made: list[Path], sources: list[dict[str, Factors]], model_dir: Path) -> None:
    mixed = mix(sources[:1], Recipe("ties_svd", WEIGHTS[:1], density=0.1))
    for name, delta in by_peft(model_dir, made[:1], "ties_svd", {"density": 0.1}).items():
        a, b = mixed[name]
        torch.testing.assert_close(b @ a, delta)


def test_unequal_ranks(linears: dict[str, Any]) -> None:
    def factors(rank: int) -> dict[str, Factors]:
        return {"x": Factors(torch.randn(rank, 8), torch.randn(12, rank), 0.5)}

    pair = [factors(2), factors(3)]
    for method in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"):
        with pytest.raises(AdapterError, match="equal rank") as caught:
            mix(pair, Recipe(method, (1.0, 1.0)))
        assert caught.value.param == "mix"
    exact = pair[0]["x"].delta - 2 * pair[1]["x"].delta
    for method, rank in ("cat", 5), ("svd", 3):
        a, b = mix(pair, Recipe(method, (1.0, -2.0)))["x"]  # type: ignore[arg-type]
        assert (len(a), b.shape[1]) == (rank, rank)
        if method == "cat":
            torch.testing.assert_close(b @ a, exact)
    a, b = mix(pair, Recipe("svd", (1.0, -2.0), rank=1000))["x"]
    torch.testing.assert_close(b @ a, exact)


def test_random_pruning_can_be_made_again(sources: list[dict[str, Factors]]) -> None:
    def made(seed: int) -> torch.Tensor:
        return mix(sources, Recipe("dare_linear", WEIGHTS, density=0.5, seed=seed))[next(iter(sources[0]))][0]

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))


def test_a_written_mixture_reads_back_equal(
    sources: list[dict[str, Factors]], linears: dict[str, Any], tmp_path: Path
) -> None:
    mixed = mix(sources, Recipe("cat", WEIGHTS))  # ranks 18 and 12
    write_mixed(tmp_path, mixed, "base")
    inspect(tmp_path, linears, "LlamaForCausalLM").save(tmp_path)
    again = read_factors(tmp_path)
    assert set(again) == set(mixed)
    for name, (a, b) in mixed.items():
        torch.testing.assert_close(again[name].delta, b @ a)


@pytest.mark.parametrize(
    ("config", "named"), [({"use_dora": True}, "dora"), ({"alora_invocation_tokens": [5, 6]}, "alora")]
)
def test_mixing_variants_is_refused(
    config: dict[str, Any], named: str, linears: dict[str, Any], model_dir: Path, tmp_path: Path
) -> None:
    adapter = tiny_adapter(tmp_path, model_dir, target_modules=["q_proj"], **config)
    inspect(adapter, linears, "LlamaForCausalLM", Outline.read(model_dir)).save(adapter)
    with pytest.raises(AdapterError, match=f"plain LoRA.*{named}") as caught:
        read_factors(adapter)
    assert caught.value.param == "mix"
