"""What an `adapter_config.json` means: a strict reader, and the modules, ranks and scalings that it selects.

The rule for every field stands in `FIELDS`: it works, it is recorded without effect, or it must hold PEFT's default.
Nothing that a config names is ever imported, opened or fetched, and its regular expressions run only through RE2, in
linear time. Knows no weights and no files.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import re2

MAX_CONFIG_BYTES = 1 << 20
MAX_RANK = 1 << 16
MAX_ALPHA = 1_000_000
# RE2 runs in time linear in program x text; these bound the program: one pattern's, and all of one field together.
MAX_PATTERNS = 1024
MAX_REGEX_CHARACTERS = 4096
MAX_PROGRAMS = 1 << 16  # instructions; a plain module name takes about 40
ALL_LINEAR = "all-linear"
OUTPUT_HEAD = "lm_head"  # PEFT's all-linear leaves the output head out

Json: TypeAlias = Any


class AdapterError(ValueError):
    """An adapter that is refused.

    Attributes:
        param: the culprit: a config field, `config`, `weights`, or a tensor's name.
        code: optional snake_case reason for programs.
    """

    def __init__(self, message: str, param: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param = shorten(param)
        self.code = code


def shorten(text: str, limit: int = 200) -> str:
    """Client-chosen text made fit for a message: control characters escaped, length bounded."""
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: limit + 1])
    return printable if len(text) <= limit else printable[:limit] + "..."


def show(value: Json) -> str:
    """A client's JSON value, made fit for a message."""
    return shorten(json.dumps(value, ensure_ascii=False), 80)


def strict_json(raw: bytes, param: str) -> dict[str, Json]:
    """The JSON object in `raw`: UTF-8, no duplicate keys, no NaN or infinity, no lone surrogates, bounded nesting.

    Raises:
        AdapterError: naming `param`.
    """

    def unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        found = dict(pairs)
        if len(found) != len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise AdapterError(f"{param} has the key '{shorten(twice)}' twice", param)
        return found

    def refuse_constant(name: str) -> Json:
        raise AdapterError(f"{param} holds {name}, which is not JSON", param)

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise AdapterError(f"{param} holds a number that is out of range: {shorten(text, 40)}", param)
        return value

    try:
        value = json.loads(raw.decode(), object_pairs_hook=unique, parse_constant=refuse_constant, parse_float=finite)
        # Escapes such as \ud800 survive parsing, but no later answer could carry them.
        json.dumps(value, ensure_ascii=False).encode()
    except AdapterError:
        raise
    except RecursionError:
        raise AdapterError(f"{param} is nested too deeply", param) from None
    except ValueError as fault:  # not UTF-8, not JSON, an integer of thousands of digits
        raise AdapterError(f"{param} is not valid JSON in UTF-8: {shorten(str(fault))}", param) from None
    if not isinstance(value, dict):
        raise AdapterError(f"{param} must be a JSON object", param)
    return value


# --- one value ---------------------------------------------------------------------------------

Parse: TypeAlias = Callable[[str, Json], Json]


def _wrong(name: str, value: Json, expected: str) -> AdapterError:
    return AdapterError(f"{name} must be {expected}, not {show(value)}", name)


def _integer(low: int, high: int) -> Parse:
    def parse(name: str, value: Json) -> int:
        if type(value) is not int or not low <= value <= high:
            raise _wrong(name, value, f"an integer from {low} to {high}")
        return value

    return parse


def _number(low: float, high: float, *, above_low: bool = False) -> Parse:
    def parse(name: str, value: Json) -> float:
        if type(value) not in (int, float) or not low <= value <= high or (above_low and value == low):
            raise _wrong(
                name, value, f"a number {'above' if above_low else 'from'} {low:g} {'up ' * above_low}to {high:g}"
            )
        return value

    return parse


def _flag(name: str, value: Json) -> bool:
    if type(value) is not bool:
        raise _wrong(name, value, "true or false")
    return value


def _text(name: str, value: Json) -> str | None:
    if value is not None and (type(value) is not str or len(value) > 4096):
        raise _wrong(name, value, "a string of at most 4096 characters, or null")
    return value


def _one_of(*allowed: Json) -> Parse:
    def parse(name: str, value: Json) -> Json:
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            raise _wrong(name, value, " or ".join(json.dumps(choice) for choice in allowed))
        return value

    return parse


