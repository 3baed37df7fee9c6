"""A strict reader of `adapter_config.json`, and the modules, ranks and scalings that a config selects.

Regular expressions of a client run through RE2, in linear time; those with look-around in bounded steps.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.peft_format.fields import (
    ALL_LINEAR,
    FIELDS,
    PEFT_VERSION,
    AdapterError,
    Json,
    compile_regex,
    purge_regexes,
    shorten,
    show,
    strict_json,
)

MAX_CONFIG_BYTES = 1 << 20
# RE2 takes time linear in program x text; this bounds the programs of one field. A plain name takes about 40.
MAX_PROGRAMS = 1 << 16
OUTPUT_HEAD = "lm_head"  # PEFT's all-linear leaves the output head out
CLASSIFIERS = ("score", "classifier")  # modules that PEFT saves with any adapter that classifies

# Fields refused in an activated adapter: most of them would change tokens before its invocation.
_NOT_WITH_ACTIVATION = ("use_dora", "lora_bias", "bias", "modules_to_save", "trainable_token_indices")
# Fields refused in adapters of experts, by PEFT too.
_NOT_WITH_EXPERTS = ("use_dora", "lora_bias", "alora_invocation_tokens")

# Fields of other programs that PEFT ignores, although their adapters answer wrongly without them.
_FOREIGN_FIELDS = dict.fromkeys(
    ("invocation_string", "alora_invocation_string"),
    "the adapter applies only after that text; give its token ids as alora_invocation_tokens, PEFT's field",
)


@dataclass(frozen=True)
class AdapterConfig:
    """A config that passed `parse_config`; every field of PEFT's that works, in normal form."""

    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: str | tuple[str, ...]  # a string is a regular expression, or all-linear
    target_parameters: tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...]  # empty: every layer
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]  # in the file's order: the first matching key counts
    alpha_pattern: Mapping[str, float]
    use_dora: bool
    lora_bias: bool
    bias: str
    modules_to_save: tuple[str, ...]
    trainable_token_indices: Mapping[str, list[int]]
    ensure_weight_tying: bool
    alora_invocation_tokens: tuple[int, ...]
    task_type: str | None
    auto_mapping: Mapping[str, Json] | None
    recorded: Mapping[str, Json]
    unknown: tuple[str, ...] = ()  # fields that PEFT does not have and would ignore

    @property
    def is_classifier(self) -> bool:
        """Whether it has a classification head in place of the output head."""
        return self.task_type == "SEQ_CLS"

    def check_class(self, model_class: str) -> None:
        """Check that `auto_mapping` names no class other than the served model's. Raises AdapterError."""
        if self.auto_mapping is not None and self.auto_mapping["base_model_class"] != model_class:
            named = shorten(self.auto_mapping["base_model_class"])
            raise AdapterError(f"auto_mapping names the class '{named}'; the base is a {model_class}", "auto_mapping")

    def normalised(self) -> dict[str, Json]:
        """The config as plain JSON values, equal for configs that differ only in spelling."""
        settings = {name: getattr(self, name) for name, field in FIELDS.items() if name in _ATTRIBUTES}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
        return {"peft_type": "LORA", **plain, **self.recorded}

    def check_plain(self) -> None:
        """Check that the adapter has only pairs of A and B on linears. Raises AdapterError, naming the field."""
        for name in (*_NOT_WITH_ACTIVATION, "alora_invocation_tokens"):
            if getattr(self, name) != FIELDS[name].default:
                raise AdapterError(f"{name} is not supported here: only plain LoRA is", name)

    def check_experts(self) -> None:
        """Check that the adapter has only pairs of A and B for experts. Raises AdapterError, naming the field."""
        for name in _NOT_WITH_EXPERTS:
            if getattr(self, name) != FIELDS[name].default:
                raise AdapterError(f"{name} cannot be combined with adapters of experts, in PEFT either", name)

    def resolve(
        self,
        linears: Collection[str],
        tables: Collection[str] = (),
        experts: Collection[str] = (),
        *,
        tied: bool = False,
        warnings: list[str] | None = None,
    ) -> dict[str, tuple[int, float]]:
        """The base's modules selected by this config, as in PEFT: full name -> (rank, scaling).

        Args:
            linears: full names of the base's linears, such as "model.layers.0.self_attn.q_proj".
            tables: those of its embedding and head, adapted only when named.
            experts: those of its parameters that hold experts' linears.
            tied: whether embedding and head are one matrix.
            warnings: collects entries without a match, which PEFT ignores; if None, they are refused.

        Raises:
            AdapterError: no module is selected, or an entry of `target_modules` or `target_parameters`, a layer index
                or a pattern key matches nothing.
        """
        modules = [*linears, *tables]
        ranks, unmatched_ranks = _match_patterns("rank_pattern", self.rank_pattern, [*modules, *experts])
        alphas, unmatched_alphas = _match_patterns("alpha_pattern", self.alpha_pattern, [*modules, *experts])
        found: dict[str, tuple[int, float]] = {}
        chosen, unmatched_targets, unmatched_layers = (
            self._select(modules, linears) if self.target_modules else ([], [], [])
        )
        parameters = [name for name in experts if not _suffixes(name).isdisjoint(self.target_parameters)]
        unmatched_parameters = sorted(set(self.target_parameters).difference(*map(_suffixes, experts)))
        for field, unmatched, reason in (
            ("rank_pattern", unmatched_ranks, "matches no linear of the base"),
            ("alpha_pattern", unmatched_alphas, "matches no linear of the base"),
            ("target_modules", unmatched_targets, "matches no linear of the base"),
            ("target_parameters", unmatched_parameters, "matches no experts of the base"),
            ("layers_to_transform", unmatched_layers, "is a layer without any of the target modules"),
        ):
            _warn_ignored(field, unmatched, reason, warnings)
        if self.ensure_weight_tying and tied and not set(tables).isdisjoint(chosen):
            chosen += [table for table in tables if table not in chosen]
        if not chosen and not parameters:
            _warn_ignored("target_parameters", unmatched_parameters, "matches no experts of the base", None)
        for module in (*chosen, *parameters):
            rank = ranks.get(module, self.r)
            alpha = alphas.get(module, self.lora_alpha)
            found[module] = (rank, alpha / math.sqrt(rank) if self.use_rslora else alpha / rank)
        purge_regexes()
        return found

    def _select(self, modules: Collection[str], linears: Collection[str]) -> tuple[list[str], list[str], list[str]]:
        """The modules, and the entries of `target_modules` and `layers_to_transform` that match nothing."""
        chosen, unmatched = self._select_targets(modules, linears)
        if not chosen and self.target_parameters:
            return [], [show(self.target_modules)], []
        if not chosen:
            raise AdapterError(
                f"target_modules {show(self.target_modules)} matches no linear of the base", "target_modules"
            )
        chosen = self._drop_excluded(chosen)
        if not chosen:
            raise AdapterError("exclude_modules leaves no module to adapt", "exclude_modules")
        chosen = [module for module in chosen if not self._is_saved(module)]
        if not chosen:
            raise AdapterError("modules_to_save has every module that target_modules has", "modules_to_save")
        chosen, absent = self._select_layers(chosen) if self.layers_to_transform else (chosen, [])
        if not chosen:
            _warn_ignored("layers_to_transform", absent, "is a layer without any of the target modules", None)
        return chosen, unmatched, absent

    def _select_targets(self, modules: Collection[str], linears: Collection[str]) -> tuple[list[str], list[str]]:
        if isinstance(self.target_modules, tuple):
            wanted = set(self.target_modules)
            unmatched = wanted.difference(*map(_suffixes, modules))
            return [module for module in modules if _suffixes(module) & wanted], sorted(unmatched)
        if self.target_modules.lower() == ALL_LINEAR:
            return [module for module in linears if module.rpartition(".")[2] != OUTPUT_HEAD], []
        regex = compile_regex("target_modules", self.target_modules)
        return [module for module in modules if regex.fullmatch(module)], []

    def _drop_excluded(self, modules: list[str]) -> list[str]:
        if isinstance(self.exclude_modules, tuple):
            unwanted = set(self.exclude_modules)
            return [module for module in modules if not _suffixes(module) & unwanted]
        regex = compile_regex("exclude_modules", self.exclude_modules)
        return [module for module in modules if not regex.fullmatch(module)]

    def _is_saved(self, module: str) -> bool:
        """Whether `modules_to_save` has this module or one around it; PEFT does not adapt it then."""
        return any(f".{name}." in f".{module}." for name in self.modules_to_save)

    def _select_layers(self, modules: list[str]) -> tuple[list[str], list[str]]:
        """The modules in the selected layers and, as in PEFT, those named in full by `target_modules`; then the absent
        layers."""
        layers = {module: self._layer_index(module) for module in modules}
        kept = [m for m, index in layers.items() if index in self.layers_to_transform or m in self.target_modules]
        absent = set(self.layers_to_transform).difference(layers[module] for module in kept)
        return kept, [str(index) for index in sorted(absent)]

    def _layer_index(self, module: str) -> int | None:
        """The first index in a module's name, or with `layers_pattern` the one after such a name."""
        if not self.layers_pattern:
            match = re.match(r".*?\.[^.]*\.(\d+)\.", module)
            return int(match[1]) if match else None
        for name in self.layers_pattern:
            match = re.match(rf"(?:^|.*?\.){re.escape(name)}\.(\d+)\.", module)
            if match:
                return int(match[1])
        return None


