"""The context length that a model's positions allow, and rope made independent of the batch's length."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from server.model import UnservableModel, naming


def longest_context(text: Any, requested: int | None = None) -> int:
    """Return the longest context for which a text model's positions are intended.

    Yarn and linear scaling reach `factor` times the positions of pretraining. Rope that changes with the longest
    sequence of the batch (dynamic, longrope) is served only up to the length at which it would change; if more is
    `requested`, longrope uses its long factors for every length.

    Raises UnservableModel if the config states no longest context.
    """
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        name = naming.class_name(text)
        raise UnservableModel(
            f"{name} states no max_position_embeddings: models without a longest context are not served"
        )
    return min((_longest_for(scaling, most, requested or 0) for scaling in _scalings(text)), default=most)


def _scalings(text: Any) -> list[Mapping[str, Any]]:
    """Return the settings of rope, one per kind of layer if they differ."""
    rope = getattr(text, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [value for value in rope.values() if isinstance(value, dict)]


def _longest_for(scaling: Mapping[str, Any], max_positions: int, requested: int) -> int:
    original = scaling.get("original_max_position_embeddings") or max_positions
    match scaling.get("rope_type"):
        case "yarn" | "linear":
            return max(max_positions, int(original * (scaling.get("factor") or 1)))
        case "longrope" if requested <= original:
            return min(max_positions, int(original))
        case _:
            return max_positions


def describe_limits(text: Any) -> str:
    """Describe the config entries that set a text model's longest context, for messages."""
    rope = getattr(text, "rope_parameters", None) or {}
    names = ("rope_type", "factor", "original_max_position_embeddings")
    scaling = {name: rope[name] for name in names if rope.get(name) not in {None, "default"}}
    limits = {"max_position_embeddings": text.max_position_embeddings} | scaling
    return ", ".join(f"{name} {value}" for name, value in limits.items())


def fix_rope(model: nn.Module, longest: int) -> None:
    """Fix rope's frequencies at those of `longest` tokens, where they would depend on a batch's longest sequence."""
    last = torch.tensor([[longest - 1]], device=next(model.parameters()).device)
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        for layer_type, name in kind.items() if isinstance(kind, dict) else [(None, kind)]:
            if name == "longrope":  # it computes its frequencies when called
                module(
                    torch.zeros(1, device=last.device),
                    last,
                    **({} if layer_type is None else {"layer_type": layer_type}),
                )
        if isinstance(kind, str) and kind in {"dynamic", "longrope"}:
            module.rope_type = "default"  # type: ignore[assignment]
        elif isinstance(kind, dict):
            fixed = {name: "default" if value in {"dynamic", "longrope"} else value for name, value in kind.items()}
            module.rope_type = fixed  # type: ignore[assignment]
