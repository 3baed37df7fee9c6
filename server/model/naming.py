"""How a model's modules and parameters are called, in the model and in its files."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from adapters.peft_format.outline import Outline

_WHOLE = "_lorakeet_whole"  # attribute of a model without parts: names of all its parameters, and of the parts


def class_name(config: Any) -> str:
    """The class that a model's config names, or its type."""
    return str((getattr(config, "architectures", None) or [config.model_type])[0])


def renamed(model: transformers.PreTrainedModel, directory: Path) -> dict[str, str]:
    """Parameter in the files of `directory` -> the model's name for it, where these differ; dropped parts included.

    The model's linears must not have been wrapped yet.
    """
    parameters, parts = getattr(model, _WHOLE)
    within, find = tuple(f"{part}." for part in parts), in_model(model)
    found = {}
    for name in Outline.read(directory).parameters:
        ours, _ = find(name)
        if ours != name and (ours in parameters or ours.startswith(within)):
            found[name] = ours
    return found


def in_model(model: transformers.PreTrainedModel) -> Callable[[str], tuple[str, str | None]]:
    """A parameter's name in the files -> the model's, and the source pattern of the conversion that makes it."""
    conversions = get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    parameters, _ = getattr(model, _WHOLE)
    return lambda name: rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)


def drop_aside(model: transformers.PreTrainedModel) -> None:
    """Take out of a model what text does not pass: of one of text and more, whatever is beside its decoder and head."""
    parameters, parts = dict.fromkeys(model.state_dict(), True), []
    if model.config.get_text_config() is not model.config:
        parts = _aside(model)
    for name in parts:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, None)
    setattr(model, _WHOLE, (parameters, parts))
    # transformers would warn of their weights in the files.
    known = model._keys_to_ignore_on_load_unexpected or ()
    model._keys_to_ignore_on_load_unexpected = {*known, *(rf"^{re.escape(name)}\." for name in parts)}


def aside(model: transformers.PreTrainedModel) -> list[str]:
    """Full names of the parts that `drop_aside` took out of a model."""
    return list(getattr(model, _WHOLE)[1])


def _aside(model: transformers.PreTrainedModel) -> list[str]:
    passed = (model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings())
    names = [f"{name}." for name, module in model.named_modules() if any(module is one for one in passed)]
    found: list[str] = []
    for name, _ in model.named_modules():
        known = (*names, *(f"{other}." for other in found))
        # Neither such a module, nor in one, nor around one.
        if name and not any(f"{name}.".startswith(one) or one.startswith(f"{name}.") for one in known):
            found.append(name)
    return found


def transposed(model: transformers.PreTrainedModel) -> bool:
    """Whether it was made of linears that hold their weight as [in, out]."""
    return any(issubclass(getattr(module, "source_cls", type(module)), Conv1D) for module in model.modules())