_ATTRIBUTES = AdapterConfig.__dataclass_fields__.keys() - {"recorded", "unknown"}


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
    unknown = tuple(
        name
        for name, value in given.items()
        if name not in FIELDS and value is not None and value is not False and value not in ("", [], {})
    )
    for name in unknown:
        if name in _FOREIGN_FIELDS and not values["alora_invocation_tokens"]:
            raise AdapterError(f"{name} is not supported: {_FOREIGN_FIELDS[name]}", name, "unsupported_adapter_feature")
    if unknown and _is_newer(values["peft_version"]):
        raise AdapterError(
            f"config has the unknown field '{shorten(unknown[0])}' of a newer PEFT ({values['peft_version']}), which "
            "may change what is served",
            unknown[0],
        )
    if not values["target_modules"] and not values["target_parameters"]:
        raise AdapterError(
            "target_modules is missing or empty: nothing says which modules are adapted", "target_modules"
        )
    if isinstance(values["target_modules"], str) and values["layers_to_transform"]:
        raise AdapterError("layers_to_transform needs target_modules to be a list", "layers_to_transform")
    if values["layers_pattern"] and not values["layers_to_transform"]:
        raise AdapterError("layers_pattern needs layers_to_transform", "layers_pattern")
    _check_combination(values)
    recorded = {name: values[name] for name, field in FIELDS.items() if field.effect == "recorded"}
    return AdapterConfig(**{name: values[name] for name in _ATTRIBUTES}, recorded=recorded, unknown=unknown)


