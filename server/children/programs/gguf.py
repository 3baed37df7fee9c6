"""Conversion of a GGUF file to a Hugging Face directory.

Runs in a process of its own: it needs torch and several times the file's size in memory, both of which its caller
(`server.model_source`) must not keep.
"""

from collections.abc import Mapping
from pathlib import Path


def convert(order: Mapping[str, Path]) -> None:
    """Write `order["source"]` as bf16 safetensors with config, tokenizer and chat template into `order["target"]`.

    Quantised blocks are unpacked: the server quantises in its own way, which adapters and training rely on.

    Raises:
        ValueError, KeyError, OSError: the file is damaged, or of an architecture that transformers cannot read.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, target = order["source"], order["target"]
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # transformers refuses to save a model read from GGUF, so the weights move into a fresh one.
    config = loaded.config
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
