"""Comparison of an adapter file's tensors with its layout. Names and shapes only."""

import re
from collections import Counter
from collections.abc import Mapping

from adapters.peft_format.fields import AdapterError, shorten
from adapters.peft_format.layout import PARAMETER_PREFIXES, PREFIX, Layout
from adapters.peft_format.outline import Outline
from adapters.peft_format.sizes import LinearSize
from adapters.peft_format.spelling import non_text_module
from adapters.peft_format.weights import TensorEntry

MAX_NEW_TOKENS = 65536


def check_tensors(
    tensors: Mapping[str, TensorEntry], plan: Layout, linears: Mapping[str, LinearSize], outline: Outline
) -> list[str]:
    """Check that every tensor of the file is expected or allowed by the layout, and that no expected one is missing.

    Returns warnings of unused tensors.
    """
    ignored: Counter[str] = Counter()
    for name in tensors:
        part = non_text_module(name, outline)
        if part is not None:
            ignored[part] += 1
        elif not any(name in known for known in (plan.expected, plan.base_copies, plan.duplicates)):
            experts = {parameter.rpartition(".")[0] for parameter in outline.experts}
            _refuse_unexpected(name, {*linears, *outline.tables, *experts})
    for name, (shape, required_by) in plan.expected.items():
        if name not in tensors:
            raise AdapterError(f"the config's {required_by} asks for '{name}', which the weights lack", name)
        _check_shape(name, tensors[name], shape)
    for name in plan.base_copies.keys() & tensors.keys():
        shape = outline.table_shape if name.endswith(".weight") else outline.table_shape[:1]
        try:
            _check_shape(name, tensors[name], shape)
        except AdapterError as fault:
            reason = "embedding and head must both have the base's rows, and as many new ones after them"
            raise AdapterError(f"{fault}; {reason}", name, "base_mismatch") from None
    warnings = [
        f"{count} tensors of '{name}' are ignored: this part is not used for text" for name, count in ignored.items()
    ]
    if outline.new_tokens < 0:
        warnings.append(f"the weights have {-outline.new_tokens} tokens fewer than the base: these are never drawn")
    return warnings


def count_new_tokens(tensors: Mapping[str, TensorEntry], outline: Outline) -> int:
    """The number of rows in the file's embedding and head beyond the base's; negative for fewer, 0 without such
    tensors."""
    if outline.embedding is None:
        return 0
    rows = {
        table: tensors[name].shape[0]
        for table in outline.tables
        for place in PARAMETER_PREFIXES
        if (name := f"{PREFIX}{table}.{place}weight") in tensors
    }
    new = max(rows.values(), default=0) - outline.table_shape[0]
    if new > MAX_NEW_TOKENS:
        raise AdapterError(f"the weights have {new} new tokens; at most {MAX_NEW_TOKENS} are served", "weights")
    # Fewer rows count if both tables are in the file, or the adapted embedding of a tied head: PEFT saves them so.
    adapted = f"{PREFIX}{outline.embedding}.base_layer.weight" in tensors
    return new if new > 0 or len(rows) == len(outline.tables) or adapted else 0


def _check_shape(name: str, tensor: TensorEntry, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise AdapterError(
            f"tensor '{name}' has shape {list(tensor.shape)}; config and base ask for {list(expected)}", name
        )


def _refuse_unexpected(name: str, modules: set[str]) -> None:
    def refuse(reason: str) -> AdapterError:
        return AdapterError(f"tensor '{shorten(name)}' {reason}", name)

    if not name.startswith(PREFIX):
        raise refuse(f"is not a LoRA adapter's: these begin with '{PREFIX}'")
    parsed = re.fullmatch(r"base_model\.model\.(.+)\.lora_(embedding_)?[AB](\.weight|\.bias)?", name)
    if parsed is None:
        if re.fullmatch(r".+\.lora_[AB]\.[^.]+\.weight", name):
            raise refuse("contains an adapter's name: save with PEFT's save_pretrained, which omits it")
        raise refuse("is not expected by the config")
    if parsed[1] not in modules:
        raise refuse("adapts a module that the base does not have, or that cannot be adapted")
    raise refuse("is not expected: the config does not select this module, or not in this way")
