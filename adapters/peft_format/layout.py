"""The tensors required and allowed in an adapter's file, given its config and its base, and their uses.

Names and shapes only.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

from adapters.peft_format.config import CLASSIFIERS, AdapterConfig
from adapters.peft_format.fields import AdapterError, shorten
from adapters.peft_format.modules import ExpertsModule, LoraModule, Variants, peft_module_of
from adapters.peft_format.outline import EMBEDDING, Outline
from adapters.peft_format.sizes import LinearSize
from adapters.peft_format.weights import TensorEntry

PREFIX = "base_model.model."
MAX_LABELS = 4096
# Prefixes that PEFT may put before an embedding's or head's own parameters in a file; all but the first are the
# base's part of a wrapper.
PARAMETER_PREFIXES = ("", "base_layer.", "token_adapter.base_layer.", "original_module.")


class Expected(NamedTuple):
    """A tensor that must be in the file."""

    shape: tuple[int, ...]
    required_by: str  # a field of the config


class Layout(NamedTuple):
    """All tensors of an adapter's file.

    Attributes:
        modules: linear of the decoder -> its adapter.
        expected: tensor -> its required shape.
        base_copies: optional tensor -> the base's parameter that it must equal. PEFT saves the base's embeddings where
            these are adapted, believed to be resized, or requested. Rows of new tokens come after the base's.
        duplicates: optional tensor -> the tensor that it must equal. PEFT saves a resized embedding under all its
            names; those of a head tied by `ensure_weight_tying` are one in PEFT.
        transposed: optional tensor -> the tensor that it must be the transpose of.
        warnings: entries of the config without effect.
    """

    modules: dict[str, LoraModule]
    variants: Variants
    expected: dict[str, Expected]
    base_copies: dict[str, str]
    duplicates: dict[str, str]
    transposed: dict[str, str]
    warnings: list[str]


def layout(
    config: AdapterConfig, linears: Mapping[str, LinearSize], outline: Outline, tensors: Mapping[str, TensorEntry]
) -> Layout:
    """The layout of an adapter's file. `tensors`: those in it, which tell the new tokens and the number of labels.

    Raises:
        AdapterError: naming the config's field that asks for something this base does not have.
    """
    # Routers adapted as linears, as in older transformers; otherwise they are in `target_parameters`.
    routers = [name for name in outline.routers if f"{PREFIX}{name}.lora_A.weight" in tensors]
    return _Builder(config, linears, outline, _separate_experts(tensors, outline), routers).build(tensors)


_EXPERT_PAIR = re.compile(r"(.+)\.\d+\.([^.]+)\.lora_[AB]\.weight")


def _separate_experts(tensors: Collection[str], outline: Outline) -> dict[str, tuple[str, int]]:
    """Experts' linears with adapters of their own in the file: name with a * -> (parameter holding them, part of
    it)."""
    if not outline.experts:
        return {}
    found = {f"{m[1]}.*.{m[2]}" for name in tensors if (m := _EXPERT_PAIR.fullmatch(name.removeprefix(PREFIX)))}
    return {
        name: (parameter, part)
        for parameter, size in outline.experts.items()
        for part, names in enumerate(size.parts)
        for name in names
        if name in found
    }


class _Builder:
    def __init__(
        self,
        config: AdapterConfig,
        linears: Mapping[str, LinearSize],
        outline: Outline,
        separate_experts: Mapping[str, tuple[str, int]],
        routers: Collection[str],
    ) -> None:
        self._config = config
        self._linears = linears
        self._outline = outline
        self._warnings: list[str] = []
        self._separate_experts = {  # name with a * -> names of the linears
            name: [name.replace("*", str(expert)) for expert in range(outline.experts[parameter].experts)]
            for name, (parameter, _) in separate_experts.items()
        }
        self._parameter_of = separate_experts
        self._check_target_parameters()
        all_linears = [*linears, *(linear for names in self._separate_experts.values() for linear in names), *routers]
        parameters = [*outline.experts, *(f"{router}.weight" for router in outline.routers)]
        self._adapted = config.resolve(
            all_linears, outline.tables, parameters, tied=outline.tied, warnings=self._warnings
        )
        self._expected: dict[str, Expected] = {}
        self._base_copies: dict[str, str] = {}
        self._duplicates: dict[str, str] = {}

    def build(self, tensors: Mapping[str, TensorEntry]) -> Layout:
        if self._outline.new_tokens > 0 and self._outline.per_token_tables:
            raise AdapterError(
                f"the weights have new tokens, and the base's '{self._outline.per_token_tables[0]}' has a row for each "
                "token, too: PEFT saves none for the new ones",
                "weights",
                "unsupported_adapter_feature",
            )
        if self._outline.new_tokens > 0:
            self._check_embedding("weights", self._outline.tables)
        if self._outline.new_tokens and self._config.alora_invocation_tokens:
            raise AdapterError(
                "an activated adapter cannot add or drop tokens: before its invocation the base runs",
                "alora_invocation_tokens",
            )
        adapted, config, token_ids = self._adapted, self._config, self._token_ids()
        classifier = self._classifier(tensors) if config.is_classifier else {}
        experts, routers = self._experts(), self._routers()
        if experts or routers:
            config.check_experts()
        variants = Variants(
            experts=experts,
            routers=routers,
            tables={name: self._table(name) for name in self._outline.tables if name in adapted},
            magnitudes=self._magnitudes() if config.use_dora else {},
            delta_biases=self._delta_biases() if config.lora_bias else {},
            parameters=self._saved_parameters() | self._biases(tensors),
            tokens=self._tokens(token_ids),
            token_ids=token_ids,
            new_tokens=self._outline.new_tokens,
            invocation=self._invocation_ids(),
            classifier=classifier,
            num_labels=tensors[classifier["weight"]].shape[0] if classifier else 0,
        )
        modules = {name: self._linear(name) for name in adapted if name in self._linears}
        self._allow_table_copies(variants)
        if self._outline.new_tokens:
            variants = replace(variants, grown=self._new_row_tensors(variants, tensors))
        return Layout(
            modules,
            variants,
            self._expected,
            self._base_copies,
            self._duplicates,
            self._transposed(variants),
            self._warnings,
        )

    def _table_parameters(self) -> list[str]:
        """Full names of the parameters of embedding and head, the matrix of a tied head included."""
        weights = [f"{table}.weight" for table in self._outline.tables]
        return weights + ([f"{self._outline.head}.bias"] if self._outline.head_bias else [])

    def _expect(self, name: str, shape: tuple[int, ...], required_by: str) -> str:
        self._expected[f"{PREFIX}{name}"] = Expected(shape, required_by)
        return f"{PREFIX}{name}"

    # --- copies and new tokens ---------------------------------------------------------------------------

    def _allow_table_copies(self, variants: Variants) -> None:
        """Allow the whole state of embedding and head, wherever it lies: PEFT saves it on request, or when it believes
        them resized."""
        for parameter in self._table_parameters():
            table, _, kind = parameter.rpartition(".")
            if parameter in variants.parameters:
                self._duplicates[f"{PREFIX}{table}.modules_to_save.{kind}"] = f"{PREFIX}{parameter}"
            for name in self._possible_names(parameter):
                if name not in self._expected:
                    self._base_copies[name] = parameter
        embedding, head, delta = self._outline.embedding, self._outline.head, "token_adapter.trainable_tokens_delta"
        if head and self._outline.tied and variants.tokens.get(head) == f"{PREFIX}{embedding}.{delta}":
            self._duplicates[f"{PREFIX}{head}.{delta}"] = f"{PREFIX}{embedding}.{delta}"

        if self._shares_adapter and {f"{name}.weight" for name in self._outline.tables} <= variants.parameters.keys():
            self._duplicates[f"{PREFIX}{head}.weight"] = f"{PREFIX}{embedding}.weight"

    @property
    def _shares_adapter(self) -> bool:
        """Whether embedding and head share one adapter."""
        return self._config.ensure_weight_tying and self._outline.tied and self._outline.head is not None

    def _transposed(self, variants: Variants) -> dict[str, str]:
        if not self._shares_adapter or len(variants.tables) < len(self._outline.tables):
            return {}
        embedding, head = (variants.tables[name] for name in self._outline.tables)
        return {head.a: embedding.b, head.b: embedding.a}

    def _possible_names(self, parameter: str) -> list[str]:
        """The names that PEFT may give a parameter of embedding or head."""
        table, _, kind = parameter.rpartition(".")
        return [f"{PREFIX}{table}.{prefix}{kind}" for prefix in PARAMETER_PREFIXES]

    def _new_row_tensors(self, variants: Variants, tensors: Collection[str]) -> dict[str, str]:
        """The tensors with the new rows of embedding and head, except for a whole matrix of the adapter's own."""
        found: dict[str, str] = {}
        for parameter in self._table_parameters():
            present = [name for name in self._possible_names(parameter) if name in tensors]
            if parameter not in variants.parameters and present:
                found[parameter.removesuffix(".weight")] = present[0]
        embedding, head = self._outline.embedding or "", self._outline.head
        if head and self._outline.tied and head not in found and f"{head}.weight" not in variants.parameters:
            source = found.get(embedding) or variants.parameters.get(f"{embedding}.weight")
            if source is not None:
                found[head] = source
        for name in self._table_parameters():
            if name not in variants.parameters and name.removesuffix(".weight") not in found:
                have = "new tokens" if self._outline.new_tokens > 0 else "fewer tokens than the base"
                raise AdapterError(
                    f"the weights have {have} but no '{PREFIX}{name}' with their rows: save with PEFT's "
                    "save_pretrained(save_embedding_layers=True)",
                    "weights",
                )
        return found if self._outline.new_tokens > 0 else {}

    # --- pairs of A and B -----------------------------------------------------------------------------

    def _linear(self, name: str) -> LoraModule:
        linear = self._linears[name]
        return self._pair(name, ("lora_A.weight", linear.in_features), ("lora_B.weight", linear.out_features))

    def _table(self, name: str) -> LoraModule:
        vocabulary, width = self._outline.table_shape
        self._check_embedding("target_modules", [name])
        if self._config.alora_invocation_tokens:
            raise AdapterError(f"an activated adapter cannot adapt '{name}' (target_modules)", "target_modules")
        if name == self._outline.head:
            return self._pair(name, ("lora_A.weight", width), ("lora_B.weight", vocabulary))
        return self._pair(name, ("lora_embedding_A", vocabulary), ("lora_embedding_B", width))

    def _pair(self, name: str, a: tuple[str, int], b: tuple[str, int]) -> LoraModule:
        rank, scaling = self._adapted[name]
        first = self._expect(f"{name}.{a[0]}", (rank, a[1]), "target_modules")
        return LoraModule(rank, scaling, first, self._expect(f"{name}.{b[0]}", (b[1], rank), "target_modules"))

    # --- experts -----------------------------------------------------------------------------------------

    def _check_target_parameters(self) -> None:
        """Refuse entries of `target_parameters` that select parameters other than experts' and routers'. Raises
        AdapterError."""
        outline = self._outline
        supported = {*outline.experts, *(f"{router}.weight" for router in outline.routers)}
        others = [name for name in outline.parameters if name not in supported]
        others += [f"{name}.weight" for name in self._linears]
        others += [f"{name}_bias" for name in outline.experts]
        for entry in self._config.target_parameters:
            matched = next((name for name in others if f".{name}".endswith(f".{entry}")), None)
            if matched is not None:
                raise AdapterError(
                    f"target_parameters has '{shorten(entry)}', which means '{matched}': only the weights of experts "
                    "and routers can be adapted this way. Adapt linears by target_modules",
                    "target_parameters",
                    "unsupported_adapter_feature",
                )

    def _experts(self) -> dict[str, ExpertsModule]:
        found: dict[str, ExpertsModule] = {}
        sizes = self._outline.experts
        adapted = [name for name in sizes if name in self._adapted]
        for name in adapted:
            (rank, scaling), size, module = self._adapted[name], sizes[name], peft_module_of(name, adapted)
            rows = rank * size.experts
            a = self._expect(f"{module}.lora_A.weight", (rows, size.in_features), "target_parameters")
            b = self._expect(f"{module}.lora_B.weight", (size.out_features, rows), "target_parameters")
            found[name] = ExpertsModule(rank, scaling, a, b, size.experts, name)
        for name, linears in self._separate_experts.items():
            shapes = {self._adapted.get(linear) for linear in linears}
            if None in shapes or len(shapes) > 1:
                raise AdapterError(
                    f"the config gives the experts of '{name}' different ranks or scalings, or some of them none; "
                    "they must be alike, in PEFT too",
                    "rank_pattern" if None not in shapes else "target_modules",
                )
            [(rank, scaling)] = [shape for shape in shapes if shape is not None]
            parameter, part = self._parameter_of[name]
            size = sizes[parameter]
            outputs = size.out_features // len(size.parts)
            for linear in linears:
                self._expect(f"{linear}.lora_A.weight", (rank, size.in_features), "target_modules")
                self._expect(f"{linear}.lora_B.weight", (outputs, rank), "target_modules")
            a, b = (f"{PREFIX}{name}.lora_{letter}.weight" for letter in "AB")
            found[name] = ExpertsModule(rank, scaling, a, b, size.experts, parameter, part, len(size.parts))
        return found

    def _routers(self) -> dict[str, LoraModule]:
        found: dict[str, LoraModule] = {}
        for router in self._outline.routers:
            name = f"{router}.weight"
            adapted = self._adapted.get(name) or self._adapted.get(router)
            if adapted is not None:
                (rank, scaling), (experts, inputs) = adapted, self._outline.parameters[name].shape
                a = self._expect(f"{router}.lora_A.weight", (rank, inputs), "target_parameters")
                b = self._expect(f"{router}.lora_B.weight", (experts, rank), "target_parameters")
                found[name] = LoraModule(rank, scaling, a, b)
        return found

    def _check_embedding(self, field: str, tables: Collection[str]) -> None:
        """Refuse tables with the input embedding if it does more than look up rows. Raises AdapterError."""
        if self._outline.opaque_embedding and self._outline.embedding in tables:
            raise AdapterError(
                f"{field} changes '{self._outline.embedding}', which in this base does more than to look up rows and "
                "scale them: no other rows are served there",
                field,
                "unsupported_adapter_feature",
            )

    def _out_features(self, name: str) -> int:
        if name in self._linears:
            return self._linears[name].out_features
        vocabulary, width = self._outline.table_shape
        return vocabulary if name == self._outline.head else width

    def _magnitudes(self) -> dict[str, str]:
        return {
            name: self._expect(f"{name}.lora_magnitude_vector", (self._out_features(name),), "use_dora")
            for name in self._adapted
        }

    def _delta_biases(self) -> dict[str, str]:
        return {  # an embedding's lora_B has no bias
            name: self._expect(f"{name}.lora_B.bias", (self._out_features(name),), "lora_bias")
            for name in self._adapted
            if name != self._outline.embedding
        }

    # --- the base's own parameters ----------------------------------------------------------------------

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter; those of embedding and head have the adapter's vocabulary."""
        module, _, kind = name.rpartition(".")
        if module not in self._outline.tables:
            return self._outline.parameters[name].shape
        return self._outline.table_shape if kind == "weight" else (self._outline.table_shape[0],)

    def _biases(self, tensors: Collection[str]) -> dict[str, str]:
        config, saved_names = self._config, {}
        for name in self._outline.parameters:
            module, _, kind = name.rpartition(".")
            adapted = not self._adapted.keys().isdisjoint((module, f"{module}.weight"))
            if kind == "bias" and (config.bias == "all" or (config.bias == "lora_only" and adapted)):
                if module not in self._linears and not self._is_replaceable(module):
                    raise AdapterError(
                        f"bias is '{config.bias}', which means '{name}', too: only biases of linears, embedding, head, "
                        "routers, and norms that see one token after another are served",
                        "bias",
                        "unsupported_adapter_feature",
                    )
                saved_names[name] = f"{module}.base_layer.bias" if adapted else name
        if (
            config.bias == "lora_only"
            and saved_names
            and not any(f"{PREFIX}{saved_name}" in tensors for saved_name in saved_names.values())
        ):
            self._warnings.append(
                "bias is 'lora_only', but no trained bias was saved (older PEFT): the base's are served"
            )
            return {}
        return {name: self._expect(saved_name, self._shape(name), "bias") for name, saved_name in saved_names.items()}

    def _is_replaceable(self, module: str) -> bool:
        """Whether an adapter may replace all parameters of a module that is not a linear of the decoder."""
        outline = self._outline
        return outline.norms is None or module in (*outline.norms, *outline.routers, *outline.tables)

    def _saved_parameters(self) -> dict[str, str]:
        """Every parameter of the modules selected by `modules_to_save`: as in PEFT, those with names that end with an
        entry."""
        config, outline = self._config, self._outline
        tables = outline.tables
        modules = {*self._linears, *tables, *(name.rpartition(".")[0] for name in outline.parameters)}
        all_modules = _with_parents(modules)
        chosen: set[str] = set()
        for suffix in config.modules_to_save:
            if config.is_classifier and suffix in CLASSIFIERS:
                continue
            matched = {module for module in all_modules if module.endswith(suffix)}
            if not matched:
                self._warnings.append(f"modules_to_save has '{shorten(suffix)}', which matches no module of the base")
            for module in sorted(matched):
                if module in self._linears or module not in modules or not self._is_replaceable(module):
                    raise AdapterError(
                        f"modules_to_save has '{shorten(suffix)}', which means '{module}': only embedding, head, "
                        "norms and routers are served whole. Adapt its linears by target_modules",
                        "modules_to_save",
                    )
                if module in self._adapted:
                    raise AdapterError(f"modules_to_save and target_modules both have '{module}'", "modules_to_save")
            chosen |= matched
        if config.ensure_weight_tying and outline.tied and not chosen.isdisjoint(tables):
            chosen |= set(tables)
        self._check_embedding("modules_to_save", chosen)
        names = [f"{module}.{kind}" for module in sorted(chosen) for kind in ("weight", "bias")]
        known_parameters = {*outline.parameters, *self._table_parameters()}
        return {
            name: self._expect(name, self._shape(name), "modules_to_save") for name in names if name in known_parameters
        }

    def _classifier(self, tensors: Mapping[str, TensorEntry]) -> dict[str, str]:
        """Tensors of the classification head by "weight" and "bias". The file decides the number of labels."""
        if self._outline.embedding is None:
            raise AdapterError("task_type is SEQ_CLS: this base serves adapters of linears only", "task_type")
        prefixes = [f"{module}.{prefix}" for module in CLASSIFIERS for prefix in ("", "modules_to_save.")]
        prefix = next((prefix for prefix in prefixes if f"{PREFIX}{prefix}weight" in tensors), None)
        if prefix is None:
            named = f"{PREFIX}{prefixes[0]}weight"
            raise AdapterError(f"task_type is SEQ_CLS: the weights lack the classification head '{named}'", named)
        labels = tensors[f"{PREFIX}{prefix}weight"].shape[0]
        if not 0 < labels <= MAX_LABELS:
            raise AdapterError(
                f"the classification head has {labels} labels; 1 to {MAX_LABELS} are served", f"{PREFIX}{prefix}weight"
            )
        shapes = {"weight": (labels, self._outline.table_shape[1]), "bias": (labels,)}
        return {
            kind: self._expect(f"{prefix}{kind}", shape, "task_type")
            for kind, shape in shapes.items()
            if f"{PREFIX}{prefix}{kind}" in tensors
        }

    # --- tokens ---------------------------------------------------------------------------------------------

    def _tokens(self, token_ids: Mapping[str, list[int]]) -> dict[str, str]:
        """Module -> tensor of its trained rows. A tied head has a tensor of its own only if its ids differ."""
        found: dict[str, str] = {}
        embedding = self._outline.embedding
        for module, ids in token_ids.items():
            owner = module
            if self._outline.tied and embedding is not None and ids == token_ids.get(embedding):
                owner = embedding
            shape = (len(ids), self._outline.table_shape[1])
            name = f"{owner}.token_adapter.trainable_tokens_delta"
            found[module] = self._expect(name, shape, "trainable_token_indices")
        return found

    def _token_ids(self) -> dict[str, list[int]]:
        """Full name -> ids. On a tied base the head follows the embedding, unless it has ids of its own."""
        field_name, outline = "trainable_token_indices", self._outline
        found: dict[str, list[int]] = {}
        for key, ids in self._config.trainable_token_indices.items():
            module = next((table for table in outline.tables if f".{table}".endswith(f".{key}")), None)
            if key == EMBEDDING:  # PEFT's name for the input embedding of any base
                module = outline.embedding
            if module is None:
                raise AdapterError(
                    f"{field_name} has '{shorten(key)}', which is neither the embedding nor the head of the base",
                    field_name,
                )
            for other_field in ("modules_to_save", "target_modules"):
                claimed = self._adapted if other_field == "target_modules" else self._config.modules_to_save
                if any(module.endswith(name) for name in claimed):
                    raise AdapterError(f"{field_name} and {other_field} both have '{module}'", field_name)
            self._check_vocabulary(field_name, ids)
            found[module] = list(ids)
        if outline.tied and outline.embedding in found and outline.head is not None:
            found.setdefault(outline.head, found[outline.embedding])
        self._check_embedding(field_name, found)
        if len(found) == 2 and self._config.ensure_weight_tying and len({tuple(ids) for ids in found.values()}) == 2:
            raise AdapterError(f"{field_name} differ although ensure_weight_tying is set", field_name)
        return found

    def _invocation_ids(self) -> list[int]:
        tokens = list(self._config.alora_invocation_tokens)
        if tokens:
            self._check_vocabulary("alora_invocation_tokens", tokens)
        return tokens

    def _check_vocabulary(self, field_name: str, ids: list[int]) -> None:
        vocabulary = self._outline.table_shape[0] if self._outline.embedding else 0
        if max(ids) >= vocabulary:
            raise AdapterError(
                f"{field_name} has the token {max(ids)}; the base's vocabulary has {vocabulary} tokens", field_name
            )


def _with_parents(modules: Collection[str]) -> set[str]:
    """These modules and all modules around them."""
    found: set[str] = set()
    for module in modules:
        parts = module.split(".")
        found.update(".".join(parts[:count]) for count in range(1, len(parts) + 1))
    return found
