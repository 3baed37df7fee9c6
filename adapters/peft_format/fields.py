"""Every field of PEFT's `LoraConfig`, and the values that are served.

`FIELDS` is the rule, one line per field: it works, it is recorded without effect, or it must hold PEFT's default.
Nothing named by a field is ever imported, opened or fetched.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, TypeAlias

from adapters.peft_format.lookaround import LookaroundRegex, parsed
from adapters.strict_json import JsonFault, check_characters, parse_json

MAX_RANK = 1 << 16
MAX_ALPHA = 1_000_000
MAX_PATTERNS = 1024
MAX_REGEX_CHARACTERS = 4096
MAX_TOKENS = 1 << 16  # trained token embeddings of one adapter
MAX_INVOCATION_TOKENS = 256
ALL_LINEAR = "all-linear"
PEFT_VERSION = (0, 21)  # the version with these fields

Json: TypeAlias = Any


class AdapterError(ValueError):
    """A refused adapter.

    Attributes:
        param: the fault's place: a config field, `config`, `weights`, or a tensor's name.
        code: optional snake_case reason for programs.
    """

    def __init__(self, message: str, param: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param = shorten(param)
        self.code = code


def shorten(text: str, limit: int = 200) -> str:
    """Client-chosen text made safe for a message: control characters escaped, length bounded."""
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: limit + 1])
    return printable if len(text) <= limit else printable[:limit] + "..."


def show(value: Json) -> str:
    """A client's JSON value, made safe for a message."""
    return shorten(json.dumps(value, ensure_ascii=False), 80)


def strict_json(raw: bytes, param: str) -> dict[str, Json]:
    """The JSON object in `raw`: UTF-8, no duplicate keys, no NaN or infinity, no lone surrogates, bounded nesting.

    Raises:
        AdapterError: naming `param`.
    """
    try:
        value = parse_json(raw, finite=True)
        check_characters(raw, value)
    except JsonFault as fault:
        raise AdapterError(shorten(f"{param} {fault}"), param) from None
    if not isinstance(value, dict):
        raise AdapterError(f"{param} must be a JSON object", param)
    return value


# --- parsers of one value ----------------------------------------------------------------------

Parse: TypeAlias = Callable[[str, Json], Json]


def _invalid_value(name: str, value: Json, expected: str) -> AdapterError:
    return AdapterError(f"{name} must be {expected}, not {show(value)}", name)


def _integer(low: int, high: int) -> Parse:
    def parse(name: str, value: Json) -> int:
        if type(value) is not int or not low <= value <= high:
            raise _invalid_value(name, value, f"an integer from {low} to {high}")
        return value

    return parse


def _number(low: float, high: float, *, above_low: bool = False) -> Parse:
    def parse(name: str, value: Json) -> float:
        if type(value) not in (int, float) or not low <= value <= high or (above_low and value == low):
            raise _invalid_value(
                name, value, f"a number {'above' if above_low else 'from'} {low:g} {'up ' * above_low}to {high:g}"
            )
        return value

    return parse


def _flag(name: str, value: Json) -> bool:
    if type(value) is not bool:
        raise _invalid_value(name, value, "true or false")
    return value


def _text(name: str, value: Json) -> str | None:
    if value is not None and (type(value) is not str or len(value) > 4096):
        raise _invalid_value(name, value, "a string of at most 4096 characters, or null")
    return value


def _one_of(*allowed: Json) -> Parse:
    def parse(name: str, value: Json) -> Json:
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            raise _invalid_value(name, value, " or ".join(json.dumps(choice) for choice in allowed))
        return value

    return parse


