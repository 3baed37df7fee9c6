"""The config reader compared with PEFT's own classes, and tested with hostile configs."""

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from adapters.peft_format.config import MAX_CONFIG_BYTES, AdapterConfig, parse_config
from adapters.peft_format.fields import FIELDS, PEFT_VERSION, AdapterError

KINDS = {
    "self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
}
MODULES = [f"model.layers.{i}.{block}.{kind}" for i in range(12) for block, kinds in KINDS.items() for kind in kinds]
BASE = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def parse(**fields: Any) -> AdapterConfig:
    return parse_config(json.dumps(BASE | fields).encode())


def refusal(raw: bytes) -> AdapterError:
    """The error that refuses this config, at whichever stage."""

    def read() -> None:
        config = parse_config(raw)
        config.check_class("LlamaForCausalLM")
        config.resolve(MODULES)

    with pytest.raises(AdapterError) as caught:
        read()
    assert len(str(caught.value)) < 1000
    return caught.value


# --- PEFT's own configs ----------------------------------------------------------------------------


def test_the_table_has_every_field_of_peft_with_its_default(tmp_path: Path) -> None:
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} == FIELDS.keys()
    peft.LoraConfig(target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    for name in saved.keys() - {"peft_type", "target_modules", "peft_version"}:
        assert FIELDS[name].parse(name, saved[name]) == FIELDS[name].default, name


def test_what_peft_saves_is_accepted(tmp_path: Path) -> None:
    peft.LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.1,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
        rank_pattern={"layers.1.self_attn.q_proj": 4},
        use_rslora=True,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0),
        base_model_name_or_path="someone/some-model",
    ).save_pretrained(str(tmp_path))
    config = parse_config((tmp_path / "adapter_config.json").read_bytes())
    assert config.recorded["base_model_name_or_path"] == "someone/some-model"
    assert config.recorded["eva_config"]["rho"] == 1.0
    assert config.resolve(MODULES)["model.layers.1.self_attn.q_proj"] == (4, 32 / 2)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_initialisation_that_changed_the_base_is_refused_with_advice(init: str) -> None:
    fault = refusal(json.dumps(BASE | {"init_lora_weights": init}).encode())
    assert "path_initial_model_for_weight_conversion" in str(fault)


def test_other_types_are_refused_with_a_reason() -> None:
    for name in {kind.value for kind in peft.PeftType} - {"LORA"} | {"QLORA"}:
        fault = refusal(json.dumps(BASE | {"peft_type": name}).encode())
        assert name in str(fault)
        assert fault.code == "unsupported_adapter_feature"


