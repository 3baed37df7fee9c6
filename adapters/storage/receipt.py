"""Receipts of uploaded adapters for their owners, and details on demand.

A receipt is kept in memory, and in the database, for every version of every name, so it is short. Data that grows with
the number of modules, or that the file's author wrote into it, is read from the directory on demand.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.peft_format.directory import WEIGHTS_NAME, AdapterSpec
from adapters.peft_format.record import DamagedFile
from adapters.peft_format.sizes import LinearSize, device_bytes
from adapters.peft_format.text import AdapterText
from adapters.safetensors_header import HeaderFault, read_header


def receipt_of(spec: AdapterSpec) -> dict[str, Any]:
    """The receipt of an adapter. `scaling` is that of most modules, `rows` are row units per kind.

    Rare properties (new tokens, text of its own) are included only if present.
    """
    optional = {
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
    } | {name: value for name, value in optional.items() if value}


def trained_text(receipt: Mapping[str, Any]) -> AdapterText:
    """The properties that the adapter learned from its fine-tune's rows: stop tokens, formats of calls and thoughts."""
    return AdapterText(
        stop_tokens=tuple(receipt.get("stop_token_ids", ())),
        tool_format=receipt.get("trained_tool_format"),
        reasoning_format=receipt.get("trained_reasoning_format"),
    )


def details_of(directory: Path, linears: Mapping[str, LinearSize] | None) -> dict[str, Any]:
    """Rank and scaling per module, the file's own metadata, and bytes per tier.

    Args:
        directory: of a published version, leased.
        linears: full module name -> sizes, of the resident base; None while they are unknown.

    Raises DamagedFile.
    """
    spec = AdapterSpec.read(directory)
    try:
        with (directory / WEIGHTS_NAME).open("rb") as file:
            metadata = read_header(file).metadata
    except (HeaderFault, OSError) as fault:
        raise DamagedFile(f"{WEIGHTS_NAME}: {fault}") from None
    return {
        "modules": {name: {"rank": m.rank, "scaling": m.scaling} for name, m in sorted(spec.adapted.items())},
        "file_metadata": metadata,
        "bytes_on_disk": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        "bytes_on_device": None if linears is None else device_bytes(spec.rows(linears), linears),
    }