_PROMPTED = "its virtual tokens would take part in every layer's keys and values; train a LORA adapter instead"
_MERGE = "merge it into the base (PEFT's merge_and_unload) and serve that, or train a LORA adapter instead"
# PEFT's other types: the reason why each is not served, and a remedy.
_OTHER_TYPES = {
    "QLORA": "no PEFT version writes it: QLoRA names a way to train, and its adapters are of type LORA",
    "VERA": f"VeRA shares random matrices between layers instead of low-rank pairs; {_MERGE}",
    "LOHA": f"LoHa multiplies two low-rank products element by element; {_MERGE}",
    "LOKR": f"LoKr is a Kronecker product; {_MERGE}",
    "ADALORA": f"AdaLoRA keeps singular values apart from its matrices; {_MERGE}",
    "IA3": f"IA3 rescales activations; {_MERGE}",
    "OFT": f"OFT multiplies the base's weights by rotations; {_MERGE}",
    "BOFT": f"BOFT multiplies the base's weights by rotations; {_MERGE}",
    "PROMPT_TUNING": _PROMPTED,
    "P_TUNING": _PROMPTED,
    "PREFIX_TUNING": _PROMPTED,
    "MULTITASK_PROMPT_TUNING": _PROMPTED,
    "ADAPTION_PROMPT": "it adds attention over learnt prompts to each layer; train a LORA adapter instead",
    "TRAINABLE_TOKENS": "train the tokens with a LORA adapter's trainable_token_indices instead",
}


def _peft_type(name: str, value: Json) -> str:
    if value != "LORA":
        reason = _OTHER_TYPES.get(value, "no other type is served") if type(value) is str else "no other type is served"
        raise AdapterError(f'{name} must be "LORA", not {show(value)}: {reason}', name, "unsupported_adapter_feature")
    return "LORA"


# Initialisations that took their matrices out of the base's weights: the adapter is right only on the remainder.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _init(name: str, value: Json) -> bool | str:
    if type(value) is not bool and not (type(value) is str and re.fullmatch(r"[A-Za-z0-9_]{1,64}", value)):
        raise _invalid_value(name, value, "true, false or the name of an initialisation")
    if type(value) is str and value.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"{name} = '{value}' changed the base's weights before training, and this adapter is right only on those. "
            "Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...) writes one for "
            "the base as it was. If the base that is served is the changed one, set init_lora_weights to true",
            name,
            "unsupported_adapter_feature",
        )
    return value


def _token_ids(name: str, value: Json, most: int) -> list[int]:
    if not isinstance(value, list) or not value or not all(type(v) is int and 0 <= v < 1 << 31 for v in value):
        raise _invalid_value(name, value, "a list of token ids")
    if len(value) > most:
        raise AdapterError(f"{name} has {len(value)} token ids; at most {most} are allowed", name)
    return value


def _invocation(name: str, value: Json) -> tuple[int, ...]:
    return () if value is None else tuple(_token_ids(name, value, MAX_INVOCATION_TOKENS))


def _trained_tokens(name: str, value: Json) -> dict[str, list[int]]:
    """Module name -> ids, in the order of the tensor's rows; a bare list belongs to the input embedding."""
    if value in (None, [], {}):
        return {}
    modules = value if isinstance(value, dict) else {"embed_tokens": value}
    if len(modules) > 2 or not all(0 < len(module) <= 1024 for module in modules):
        raise _invalid_value(name, value, "token ids, or an object with those of embed_tokens and lm_head")
    for ids in modules.values():
        if len(set(_token_ids(name, ids, MAX_TOKENS))) < len(ids):
            raise AdapterError(f"{name} has a token id twice", name)
    return modules


def _settings(name: str, value: Json) -> dict[str, Json] | None:
    """The settings of an initialisation: a flat object, irrelevant once the adapter is trained."""
    scalar = (str, int, float, bool, type(None))
    if value is not None and not (isinstance(value, dict) and all(isinstance(v, scalar) for v in value.values())):
        raise _invalid_value(name, value, "an object of plain values, or null")
    return value


