"""Names of a model's modules and parameters, in the model and in its files."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from adapters.peft_format.outline import Outline

_ORIGINAL = "_lorakeet_whole"  # attribute of a model: names of its original parameters, and of the dropped parts


def class_name(config: Any) -> str:
    """Return the class named by a model's config, or its type."""
    return str((getattr(config, "architectures", None) or [config.model_type])[0])


def renamed(model: transformers.PreTrainedModel, directory: Path) -> dict[str, str]:
    """Return the model's names of parameters in the files of `directory`, where they differ, also for dropped parts.

    The model's linears must not have been wrapped yet.
    """
    parameters, parts = getattr(model, _ORIGINAL)
    within, map_name = tuple(f"{part}." for part in parts), name_mapper(model)
    found = {}
    for name in Outline.read(directory).parameters:
        ours, _ = map_name(name)
        if ours != name and (ours in parameters or ours.startswith(within)):
            found[name] = ours
    return found


def name_mapper(model: transformers.PreTrainedModel) -> Callable[[str], tuple[str, str | None]]:
    """Return a function from a parameter's name in the files to the model's name and its conversion's pattern."""
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    parameters, _ = getattr(model, _ORIGINAL)
    return lambda name: rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)


def drop_unused(model: transformers.PreTrainedModel) -> None:
    """Drop the modules that are not run for text: in multimodal models, all besides embedding, decoder and head."""
    parameters, parts = dict.fromkeys(model.state_dict(), True), []
    if model.config.get_text_config() is not model.config:
        parts = _find_unused(model)
    for name in parts:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, None)
    setattr(model, _ORIGINAL, (parameters, parts))
    # transformers would warn of their weights in the files.
    known = model._keys_to_ignore_on_load_unexpected or ()
    model._keys_to_ignore_on_load_unexpected = {*known, *(rf"^{re.escape(name)}\." for name in parts)}


def unused_modules(model: transformers.PreTrainedModel) -> list[str]:
    """Return the full names of the parts that `drop_unused` dropped."""
    return list(getattr(model, _ORIGINAL)[1])


def _find_unused(model: transformers.PreTrainedModel) -> list[str]:
    passed = (model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings())
    names = [f"{name}." for name, module in model.named_modules() if any(module is one for one in passed)]
    found: list[str] = []
    for name, _ in model.named_modules():
        known = (*names, *(f"{other}." for other in found))
        # Neither one of these modules, nor inside or around one.
        if name and not any(f"{name}.".startswith(one) or one.startswith(f"{name}.") for one in known):
            found.append(name)
    return found


def transposed(model: transformers.PreTrainedModel) -> bool:
    """Whether the model's linears originally held their weights as [in, out]."""
    return any(issubclass(getattr(module, "source_cls", type(module)), Conv1D) for module in model.modules())