def _peft_type(name: str, value: Json) -> str:
    if value == "QLORA":
        raise AdapterError(
            "peft_type 'QLORA' is written by no PEFT version: QLoRA names a way to train, and its adapters are of type "
            "LORA",
            name,
        )
    if value != "LORA":
        raise AdapterError(f'{name} must be "LORA", not {show(value)}: no other type is served', name)
    return "LORA"


def _init(name: str, value: Json) -> bool | str:
    if type(value) is bool or (type(value) is str and re.fullmatch(r"[A-Za-z0-9_]{1,64}", value)):
        return value
    raise _wrong(name, value, "true, false or the name of an initialisation")


def _settings(name: str, value: Json) -> dict[str, Json] | None:
    """The settings of an initialisation: a flat object, of no consequence once the adapter is trained."""
    scalar = (str, int, float, bool, type(None))
    if value is not None and not (isinstance(value, dict) and all(isinstance(v, scalar) for v in value.values())):
        raise _wrong(name, value, "an object of plain values, or null")
    return value


def _auto_mapping(name: str, value: Json) -> dict[str, Json] | None:
    """Checked against the served model's class by `AdapterConfig.check_class`; never imported."""
    if value is None:
        return None
    expected = "null or an object with base_model_class and a parent_library within transformers"
    if not isinstance(value, dict) or not value.keys() <= {"base_model_class", "parent_library", "unsloth_fixed"}:
        raise _wrong(name, value, expected)
    library, model_class = value.get("parent_library"), value.get("base_model_class")
    if type(library) is not str or not re.fullmatch(r"transformers(\.[A-Za-z0-9_]+)+", library):
        raise _wrong(name, value, expected)
    if type(model_class) is not str or type(value.get("unsloth_fixed", False)) is not bool:
        raise _wrong(name, value, expected)
    return value


def _names(name: str, value: Json) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(type(v) is str and 0 < len(v) <= 1024 for v in value):
        raise _wrong(name, value, "a list of module names")
    return tuple(sorted(set(value)))


def _names_or_regex(name: str, value: Json) -> str | tuple[str, ...]:
    if value in (None, "", []):
        return ()
    if type(value) is not str:
        return _names(name, value)
    if value.lower() != ALL_LINEAR:
        _regex(name, value)
    return value


def _layers(name: str, value: Json) -> tuple[int, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(v) is int and 0 <= v < 1 << 20 for v in values):
        raise _wrong(name, value, "a layer index or a list of them, or null")
    return tuple(sorted(set(values)))


def _layer_lists(name: str, value: Json) -> tuple[str, ...]:
    """Names of the base's list of layers ("layers", "h"). PEFT would run them as regular expressions."""
    values = [] if value in (None, "") else [value] if type(value) is str else value
    if not isinstance(values, list) or len(values) > 16:
        raise _wrong(name, value, "the name of a list of layers, or a list of such names, or null")
    for item in values:
        if type(item) is not str or not re.fullmatch(r"[A-Za-z0-9_.]{1,256}", item):
            raise _wrong(name, item, 'a plain name such as "layers"')
    return tuple(values)


def _patterns(parse_value: Parse) -> Parse:
    def parse(name: str, value: Json) -> dict[str, Json]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise _wrong(name, value, "an object from module patterns to numbers")
        if len(value) > MAX_PATTERNS:
            raise AdapterError(f"{name} has {len(value)} patterns; at most {MAX_PATTERNS} are allowed", name)
        for key, number in value.items():
            if not key:
                raise AdapterError(f"{name} has an empty pattern", name)
            try:
                parse_value(name, number)
            except AdapterError as fault:
                raise AdapterError(f"{name}['{shorten(key)}']: {fault}", name) from None
        return value

    return parse