def _auto_mapping(name: str, value: Json) -> dict[str, Json] | None:
    """The class of the base; `AdapterConfig.check_class` compares it with the served model's. Never imported."""
    if value is None:
        return None
    expected = "null or an object with base_model_class and a parent_library within transformers"
    if not isinstance(value, dict) or not value.keys() <= {"base_model_class", "parent_library", "unsloth_fixed"}:
        raise _invalid_value(name, value, expected)
    library, model_class = value.get("parent_library"), value.get("base_model_class")
    if type(library) is not str or not re.fullmatch(r"transformers(\.[A-Za-z0-9_]+)+", library):
        raise _invalid_value(name, value, expected)
    if type(model_class) is not str or type(value.get("unsloth_fixed", False)) is not bool:
        raise _invalid_value(name, value, expected)
    return value


def _names(name: str, value: Json) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(type(v) is str and 0 < len(v) <= 1024 for v in value):
        raise _invalid_value(name, value, "a list of module names")
    return tuple(sorted(set(value)))


def _modules(name: str, value: Json) -> tuple[str, ...]:
    names = () if value is None else _names(name, value)
    if len(names) > MAX_PATTERNS:
        raise AdapterError(f"{name} has {len(names)} names; at most {MAX_PATTERNS} are allowed", name)
    return names


def _names_or_regex(name: str, value: Json) -> str | tuple[str, ...]:
    if value in (None, "", []):
        return ()
    if type(value) is not str:
        return _names(name, value)
    if value.lower() != ALL_LINEAR:
        compile_regex(name, value)
    return value


def _layers(name: str, value: Json) -> tuple[int, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(v) is int and 0 <= v < 1 << 20 for v in values):
        raise _invalid_value(name, value, "a layer index or a list of them, or null")
    return tuple(sorted(set(values)))


def _layer_lists(name: str, value: Json) -> tuple[str, ...]:
    """Names of the base's list of layers ("layers", "h"). PEFT would run them as regular expressions."""
    values = [] if value in (None, "") else [value] if type(value) is str else value
    if not isinstance(values, list) or len(values) > 16:
        raise _invalid_value(name, value, "the name of a list of layers, or a list of such names, or null")
    for item in values:
        if type(item) is not str or not re.fullmatch(r"[A-Za-z0-9_.]{1,256}", item):
            raise _invalid_value(name, item, 'a plain name such as "layers"')
    return tuple(values)


def _patterns(parse_value: Parse) -> Parse:
    def parse(name: str, value: Json) -> dict[str, Json]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise _invalid_value(name, value, "an object from module patterns to numbers")
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


@cache
def _re2() -> Any:
    import re2  # on the first pattern only: an engine that is only measured does without

    return re2


def purge_regexes() -> None:
    """Empty RE2's cache, which would keep a client's automata, megabytes each."""
    if _re2.cache_info().currsize:
        _re2().purge()


# A POSIX class and literal text in RE2, but a set of characters and a repetition in Python.
_DIFFERENT_IN_RE2 = ("[:", "{,")
_NOT_IN_RE2 = ("(?=", "(?!", "(?<=", "(?<!", r"\Z")


def compile_regex(name: str, pattern: str, *, suffix: bool = False) -> Any:
    """The compiled pattern; with `suffix` it may also match only the end of a dotted name."""
    if len(pattern) > MAX_REGEX_CHARACTERS:
        raise AdapterError(f"{name} has a pattern of more than {MAX_REGEX_CHARACTERS} characters", name)
    re2 = _re2()
    options = re2.Options()
    options.log_errors = False
    options.never_capture = True  # without captures RE2 needs only its automaton, a hundred times faster at worst
    ending, refusal = rf"(.*\.)?({pattern})$", partial(_unsupported_regex, name, pattern)
    parsed(pattern, refusal)  # by itself first: "a)(b" must not pass because of the brackets around it
    if suffix:
        parsed(ending, refusal)
    if not any(sign in pattern for sign in _DIFFERENT_IN_RE2):
        try:
            regex = re2.compile(pattern, options)
            return re2.compile(ending, options) if suffix else regex
        except re2.error as fault:
            if not any(sign in pattern for sign in _NOT_IN_RE2):
                raise refusal(fault.args[0].decode(errors="replace") if fault.args else "invalid") from None
    regex = LookaroundRegex(pattern, refusal)
    return LookaroundRegex(ending, refusal) if suffix else regex


