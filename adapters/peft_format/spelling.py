"""The names that an adapter's file uses for the text model of its base.

Wrappers of text and images name it differently from release to release (`model.language_model.layers`,
`language_model.model.layers`), and one and the same text model is trained alone (`model.layers`) or within one.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from adapters.peft_format.layout import PREFIX, Layout
from adapters.peft_format.modules import Variants
from adapters.peft_format.outline import Outline

T = TypeVar("T")

# Names of text models in wrappers, and of wrappers' other parts.
_TEXT_MODELS = {"model", "language_model", "text_model", "llm", "thinker"}
_NON_TEXT = {
    *("vision_tower", "vision_model", "vision_encoder", "visual", "vision_embed_tokens", "vision_resampler"),
    *("multi_modal_projector", "mm_projector", "embed_vision", "connector", "aligner", "image_projection"),
    *("audio_tower", "audio_model", "embed_audio"),
}
_LAYER = re.compile(r"(?P<before>(?:[^.]+\.)*?)(?P<list>[^.]+)\.\d+\.")  # of a layer: prefix, name of the list


def names_in_file(tensors: Iterable[str], linears: Collection[str], outline: Outline) -> dict[str, str]:
    """The base's name -> the file's name, for the base's linears, tables and parameters, where the file uses others.

    Empty unless all tensors agree on one other naming.
    """
    places = [place for linear in linears if (place := _LAYER.match(linear))]
    if not places:
        return {}
    ours, layers = places[0]["before"], places[0]["list"]
    theirs, head = set(), outline.head or ""
    for name in tensors:
        module = name.removeprefix(PREFIX)
        place = _LAYER.match(module)
        if place is not None and place["list"] == layers and _is_text(place["before"]):
            theirs.add(place["before"])
        before, found, _ = module.partition(f"{(outline.head or '').rpartition('.')[2]}.")
        if outline.head and found and _is_text(before):
            head = (before + found).removesuffix(".")
    if len(theirs) != 1 or theirs == {ours}:
        return {}
    prefixes = [*([(outline.head, head)] if outline.head else []), (ours, theirs.pop())]
    names = {}
    expert_linears = [name for size in outline.experts.values() for part in size.parts for name in part]
    replaceable = (*(outline.norms or ()), *outline.routers)
    for name in (*linears, *outline.tables, *outline.parameters, *outline.experts, *expert_linears, *replaceable):
        before, after = next((pair for pair in prefixes if name.startswith(pair[0])), ("", ""))
        names[name] = after + name.removeprefix(before)
    return names


def respelled(values: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    """The same values under other names."""
    return {names.get(name, name): value for name, value in values.items()}


def respelled_outline(outline: Outline, names: Mapping[str, str]) -> Outline:
    """The same base under other names."""
    return dataclasses.replace(
        outline,
        parameters=respelled(outline.parameters, names),
        experts={
            names.get(name, name): size._replace(
                parts=tuple(tuple(names.get(one, one) for one in part) for part in size.parts)
            )
            for name, size in outline.experts.items()
        },
        routers=tuple(names.get(name, name) for name in outline.routers),
        norms=None if outline.norms is None else tuple(names.get(name, name) for name in outline.norms),
        embedding=names.get(outline.embedding or "", outline.embedding),
        head=names.get(outline.head or "", outline.head),
    )


def respelled_layout(plan: Layout, names: Mapping[str, str]) -> Layout:
    """The same layout with other names for modules and parameters; tensors keep theirs."""
    fields: dict[str, Any] = {field.name: getattr(plan.variants, field.name) for field in dataclasses.fields(Variants)}
    fields["experts"] = {
        name: dataclasses.replace(module, parameter=names.get(module.parameter, module.parameter))
        for name, module in plan.variants.experts.items()
    }
    fields |= {name: respelled(value, names) for name, value in fields.items() if isinstance(value, dict)}
    return plan._replace(modules=respelled(plan.modules, names), variants=Variants(**fields))


def _is_text(prefix: str) -> bool:
    return _TEXT_MODELS.issuperset(prefix.split(".")[:-1])


def non_text_module(name: str, outline: Outline) -> str | None:
    """The part of a wrapper not used for text that a tensor of a file belongs to; None for any other tensor."""
    parts = name.removeprefix(PREFIX).split(".")[:-1]
    others = _NON_TEXT.union(module.rpartition(".")[2] for module in outline.non_text_modules)
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part in others), None)