def _regex(name: str, pattern: str, *, suffix: bool = False) -> Any:
    """The compiled pattern; with `suffix` it may also match the end of a dotted name only."""
    if len(pattern) > MAX_REGEX_CHARACTERS:
        raise AdapterError(f"{name} has a pattern of more than {MAX_REGEX_CHARACTERS} characters", name)
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True  # without captures RE2 needs only its automaton, a hundred times faster at worst
    try:
        regex = re2.compile(pattern, options)  # by itself first: "a)(b" must not pass for being bracketed
        return re2.compile(rf"(.*\.)?({pattern})$", options) if suffix else regex
    except re2.error as fault:
        reason = fault.args[0].decode(errors="replace") if fault.args else "invalid"
        raise AdapterError(
            f"{name} has a pattern that cannot be run in linear time (RE2 syntax: no look-around, no back-references): "
            f"'{shorten(pattern)}': {shorten(reason)}",
            name,
        ) from None


# --- every field ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """How one field of PEFT's `LoraConfig` is treated.

    Attributes:
        effect: "works", "recorded" (kept, without effect on what is served) or "refused" (must hold PEFT's default).
        default: what a missing field means.
        parse: checks a value and brings it into normal form; raises AdapterError.
        note: one line for people.
    """

    effect: Literal["works", "recorded", "refused"]
    default: Json
    parse: Parse
    note: str


def _works(default: Json, parse: Parse, note: str) -> Field:
    return Field("works", default, parse, note)


def _recorded(default: Json, parse: Parse, note: str) -> Field:
    return Field("recorded", default, parse, note)


def _refused(default: Json, note: str, *equivalent: Json) -> Field:
    """`equivalent`: further values that mean the default. Null always does."""
    allowed = (default, None, *equivalent) if default is not None else (None, *equivalent)

    def parse(name: str, value: Json) -> Json:
        if any(type(value) is type(choice) and value == choice for choice in allowed):
            return default
        raise AdapterError(
            f"{name} = {show(value)} is not supported: {note}. Only {json.dumps(default)} is served",
            name,
            "unsupported_adapter_feature",
        )

    return Field("refused", default, parse, note)


_rank = _integer(1, MAX_RANK)
_alpha = _number(0, MAX_ALPHA, above_low=True)

FIELDS: dict[str, Field] = {
    "peft_type": _works(None, _peft_type, "LORA"),
    "task_type": _works(None, _one_of("CAUSAL_LM", None), "CAUSAL_LM or null"),
    "auto_mapping": _works(None, _auto_mapping, "must name the served model's class in transformers; never imported"),
    "r": _works(8, _rank, f"rank, 1 to {MAX_RANK}"),
    "lora_alpha": _works(8, _alpha, "scaling is lora_alpha / r"),
    "use_rslora": _works(False, _flag, "scaling is lora_alpha / sqrt(r)"),
    "target_modules": _works(None, _names_or_regex, "list of names, regular expression (RE2), or all-linear"),
    "exclude_modules": _works((), _names_or_regex, "list of names or regular expression (RE2)"),
    "layers_to_transform": _works((), _layers, "layer indices; each must exist"),
    "layers_pattern": _works((), _layer_lists, "plain names of the list of layers"),
    "rank_pattern": _works({}, _patterns(_rank), "ranks per module; every key must match a module"),
    "alpha_pattern": _works({}, _patterns(_alpha), "alphas per module; every key must match a module"),
    "base_model_name_or_path": _recorded(None, _text, "shown in the receipt; never opened"),
    "revision": _recorded(None, _text, "never fetched"),
    "peft_version": _recorded(None, _text, "the PEFT version that saved it"),
    "inference_mode": _recorded(False, _flag, "no meaning when serving"),
    "lora_dropout": _recorded(0.0, _number(0, 1), "training only"),
    "init_lora_weights": _recorded(True, _init, "initialisation only; a warning where it changed the base's weights"),
    "loftq_config": _recorded({}, _settings, "initialisation only"),
    "eva_config": _recorded(None, _settings, "initialisation only"),
    "corda_config": _recorded(None, _settings, "initialisation only"),
    "lora_ga_config": _recorded(None, _settings, "initialisation only"),
    "bias": _refused("none", "trained biases are not served"),
    "fan_in_fan_out": _refused(False, "transposed (Conv1D) base weights are not served"),
    "use_dora": _refused(False, "weight-decomposed adapters (DoRA) are not served"),
    "lora_bias": _refused(False, "biases of lora_B are not served"),
    "modules_to_save": _refused(None, "whole modules saved beside the adapter are not served", []),
    "trainable_token_indices": _refused(None, "trained token embeddings are not served", [], {}),
    "ensure_weight_tying": _refused(False, "adapters tied between embedding and head are not served"),
    "target_parameters": _refused(None, "adapters on bare parameters (experts) are not served", []),
    "layer_replication": _refused(None, "it changes the base's layers", []),
    "alora_invocation_tokens": _refused(None, "activated adapters (aLoRA) are not served"),
    "megatron_config": _refused(None, "Megatron layers are not served"),
    "megatron_core": _refused("megatron.core", "it names code to import"),
    "use_qalora": _refused(False, "QALoRA pools its inputs in a GPTQ base"),
    "qalora_group_size": _refused(16, "QALoRA is not served"),
    "velora_config": _refused(None, "VeLoRA is not served"),
    "monteclora_config": _refused(None, "MonteCLoRA samples its weights"),
    "use_bdlora": _refused(None, "block-diagonal adapters (BD-LoRA) are not served"),
    "arrow_config": _refused(None, "routing between adapters (Arrow) is not served"),
    "kasa_config": _refused(None, "KaSA changes the base's weights"),
    "runtime_config": _refused(None, "it configures PEFT's own run time", {}, {"ephemeral_gpu_offload": False}),
}

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


# --- the whole config ------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterConfig:
    """A config that passed `parse_config`; every field of PEFT's that works, in normal form."""

    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: str | tuple[str, ...]  # a string is a regular expression, or all-linear
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]  # empty: every layer
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]  # in the file's order: the first key that matches counts
    alpha_pattern: Mapping[str, float]
    task_type: str | None
    auto_mapping: Mapping[str, Json] | None
    recorded: Mapping[str, Json]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the owner of this adapter should know although it is accepted."""
        init = self.recorded["init_lora_weights"]
        if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
            return (
                f"init_lora_weights = '{init}' changed the base's weights before training: the answers are right only "
                "if the served base is that changed one, or after PEFT's conversion (save_pretrained with "
                "path_initial_model_for_weight_conversion)",
            )
        return ()

    def check_class(self, model_class: str) -> None:
        """Raises AdapterError when `auto_mapping` names another class than the served model's."""
        if self.auto_mapping is not None and self.auto_mapping["base_model_class"] != model_class:
            named = shorten(self.auto_mapping["base_model_class"])
            raise AdapterError(f"auto_mapping names the class '{named}'; the base is a {model_class}", "auto_mapping")

    def normalised(self) -> dict[str, Json]:
        """The config as plain JSON values, equal for configs that differ only in spelling."""
        settings = {name: getattr(self, name) for name, field in FIELDS.items() if name in _ATTRIBUTES}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        return {"peft_type": "LORA", **plain, **self.recorded}

    def resolve(self, modules: Collection[str]) -> dict[str, tuple[int, float]]:
        """The modules of the base that this config selects: full name -> (rank, scaling), as PEFT would.

        Args:
            modules: full names of the base's linears, such as "model.layers.0.self_attn.q_proj".

        Raises:
            AdapterError: an entry of `target_modules`, a layer index or a pattern key matches nothing.
        """
        ranks = _match_patterns("rank_pattern", self.rank_pattern, modules)
        alphas = _match_patterns("alpha_pattern", self.alpha_pattern, modules)
        found: dict[str, tuple[int, float]] = {}
        for module in self._select(modules):
            rank = ranks.get(module, self.r)
            alpha = alphas.get(module, self.lora_alpha)
            found[module] = (rank, alpha / math.sqrt(rank) if self.use_rslora else alpha / rank)
        re2.purge()  # its cache would keep a client's automata, megabytes each
        return found

    def _select(self, modules: Collection[str]) -> list[str]:
        chosen = self._targets(modules)
        if not chosen:
            raise AdapterError(
                f"target_modules {show(self.target_modules)} matches no linear of the base", "target_modules"
            )
        chosen = self._not_excluded(chosen)
        if not chosen:
            raise AdapterError("exclude_modules leaves no module to adapt", "exclude_modules")
        return self._in_layers(chosen) if self.layers_to_transform else chosen

    def _targets(self, modules: Collection[str]) -> list[str]:
        if isinstance(self.target_modules, tuple):
            wanted = set(self.target_modules)
            unmatched = wanted.difference(*map(_suffixes, modules))
            if unmatched:
                raise AdapterError(
                    f"target_modules has '{shorten(min(unmatched))}', which matches no linear of the base",
                    "target_modules",
                )
            return [module for module in modules if _suffixes(module) & wanted]
        if self.target_modules.lower() == ALL_LINEAR:
            return [module for module in modules if module.rpartition(".")[2] != OUTPUT_HEAD]
        regex = _regex("target_modules", self.target_modules)
        return [module for module in modules if regex.fullmatch(module)]

    def _not_excluded(self, modules: list[str]) -> list[str]:
        if isinstance(self.exclude_modules, tuple):
            unwanted = set(self.exclude_modules)
            return [module for module in modules if not _suffixes(module) & unwanted]
        regex = _regex("exclude_modules", self.exclude_modules)
        return [module for module in modules if not regex.fullmatch(module)]

    def _in_layers(self, modules: list[str]) -> list[str]:
        """Those in the layers asked for, and, as in PEFT, those that `target_modules` names in full."""
        layers = {module: self._layer_index(module) for module in modules}
        kept = [m for m, index in layers.items() if index in self.layers_to_transform or m in self.target_modules]
        absent = set(self.layers_to_transform).difference(layers[module] for module in kept)
        if absent:
            raise AdapterError(
                f"layers_to_transform has {min(absent)}, a layer without any of the target modules",
                "layers_to_transform",
            )
        return kept

    def _layer_index(self, module: str) -> int | None:
        """The first index in a module's name; with `layers_pattern` the one that follows such a name."""
        if not self.layers_pattern:
            match = re.match(r".*?\.[^.]*\.(\d+)\.", module)
            return int(match[1]) if match else None
        for name in self.layers_pattern:
            match = re.match(rf"(?:^|.*?\.){re.escape(name)}\.(\d+)\.", module)
            if match:
                return int(match[1])
        return None