def _unsupported_regex(name: str, pattern: str, reason: str) -> AdapterError:
    return AdapterError(
        f"{name} has a pattern that cannot be run in bounded time (RE2's syntax and look-around; no back-references): "
        f"'{shorten(pattern)}': {shorten(reason)}",
        name,
    )


# --- the fields ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """The treatment of one field of PEFT's `LoraConfig`.

    Attributes:
        effect: "works", "recorded" (kept, without effect on serving) or "refused" (must hold PEFT's default).
        default: the value of a missing field.
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
    """A refused field. `equivalent`: further values that mean the default, as null always does."""
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
    "task_type": _works(None, _one_of("CAUSAL_LM", "SEQ_CLS", None), "CAUSAL_LM or null; SEQ_CLS: it classifies"),
    "auto_mapping": _works(None, _auto_mapping, "must name the served model's class in transformers; never imported"),
    "r": _works(8, _rank, f"rank, 1 to {MAX_RANK}"),
    "lora_alpha": _works(8, _alpha, "scaling is lora_alpha / r"),
    "use_rslora": _works(False, _flag, "scaling is lora_alpha / sqrt(r)"),
    "target_modules": _works(
        None,
        _names_or_regex,
        "list of names, regular expression, or all-linear; a name that matches nothing is a warning",
    ),
    "target_parameters": _works(
        (), _modules, "experts and routers, by suffix as in PEFT: without lora_dropout, use_dora, lora_bias, aLoRA"
    ),
    "exclude_modules": _works((), _names_or_regex, "list of names or regular expression"),
    "layers_to_transform": _works((), _layers, "layer indices; one without target modules is a warning"),
    "layers_pattern": _works((), _layer_lists, "plain names of the list of layers"),
    "rank_pattern": _works({}, _patterns(_rank), "ranks per module; a key that matches none is a warning"),
    "alpha_pattern": _works({}, _patterns(_alpha), "alphas per module; a key that matches none is a warning"),
    "use_dora": _works(False, _flag, "weight-decomposed (DoRA): linears, embedding and head"),
    "lora_bias": _works(False, _flag, "a bias of lora_B"),
    "bias": _works("none", _one_of("none", "all", "lora_only"), "none, all or lora_only: trained biases of the base"),
    "modules_to_save": _works((), _modules, "embedding, heads (resized too), norms and routers, by suffix as in PEFT"),
    "trainable_token_indices": _works({}, _trained_tokens, "trained rows of embedding and head, new tokens included"),
    "ensure_weight_tying": _works(False, _flag, "on a tied base the head follows the embedding"),
    "alora_invocation_tokens": _works((), _invocation, "activated (aLoRA): in force from their last occurrence on"),
    "fan_in_fan_out": _recorded(
        False, _one_of(True, False, None), "how the base stores its weights; A and B are laid out alike"
    ),
    "base_model_name_or_path": _recorded(None, _text, "shown in the receipt; never opened"),
    "revision": _recorded(None, _text, "never fetched"),
    "peft_version": _recorded(None, _text, "the PEFT version that saved it"),
    "inference_mode": _recorded(False, _flag, "no meaning when serving"),
    "lora_dropout": _recorded(0.0, _number(0, 1), "training only"),
    "init_lora_weights": _recorded(
        True, _init, "initialisation only; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA after PEFT's conversion alone"
    ),
    "loftq_config": _recorded({}, _settings, "initialisation only"),
    "eva_config": _recorded(None, _settings, "initialisation only"),
    "corda_config": _recorded(None, _settings, "initialisation only"),
    "lora_ga_config": _recorded(None, _settings, "initialisation only"),
    "layer_replication": _refused(None, "it changes the base's layers", []),
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