def test_variants_are_distinguished_from_plain_lora() -> None:
    parse(exclude_modules=["k_proj"]).check_plain()
    for fields in ({"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["norm"]}, {"lora_bias": True}):
        with pytest.raises(AdapterError) as caught:
            parse(**fields).check_plain()
        assert caught.value.param in fields


def test_spelling_does_not_change_the_normal_form() -> None:
    one = parse(target_modules=["v_proj", "q_proj", "q_proj"], layers_to_transform=3, modules_to_save=[], future=None)
    other = parse(target_modules=["q_proj", "v_proj"], layers_to_transform=[3], megatron_core="megatron.core")
    assert one.normalised() == other.normalised()
    assert json.loads(json.dumps(one.normalised())) == one.normalised()


names = st.sampled_from(
    [*KINDS["self_attn"], *KINDS["mlp"], "self_attn.q_proj", "1.mlp.up_proj", MODULES[0], MODULES[9]]
)
regexes = st.sampled_from(
    [
        r".*(q|v)_proj",
        r"model\.layers\.[0-3]\..*",
        r".*\.mlp\..*",
        r"model.*down_proj",
        r"q_proj",
        r".*",
        r".*\.1\d?\..*",
        r"^(?!.*(?:visual|mlp)).*(?:q_proj|up_proj).*",  # typical of trainers of image-and-text models
        r"^(model(?=\.).*\.(k_proj|down_proj))$",
        r"^(model)(?!.*(lm_head|output|emb|up_proj)).*",
    ]
)
pattern_keys = st.sampled_from(
    [
        "q_proj",
        "(q|v)_proj",
        r"layers\.1\..*",
        "layers.1.self_attn.q_proj",
        "mlp.*",
        "^model.layers.10.*",
        r".*\.1\.mlp\.up_proj",
        r"layers(?=\.1).*up_proj",
    ]
)


@given(
    target=st.one_of(st.lists(names, min_size=1, max_size=3), regexes, st.just("all-linear")),
    exclude=st.one_of(st.none(), st.lists(names, max_size=2), regexes),
    layers=st.one_of(st.none(), st.integers(0, 11), st.lists(st.integers(0, 11), max_size=3)),
    layers_pattern=st.sampled_from([None, "layers", ["h", "layers"], "model.layers"]),
    ranks=st.dictionaries(pattern_keys, st.integers(1, 64), max_size=3),
    alphas=st.dictionaries(pattern_keys, st.integers(1, 64), max_size=3),
    rslora=st.booleans(),
)
def test_selection_ranks_and_scalings_equal_pefts(
    target: Any, exclude: Any, layers: Any, layers_pattern: Any, ranks: Any, alphas: Any, rslora: bool
) -> None:
    if isinstance(target, str) or layers in (None, []):
        layers = layers_pattern = None
    fields = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": MODULES if target == "all-linear" else target,
        "exclude_modules": exclude,
        "layers_to_transform": layers,
        "layers_pattern": layers_pattern,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": rslora,
    }
    oracle = peft.LoraConfig(**fields)
    expected = {}
    for module in MODULES:
        matched = check_target_module_exists(oracle, module)
        if matched and type(matched).__name__ != "_ExcludedModule":
            rank = ranks.get(get_pattern_key(ranks, module), 8)
            alpha = alphas.get(get_pattern_key(alphas, module), 16)
            expected[module] = (rank, alpha / math.sqrt(rank) if rslora else alpha / rank)
    config = parse(**fields | {"target_modules": target})
    try:
        found = config.resolve(MODULES)
    except AdapterError as fault:
        # PEFT refuses an empty selection too, but ignores a layer that does not exist.
        assert not expected or fault.param == "layers_to_transform"  # noqa: PT017
        return
    assert found == expected


def test_all_linear_leaves_the_output_head_out() -> None:
    assert "lm_head" not in parse(target_modules="all-linear").resolve([*MODULES, "lm_head"])


def each(name: str, *values: Any) -> list[tuple[str, Any]]:
    return [(name, value) for value in values]


# --- refusals ------------------------------------------------------------------------------------

HOSTILE: list[tuple[str, Any]] = [
    ("peft_type", "LOHA"),
    ("peft_type", "QLORA"),
    ("peft_type", ["LORA"]),
    ("task_type", "TOKEN_CLS"),
    ("auto_mapping", {"base_model_class": "LlamaForCausalLM", "parent_library": "os"}),
    ("auto_mapping", {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}),
    ("auto_mapping", {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models/../../evil"}),
    ("auto_mapping", {"base_model_class": "MistralForCausalLM", "parent_library": "transformers.models.mistral"}),
    ("auto_mapping", {"base_model_class": "system", "parent_library": "transformers.x", "run": "code"}),
    ("peft_version", 21),
    ("base_model_name_or_path", ["/etc/passwd"]),
    ("base_model_name_or_path", "x" * 5000),
    ("revision", {"ref": "main"}),
    ("inference_mode", "yes"),
    *each("r", 0, -1, 2**16 + 1, 2**63, 8.0, "8", True, None, [8]),
    *each("lora_alpha", 0, -1, 1_000_001, 2**63, "16", True, None, {}),
    *each("lora_dropout", -0.1, 1.1, "0", None, False),
    ("use_rslora", 1),
    ("target_modules", None),
    ("target_modules", []),
    ("target_modules", ""),
    ("target_modules", False),
    ("target_modules", 7),
    ("target_modules", ["q_proj", 7]),
    ("target_modules", ["q_proj", "no_such_proj"]),
    ("target_modules", ["q_proj", ""]),
    ("target_modules", "no_such_proj"),
    ("target_modules", "(q_proj"),
    ("target_modules", r"(?=.*(q)_proj).*\1"),
    ("target_modules", "(((((.*)*)*)*)*)*x"),
    ("target_modules", "x" * 5000),
    ("exclude_modules", 0),
    ("exclude_modules", "(?!q)(.)\\1*"),
    ("exclude_modules", ["q_proj", "v_proj"]),
    ("exclude_modules", ".*"),
    *each("layers_to_transform", -1, 12, [0, 12], 2**63, 1.0, "0", True, [None], {}),
    ("layers_pattern", "layers"),
    ("rank_pattern", {"q_proj": 0}),
    ("rank_pattern", {"q_proj": 2**63}),
    ("rank_pattern", {"q_proj": "8"}),
    ("rank_pattern", {"": 8}),
    ("rank_pattern", {"no_such_proj": 8}),
    ("rank_pattern", {"a)(b": 8}),
    ("rank_pattern", {f"(q|{i})_proj": 8 for i in range(1025)}),
    ("rank_pattern", {f"((.?){{30}}){{30}}{i}_proj|q_proj": 8 for i in range(100)}),
    ("rank_pattern", ["q_proj"]),
    ("alpha_pattern", {"q_proj": 0}),
    ("alpha_pattern", {"q_proj": None}),
    ("alpha_pattern", {"(?P<x>q)(?P=x)": 8}),
    ("init_lora_weights", "import os; os.system('id')"),
    ("init_lora_weights", 1),
    ("loftq_config", "/etc/passwd"),
    ("loftq_config", {"loftq_bits": {"deep": []}}),
    ("eva_config", ["/etc/passwd"]),
    ("corda_config", "/etc/passwd"),
    ("lora_ga_config", True),
    ("bias", "some"),
    ("bias", True),
    ("fan_in_fan_out", 1),
    ("use_dora", 0),
    ("lora_bias", "yes"),
    ("modules_to_save", "lm_head"),
    ("modules_to_save", [""]),
    ("modules_to_save", [f"norm{i}" for i in range(1025)]),
    *each("trainable_token_indices", 7, [-1], [2**31], [1.0], [True], [3, 3], {"lm_head": []}),
    ("trainable_token_indices", list(range(2**16 + 1))),
    ("trainable_token_indices", {"embed_tokens": [1], "lm_head": [1], "wte": [1]}),
    ("trainable_token_indices", {"": [1]}),
    ("ensure_weight_tying", 1),
    *each("target_parameters", "experts.down_proj", [""], [1], {}, [f"w{i}" for i in range(1025)]),
    ("layer_replication", [[0, 4], [2, 5]]),
    *each("alora_invocation_tokens", [], 7, [-1], [2**31], ["x"], [None], {}, [1] * 257),
    ("megatron_config", {"tensor_model_parallel_size": 1}),
    ("megatron_core", "os"),
    ("use_qalora", True),
    ("qalora_group_size", 32),
    ("velora_config", {}),
    ("monteclora_config", {}),
    ("use_bdlora", {}),
    ("arrow_config", {}),
    ("kasa_config", {}),
    ("runtime_config", {"ephemeral_gpu_offload": True}),
]


@pytest.mark.parametrize(("field", "value"), HOSTILE, ids=lambda item: str(item)[:40])
def test_a_hostile_value_is_refused_by_the_fields_name(field: str, value: Any) -> None:
    started = time.monotonic()
    fault = refusal(json.dumps(BASE | {field: value}).encode())
    assert fault.param == field
    assert field in str(fault)
    assert time.monotonic() - started < 10


def test_every_field_has_a_hostile_value_above() -> None:
    assert FIELDS.keys() <= {field for field, _ in HOSTILE}


def test_fields_that_peft_does_not_have_are_passed_over_by_name() -> None:
    config = parse(unsloth_version="2026.1", lora_plus_ratio=0, no=None, nothing=False, empty={}, peft_version="0.21.2")
    assert config.unknown == ("unsloth_version", "lora_plus_ratio")
    assert config.normalised() == parse(peft_version="0.21.2").normalised()


@pytest.mark.parametrize("name", ["invocation_string", "alora_invocation_string"])
def test_an_activated_adapter_of_before_pefts_is_not_taken_for_plain_lora(name: str) -> None:
    fault = refusal(json.dumps(BASE | {name: "<|start_of_role|>"}).encode())
    assert fault.param == name
    assert "alora_invocation_tokens" in str(fault)
    assert parse(**{name: "<|start_of_role|>", "alora_invocation_tokens": [1]}).unknown == (name,)
    assert parse(**{name: None}).alora_invocation_tokens == ()


def test_those_of_a_newer_peft_are_refused() -> None:
    """They could change the outputs without adding a tensor, as use_rslora did."""
    for version in ("0.22.0", "1.0", "0.22.0.dev0@abc"):
        fault = refusal(json.dumps(BASE | {"use_new_scaling": True, "peft_version": version}).encode())
        assert fault.param == "use_new_scaling"
        assert version in str(fault)
    assert tuple(map(int, peft.__version__.split(".")[:2])) == PEFT_VERSION


@pytest.mark.parametrize(
    ("fields", "modules", "warned"),
    [
        ({"target_modules": ["q_proj", "fc1", "fc2"]}, 12, "target_modules has 'fc1', which matches no linear of the"),
        ({"rank_pattern": {"no_such": 3}}, 24, "rank_pattern has 'no_such', which matches no linear of the base"),
        ({"alpha_pattern": {"a": 3, "b": 4, "q_proj": 1}}, 24, "alpha_pattern has 'a', which matches no linear"),
        ({"layers_to_transform": [0, 12]}, 2, "layers_to_transform has '12', which is a layer without any"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_entries_that_match_nothing_are_passed_over_with_a_warning(
    fields: dict[str, Any], modules: int, warned: str
) -> None:
    warnings: list[str] = []
    assert len(parse(**fields).resolve(MODULES, warnings=warnings)) == modules
    [warning] = warnings
    assert warned in warning
    for nothing in ({"target_modules": ["fc1"]}, {"layers_to_transform": [12]}):
        with pytest.raises(AdapterError):
            parse(**nothing).resolve(MODULES, warnings=[])


@pytest.mark.parametrize("value", ["layers(", "(a+)+", "x|y", "(?P<idx>layers)", "", 3, {}])
def test_layers_pattern_is_a_plain_name(value: Any) -> None:
    raw = json.dumps(BASE | {"layers_to_transform": [1], "layers_pattern": [value]}).encode()
    assert refusal(raw).param == "layers_pattern"


def test_layers_belong_to_lists_of_names() -> None:
    raw = json.dumps(BASE | {"layers_to_transform": [1], "target_modules": ".*q_proj"}).encode()
    assert refusal(raw).param == "layers_to_transform"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe{}",
        b'{"peft_type": "LORA"',
        b'{"peft_type": "LORA", "peft_type": "LORA"}',
        b'{"lora_alpha": NaN}',
        b'{"lora_alpha": Infinity}',
        b'{"lora_alpha": 1e999}',
        b'{"r": ' + b"9" * 5000 + b"}",
        b'{"revision": "\\ud800"}',
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"x": ' + b'{"x": ' * 50_000 + b"0" + b"}" * 50_001,
        b" " * (MAX_CONFIG_BYTES + 1),
        b"\x80\x04\x95",
    ],
    ids=lambda raw: repr(raw[:24]),
)
def test_a_document_that_is_not_a_plain_json_object_is_refused(raw: bytes) -> None:
    assert refusal(raw).param == "config"


def test_a_config_without_a_type_is_refused() -> None:
    assert refusal(b'{"r": 8, "target_modules": ["q_proj"]}').param == "peft_type"


@given(
    st.binary(max_size=64)
    | st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_no_bytes_raise_anything_but_a_refusal(raw: bytes) -> None:
    with pytest.raises(AdapterError):
        parse_config(raw)


@given(
    st.dictionaries(
        st.sampled_from(sorted(FIELDS)),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text()
        | st.lists(st.text() | st.integers(), max_size=2)
        | st.dictionaries(st.text(), st.integers() | st.text(), max_size=2),
    )
)
def test_no_value_of_a_known_field_raises_anything_but_a_refusal(fields: dict[str, Any]) -> None:
    try:
        config = parse_config(json.dumps(BASE | fields).encode())
        config.resolve(MODULES)
    except AdapterError as fault:
        assert fault.param in FIELDS  # noqa: PT017 - a refusal is one of two good outcomes


def test_nothing_that_a_config_names_is_imported_or_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lorakeet_canary.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    opened: list[str] = []
    watching = True
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if watching and event == "open" else None)
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.lorakeet_canary"}
    config = parse(
        base_model_name_or_path=str(tmp_path), auto_mapping=mapping, corda_config={"cache_file": str(tmp_path / "x")}
    )
    config.check_class("LlamaForCausalLM")
    config.resolve(MODULES)
    refusal(json.dumps(BASE | {"megatron_core": "lorakeet_canary"}).encode())
    watching = False
    assert not [name for name in opened if str(tmp_path) in name]
    assert not [name for name in sys.modules if "lorakeet_canary" in name]
