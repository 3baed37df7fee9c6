"""A planned step: equal to transformers' forward over the same kernels, and independent of other requests."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from adapters import kernels
from adapters.device.lora import LoraLinear, StepSlot, wrap_linears
from adapters.kernels import native
from server.model import experts

LAYERS, BLOCK, BLOCKS, RANK = 3, 16, 24, 4
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama with biases": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 20}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "qwen3 moe": (transformers.Qwen3MoeConfig, {**EXPERTS, "mlp_only_layers": [1], "norm_topk_prob": False}),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 5, "intermediate_size": 64}),
}


def quantize(decoder: nn.Module) -> None:
    for name, module in list(decoder.named_modules()):
        if type(module) is nn.Linear:
            linear = Linear4bit(module.in_features, module.out_features, module.bias is not None, quant_type="nf4")
            linear.weight.data = module.weight.data * 4
            if module.bias is not None:
                linear.bias.data = torch.randn_like(module.bias)
            parent, _, child = name.rpartition(".")
            setattr(decoder.get_submodule(parent), child, linear.to("cpu"))


def quantize_experts(decoder: Any) -> None:
    dense = {name: weight.data * 4 for name, weight in decoder.named_parameters() if weight.dim() == 3}
    if dense:
        experts.replace_experts(decoder)
        for name, linear in experts.linears(decoder).items():
            linear.fill(kernels.ExpertWeights.quantize(dense[name], "nf4", torch.float32), torch.float32)
            linear.slot = StepSlot()
        experts.register()
        decoder.set_experts_implementation(experts.EXPERTS)


class Model:
    """A small quantised decoder with pools of random rank-rows, caches, and the two ways to run a step."""

    def __init__(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        config_class, overrides = FAMILIES[family]
        config = config_class(**(SIZES | overrides))
        self.slot = StepSlot()
        self.decoder: Any = transformers.AutoModel.from_config(config).float().eval().requires_grad_(False)
        for parameter in self.decoder.parameters():
            if parameter.dim() == 1:
                parameter.data.normal_(1.0, 0.2)
        quantize_experts(self.decoder)
        quantize(self.decoder)
        self.linears = wrap_linears(self.decoder, "model.", self.slot)
        self.windows = [overrides.get("sliding_window", 0)] * LAYERS
        units = 4 * RANK  # an fp32 adapter, then two bf16 ones

        def pool(width: int) -> Tensor:
            fp32, bf16 = torch.randn(RANK, width) * 0.2, (torch.randn(2 * RANK, width) * 0.2).bfloat16()
            return torch.cat([fp32.view(torch.int16).view(2 * RANK, width), bf16.view(torch.int16)]).contiguous()

        self.a = [pool(linear.in_features) for linear in self.linears]
        self.b = [pool(linear.out_features) for linear in self.linears]
        assert len(self.a[0]) == units
        shape = (BLOCKS, 2, BLOCK, 32)
        self.k = [torch.full(shape, torch.nan) for _ in range(LAYERS)]
        self.v = [torch.full(shape, torch.nan) for _ in range(LAYERS)]
        monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "planned", self._attend)
        self.decoder.config._attn_implementation = "planned"

    def plan(self) -> kernels.DecoderPlan | None:
        return kernels.DecoderPlan.build(self.decoder, self.a, self.b, self.k, self.v, self.windows)

    def step(self, spans: Sequence[tuple[int, int, int, int]]) -> dict[str, Tensor]:
        """spans: (request, first position, end position, adapter or -1); each request owns 8 blocks."""
        positions, slots, seqs, tables, segments, at = [], [], [], [], [], 0
        for request, first, end, adapter in spans:
            blocks = torch.arange(request * 8, request * 8 + 8).flip(0)
            position = torch.arange(first, end)
            positions.append(position)
            slots.append(blocks[position // BLOCK] * BLOCK + position % BLOCK)
            seqs.append((at, at + end - first, end))
            tables.append(blocks.int())
            unit, dtype = [(0, kernels.FP32), (2 * RANK, kernels.BF16), (3 * RANK, kernels.BF16)][adapter]
            segments.append((at, at + end - first, unit, RANK if adapter >= 0 else 0, dtype))
            at += end - first
        table = torch.tensor([segments] * len(self.linears), dtype=torch.int32)
        table[2, :, 3] = 0  # one linear without any adapter
        return {
            "positions": torch.cat(positions),
            "slots": torch.cat(slots),
            "seqs": torch.tensor(seqs, dtype=torch.int32),
            "block_tables": torch.stack(tables),
            "table": table,
            "scale": torch.full(table.shape[:2], 1.5),
        }

    def reference(self, hidden: Tensor, step: dict[str, Tensor]) -> Tensor:
        """The same step through transformers' forward."""
        self._step = step
        self.slot.deltas = self
        try:
            return self.decoder(
                inputs_embeds=hidden[None], position_ids=step["positions"][None], use_cache=False
            ).last_hidden_state[0]
        finally:
            self.slot.deltas = None

    def one_by_one(self, hidden: Tensor, step: dict[str, Tensor]) -> Tensor:
        """The same step by single kernel calls."""
        self._step = step
        cos, sin = (part[0] for part in self.decoder.rotary_emb(hidden[None], step["positions"][None]))

        def norm(module: Any, x: Tensor) -> Tensor:
            return kernels.rms_norm(x, module.weight, module.variance_epsilon)

        def linear(module: LoraLinear, x: Tensor) -> Tensor:
            return self.add(module, x, kernels.base_linear(x, module.weight, module.bias))

        for layer in self.decoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            x = norm(layer.input_layernorm, hidden)
            q, k, v = (
                linear(module, x).view(len(x), -1, 32)
                for module in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if hasattr(attention, "q_norm"):
                q, k = norm(attention.q_norm, q), norm(attention.k_norm, k)
            kernels.rope_(q, k, cos, sin)
            q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
            out = self._attend(attention, q, k, v, None, attention.scaling)[0][0]
            hidden = hidden + linear(attention.o_proj, out.reshape(len(x), -1))
            x = norm(layer.post_attention_layernorm, hidden)
            gate = kernels.silu_mul(linear(mlp.gate_proj, x), linear(mlp.up_proj, x))
            hidden = hidden + linear(mlp.down_proj, gate)
        return norm(self.decoder.norm, hidden)

    def add(self, linear: LoraLinear, x: Tensor, y: Tensor) -> Tensor:
        i = linear.index
        kernels.lora_add_(y, x, self.a[i], self.b[i], self._step["table"][i], self._step["scale"][i])
        return y

    def _attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        q, k, v = (states[0].transpose(0, 1) for states in (q, k, v))
        i, step = module.layer_idx, self._step
        kernels.write_kv(k, v, self.k[i], self.v[i], step["slots"])
        out = kernels.paged_attention(
            q, self.k[i], self.v[i], step["seqs"], step["block_tables"], scaling, self.windows[i]
        )
        return out[None], None


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Model:
    if native.load() is None:
        pytest.skip("no C++ compiler, or LORAKEET_NATIVE=0")
    return Model(request.param, monkeypatch)


@torch.no_grad()
def test_equals_transformers_nearly_and_the_kernels_exactly(model: Model) -> None:
    plan = model.plan()
    assert plan is not None
    step = model.step([(0, 0, 37, 0), (1, 0, 5, 1), (2, 0, 20, -1)])
    hidden = torch.randn(62, 128)
    expected = model.reference(hidden.clone(), step)
    torch.testing.assert_close(plan.run(hidden.clone(), **step), expected, rtol=1e-4, atol=1e-4)
    if not experts.linears(model.decoder):  # torch's softmax of a router gives other bits
        assert torch.equal(plan.run(hidden.clone(), **step), model.one_by_one(hidden, step))
    step = model.step([(2, 20, 21, -1), (0, 37, 38, 0), (1, 5, 20, 2)])
    hidden = torch.randn(17, 128)
    expected = model.reference(hidden.clone(), step)
    torch.testing.assert_close(plan.run(hidden.clone(), **step), expected, rtol=1e-4, atol=1e-4)


def test_results_are_bit_equal_alone_chunked_or_batched(model: Model) -> None:
    plan = model.plan()
    assert plan is not None
    hidden = {0: torch.randn(45, 128), 1: torch.randn(30, 128), 2: torch.randn(26, 128)}
    adapters = {0: 0, 1: 1, 2: -1}

    def run(*spans: tuple[int, int, int]) -> list[Tensor]:
        out = plan.run(
            torch.cat([hidden[r][first:end] for r, first, end in spans]),
            **model.step([(r, first, end, adapters[r]) for r, first, end in spans]),
        )
        return list(out.split([end - first for _, first, end in spans]))

    alone = {r: run((r, 0, len(hidden[r])))[0] for r in hidden}
    first = run((0, 0, 11), (1, 0, 30))
    second = run((2, 0, 25), (0, 11, 44))
    third = run((0, 44, 45), (2, 25, 26))
    assert torch.equal(torch.cat([first[0], second[1], third[0]]), alone[0])
    assert torch.equal(first[1], alone[1])
    assert torch.equal(torch.cat([second[0], third[1]]), alone[2])


def test_without_adapters(model: Model) -> None:
    plan = model.plan()
    assert plan is not None
    step = model.step([(0, 0, 9, -1)])
    hidden = torch.randn(9, 128)
    expected = plan.run(hidden.clone(), **step)
    del step["table"], step["scale"]
    assert torch.equal(plan.run(hidden.clone(), **step), expected)


def test_unsupported_models_have_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model("llama", monkeypatch)
    model.decoder.layers[1].input_layernorm.weight.data = torch.ones(128, dtype=torch.bfloat16)
    assert model.plan() is None
    model = Model("llama", monkeypatch)
    model.decoder.config.hidden_act = "gelu"
    assert model.plan() is None
    model = Model("mixtral", monkeypatch)
    model.decoder.layers[2].mlp.gate.weight.data = torch.ones(5, 128, dtype=torch.float64)
    assert model.plan() is None
    model = Model("llama", monkeypatch)
    monkeypatch.setenv("LORAKEET_NATIVE", "0")
    assert model.plan() is None
