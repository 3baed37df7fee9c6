"""The whole engine on the Triton kernels: on a GPU if there is one, else in the interpreter, on the tiny model."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import kernels
from server.engine.engine import Engine
from server.messages.protocol import Generate
from tests.server.engine.test_invariance import settle
from tests.server.engine.test_parity import ADAPTERS, FAMILIES, our_logprobs, peft_logprobs
from tests.support.interpreter import DEVICE
from tests.support.offline import load_engine, publish, request, run
from tests.support.tiny import tiny_adapter, tiny_model

pytestmark = pytest.mark.usefixtures("triton_kernels")

PROMPT = torch.randint(3, 500, (18,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer: the interpreter takes a tenth of a millisecond for every operation of every program."""
    return tiny_model(tmp_path_factory.mktemp("small"), num_hidden_layers=1, intermediate_size=128)


def engine_of(model: Path, cache: Path, **overrides: Any) -> Engine:
    engine = load_engine(model, cache, device=DEVICE, dtype="float32", **overrides)
    assert isinstance(engine.runner.weights.plan, decoder_class())
    return engine


def decoder_class() -> type:
    from adapters.kernels.triton.decoder import TritonDecoder

    return TritonDecoder


@pytest.mark.parametrize("name", ["rank 17, mlp", "rank 16, bf16"])
def test_adapters_equal_peft(name: str, small: Path, cache_dir: Path, tmp_path: Path) -> None:
    engine = engine_of(small, cache_dir)
    adapter = tiny_adapter(tmp_path / "adapter", small, seed=len(name), **ADAPTERS[name])
    expected = peft_logprobs(small, adapter, "nf4", PROMPT, DEVICE)
    torch.testing.assert_close(our_logprobs(engine, adapter, PROMPT), expected, atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["qwen3, norms on q and k", "mistral, sliding window", "qwen2, biases"])
def test_families_equal_peft(name: str, cache_dir: Path, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", num_hidden_layers=1, **FAMILIES[name])
    expected = peft_logprobs(model, None, "nf4", PROMPT * 3, DEVICE)
    actual = our_logprobs(engine_of(model, cache_dir), None, PROMPT * 3)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)


def test_batched_equals_solo_bit_for_bit_when_tiles_are_fixed(
    small: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.triton, "_fixed", False)  # restored after the engines have set it
    adapter = tiny_adapter(tmp_path / "adapter", small, r=3, dtype=torch.bfloat16)
    prompts = [[draw * 7 % 500 + 3 for draw in range(length)] for length in (5, 20)]

    def requests(engine: Engine) -> list[Generate]:
        references = [publish(engine, adapter), None]
        return [
            request(f"r{i}", prompt, reference, max_tokens=2, logprobs=2)
            for i, (prompt, reference) in enumerate(zip(prompts, references, strict=True))
        ]

    alone, together = (
        engine_of(small, cache_dir, deterministic=True),
        engine_of(small, cache_dir, deterministic=True, max_batch_tokens=16, max_batch_requests=4),
    )
    expected = {key: answer for single in requests(alone) for key, answer in run(alone, [single]).items()}
    assert run(together, requests(together), every=1) == expected
    settle(together)


def test_the_dispatch_prefers_triton() -> None:
    x = torch.randn(2, 16, device=DEVICE)
    assert kernels._compiled_kernels(x) is kernels.triton.load()
    assert kernels._compiled_kernels(x.requires_grad_()) is None
