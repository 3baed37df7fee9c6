"""The receipt of an upload: what is kept in memory, and in the database, for every version of every name."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.text import AdapterText


def receipt_of(spec: AdapterSpec) -> dict[str, Any]:
    """What the owner of an adapter is told. `scaling` is that of most modules, `rows` are row units per kind.

    What few adapters bring (new tokens, text of their own) is there only for those.
    """
    own = {
        "task": spec.config["task_type"] if spec.variants.classifier else None,
        "num_labels": spec.variants.num_labels,
        "new_tokens": spec.variants.new_tokens,
        "tokenizer_tokens": len(spec.text.tokens),
        "chat_template": spec.text.chat_template is not None,
        "stop_token_ids": list(spec.text.stop_tokens),
        "trained_tool_format": spec.text.tool_format,
        "trained_reasoning_format": spec.text.reasoning_format,
    }
    [(scaling, _)] = Counter(module.scaling for module in spec.adapted.values()).most_common(1)
    return {
        "rank": spec.rank,
        "scaling": scaling,
        "modules_matched": len(spec.adapted),
        "variants": spec.variants.names,
        "parameters": spec.parameters,
        "bytes": spec.bytes,
        "dtype": spec.dtype,
        "rows": spec.rows(),
        "base_model_name_or_path": spec.config["base_model_name_or_path"],
        "warnings": list(spec.warnings),
    } | {name: value for name, value in own.items() if value}


def taught(receipt: Mapping[str, Any]) -> AdapterText:
    """What the rows of its fine-tune had taught the adapter: stop tokens, formats of calls and thoughts."""
    return AdapterText(
        stop_tokens=tuple(receipt.get("stop_token_ids", ())),
        tool_format=receipt.get("trained_tool_format"),
        reasoning_format=receipt.get("trained_reasoning_format"),
    )
