"""Jobs whose adapter is on experts: shapes, parameters and memory."""

import dataclasses

import msgspec
import pytest

from adapters.peft_format.fields import AdapterError
from adapters.peft_format.modules import ExpertsModule, Variants
from adapters.peft_format.sizes import EXTRAS, ExpertsSize
from server.finetune import hyperparameters
from server.messages.training import ModuleShape
from server.registry.capacity import check_fit
from tests.support.harness import base_info

DOWN = "model.layers.0.mlp.experts.down_proj"
BASE = msgspec.structs.replace(
    base_info(), experts={DOWN: ExpertsSize(8, 16, 24)}, pool_rows=base_info().pool_rows | {EXTRAS: 4}
)
OF_EXPERTS = hyperparameters.LoraOptions(r=2, lora_alpha=4, target_parameters=["experts.down_proj"])


def test_shapes_parameters_and_memory_of_an_experts_adapter() -> None:
    config = hyperparameters.adapter_config(OF_EXPERTS, "base", BASE)
    assert config["target_modules"] == ["q_proj", "v_proj"]  # PEFT's all-linear would include the experts
    shapes = hyperparameters.modules(config, BASE)
    assert shapes == dict.fromkeys([*BASE.linears, DOWN], ModuleShape(2, 2.0))
    assert hyperparameters.parameters(shapes, BASE) == 2 * (4 * 32 + 8 * 40)
    check_fit(hyperparameters.saved_spec(shapes, BASE), BASE)
    small = msgspec.structs.replace(BASE, pool_rows=BASE.pool_rows | {EXTRAS: 2})
    with pytest.raises(AdapterError, match="needs 3 KiB on the device, and 2 KiB"):
        check_fit(hyperparameters.saved_spec(shapes, small), small)


def test_an_option_that_peft_cannot_train_on_experts_is_refused_by_name() -> None:
    dropped = msgspec.structs.replace(OF_EXPERTS, lora_dropout=0.1)
    with pytest.raises(AdapterError) as fault:
        hyperparameters.modules(hyperparameters.adapter_config(dropped, "base", BASE), BASE)
    assert fault.value.param == "lora_dropout"
    plain = hyperparameters.adapter_config(hyperparameters.LoraOptions(), "base", base_info())
    assert plain["target_modules"] == "all-linear"
    assert "target_parameters" not in plain


def test_a_job_goes_on_from_adapters_of_experts_in_either_layout() -> None:
    spec = hyperparameters.saved_spec({"model.layers.0.self_attn.q_proj": ModuleShape(2, 2.0)}, base_info())
    whole = ExpertsModule(3, 0.5, "a", "b", experts=8, parameter=DOWN)
    goes_on = dataclasses.replace(spec, variants=Variants(experts={DOWN: whole}))
    assert hyperparameters.trained_on(goes_on) == hyperparameters.trained_on(spec) | {DOWN: ModuleShape(3, 0.5)}
    apart = "model.layers.0.mlp.experts.*.half"
    half = dataclasses.replace(whole, part=1, parts=2)
    shapes = hyperparameters.trained_on(dataclasses.replace(spec, variants=Variants(experts={apart: half})))
    assert shapes[apart] == ModuleShape(3, 0.5, DOWN, 1, 2)
    assert hyperparameters.parameters({apart: shapes[apart]}, BASE) == 3 * 8 * (16 + 12)
    more = Variants(experts={DOWN: whole}, magnitudes={"linear": "m"})
    with pytest.raises(AdapterError, match=r"more than A and B \(dora\)"):
        hyperparameters.trained_on(dataclasses.replace(spec, variants=more))
