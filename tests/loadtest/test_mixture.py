"""Decoding a mixture beside others: the bytes that bound it, the comparison, and the peer's layouts of experts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from loadtest import kernels, mixture
from loadtest.peers import mixture_worker

TINY: dict[str, Any] = mixture.SHAPE | {
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 512,
}


def test_the_bound_reads_each_weight_of_a_step_once() -> None:
    alone, together = (mixture.active_bytes(mixture.SHAPE, count) / 1e6 for count in mixture.COUNTS)
    experts = 8 * 3 * 512 * 384 * (1 / 2 + 1 / 64) / 1e6  # per layer, for one request
    rest = 8 * (3 * 512 * 512 * (1 / 2 + 1 / 64) + 4 * 64 * 512) / 1e6 + 32768 * 512 / 1e6
    assert alone == pytest.approx(8 * experts + rest, rel=0.001)
    met = 64 * (1 - (7 / 8) ** 8)  # experts that at least one of eight requests is routed to
    assert together == pytest.approx(met * experts + rest, rel=0.001)


def test_a_step_is_timed_when_everybody_has_begun() -> None:
    early = {"times": [0.0, 1.0, 9.0, 9.01, 9.02]}
    late = {"times": [8.0, 8.01, 8.03, 8.05, 8.07]}
    assert mixture.milliseconds([early, late]) == pytest.approx(20.0)


def test_the_verdicts_take_the_fastest_peer() -> None:
    def side(name: str, one: list[float], eight: list[float]) -> mixture.Side:
        module = mixture.OUR_ENGINE if name.startswith("ours") else mixture.PEER
        return mixture.Side(name, module, {}, {1: one, 8: eight})

    ours = side("ours", [2.0, 3.0, 9.0], [30.0]), side("ours, int8", [2.0], [9.0])
    rows = [*ours, side("a", [9.0], [50.0]), side("b", [12.0], [45.0])]
    result = mixture.summary(rows, mixture.SHAPE, 20.0, {"read_gb_s": 19.0, "threads": 2})
    bound = {count: mixture.active_bytes(mixture.SHAPE, count) / 20e6 for count in mixture.COUNTS}
    of_bound = [row.median(count) / bound[count] for row in ours for count in mixture.COUNTS]
    assert [line["value"] for line in result["verdicts"]] == [3.0, 1.5, *(pytest.approx(x, abs=1e-3) for x in of_bound)]
    assert [line["holds"] for line in result["verdicts"]] == [True, False, False, False, True, False]
    assert result["bound_ms"]["1"] == pytest.approx(mixture.active_bytes(mixture.SHAPE, 1) / 20e6)
    assert result["roofline"] == {"read_gb_s": 20.0, "threads": 2}
    assert mixture.table(result).row_count == 5
    assert mixture.markdown(result).splitlines()[2:5] == [
        "| ours | 3.0 (2.0-9.0) | 30.0 (30.0-30.0) |",
        "| ours, int8 | 2.0 (2.0-2.0) | 9.0 (9.0-9.0) |",
        "| a | 9.0 (9.0-9.0) | 50.0 (50.0-50.0) |",
    ]


def test_every_layout_of_the_peer_computes_the_same_model() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**TINY)
    ids = torch.randint(0, 512, (1, 12))
    model = AutoModelForCausalLM.from_config(config).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def logits(layout: str) -> torch.Tensor:
        model = AutoModelForCausalLM.from_config(config).eval()
        model.load_state_dict(state)
        mixture_worker.quantize_experts(model, layout)
        with torch.inference_mode():
            found: torch.Tensor = model(ids).logits
        return found

    dense, parameters, linears = map(logits, mixture_worker.LAYOUTS)
    torch.testing.assert_close(linears, parameters, rtol=1e-3, atol=1e-3)
    assert not torch.equal(linears, dense)


def test_both_sides_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = mixture.sides(tmp_path)
    assert [row.name for row in every][:3] == [
        "lorakeet",
        "lorakeet, int8 activations",
        "transformers + bitsandbytes, experts not quantised, fp32",
    ]
    monkeypatch.setattr(mixture, "sides", lambda _: [*every[:2], every[6]])
    monkeypatch.setattr(kernels, "roofline", lambda: {"read_gb_s": 1.0, "threads": 1})
    said: list[str] = []
    result = mixture.run(tmp_path, threads=1, rounds=1, report=said.append, shape=TINY, tokens=4)
    assert len(said) == 6
    assert all(len(values) == 1 and values[0] > 0 for row in result["rows"] for values in row["ms"].values())