def _is_newer(version: str | None) -> bool:
    """Whether this PEFT version may have fields with a meaning unknown here."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})", version or "")
    return match is not None and (int(match[1]), int(match[2])) > PEFT_VERSION


def _warn_ignored(field: str, entries: Sequence[str], reason: str, warnings: list[str] | None) -> None:
    """Warn of entries without effect. Raises AdapterError if `warnings` is None."""
    if not entries:
        return
    more = f" (and {len(entries) - 1} more like it)" if len(entries) > 1 else ""
    message = f"{field} has '{shorten(entries[0])}', which {reason}{more}"
    if warnings is None:
        raise AdapterError(message, field)
    warnings.append(message)


def _check_combination(values: Mapping[str, Json]) -> None:
    for name in ("lora_dropout", "fan_in_fan_out"):
        if values["target_parameters"] and values[name]:
            raise AdapterError(f"{name} cannot be combined with target_parameters, in PEFT either", name)
    if values["lora_bias"] and values["use_dora"]:
        raise AdapterError("lora_bias cannot be combined with use_dora, in PEFT either", "lora_bias")
    if values["alora_invocation_tokens"]:
        if values["task_type"] == "SEQ_CLS":
            raise AdapterError("SEQ_CLS cannot be combined with alora_invocation_tokens", "task_type")
        for name in _NOT_WITH_ACTIVATION:
            if values[name] != FIELDS[name].default:
                raise AdapterError(f"{name} cannot be combined with alora_invocation_tokens", name)


def _suffixes(module: str) -> set[str]:
    """The names by which a list can select this module: "a.b.c" -> {"a.b.c", "b.c", "c"}."""
    parts = module.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _match_patterns(
    field: str, patterns: Mapping[str, Any], modules: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Module -> value of the first pattern matching the end of its name (PEFT's `get_pattern_key`); and patterns
    without a match."""
    values: dict[str, Any] = {}
    unmatched: list[str] = []
    size = 0
    for pattern, value in patterns.items():
        regex = compile_regex(field, pattern, suffix=True)
        size += regex.programsize
        if size > MAX_PROGRAMS:
            raise AdapterError(f"{field} has patterns that are too large together", field)
        matched = [module for module in modules if regex.match(module)]
        if not matched:
            unmatched.append(pattern)
        for module in matched:
            values.setdefault(module, value)
    return values, unmatched