_ATTRIBUTES = AdapterConfig.__dataclass_fields__.keys() - {"recorded"}


def parse_config(raw: bytes) -> AdapterConfig:
    """Read an `adapter_config.json`.

    Raises:
        AdapterError: naming the field (`config` for the document as a whole).
    """
    if len(raw) > MAX_CONFIG_BYTES:
        raise AdapterError(f"config has {len(raw)} bytes; at most {MAX_CONFIG_BYTES} are allowed", "config")
    given = strict_json(raw, "config")
    if "peft_type" not in given:
        raise AdapterError("config lacks peft_type", "peft_type")
    values = {
        name: field.parse(name, given[name]) if name in given else field.default for name, field in FIELDS.items()
    }
    for name, value in given.items():
        if name not in FIELDS and value is not None and value is not False and value not in ("", [], {}):
            raise AdapterError(f"config has the unknown field '{shorten(name)}' with a value", name)
    if not values["target_modules"]:
        raise AdapterError(
            "target_modules is missing or empty: nothing says which modules are adapted", "target_modules"
        )
    if isinstance(values["target_modules"], str) and values["layers_to_transform"]:
        raise AdapterError("layers_to_transform needs target_modules to be a list", "layers_to_transform")
    if values["layers_pattern"] and not values["layers_to_transform"]:
        raise AdapterError("layers_pattern needs layers_to_transform", "layers_pattern")
    recorded = {name: values[name] for name, field in FIELDS.items() if field.effect == "recorded"}
    return AdapterConfig(**{name: values[name] for name in _ATTRIBUTES}, recorded=recorded)


def _suffixes(module: str) -> set[str]:
    """The names by which a list of modules may mean this one: "a.b.c" -> {"a.b.c", "b.c", "c"}."""
    parts = module.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _match_patterns(field: str, patterns: Mapping[str, Any], modules: Collection[str]) -> dict[str, Any]:
    """Module -> value of the first pattern that matches the end of its name (PEFT's `get_pattern_key`)."""
    values: dict[str, Any] = {}
    size = 0
    for pattern, value in patterns.items():
        regex = _regex(field, pattern, suffix=True)
        size += regex.programsize
        if size > MAX_PROGRAMS:
            raise AdapterError(f"{field} has patterns that are too large together", field)
        matched = [module for module in modules if regex.match(module)]
        if not matched:
            raise AdapterError(f"{field} has '{shorten(pattern)}', which matches no linear of the base", field)
        for module in matched:
            values.setdefault(module, value)
    return values
