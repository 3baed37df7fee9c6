"""Loading a base's weights: read from its files and quantised, or read from the quantised copy.

Of a wrapper (a text model with encoders of images and sound) only the text tower is built and read: its class is
transformers' own, with the other parts dropped before any weight is read.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import bitsandbytes
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from adapters.scratch import scratch
from server.model import UnservableModel, attention, experts, naming

log = logging.getLogger("lorakeet.engine")

ADAPTER_CONFIG = "adapter_config.json"


def model_class(config: Any) -> type[transformers.PreTrainedModel] | None:
    """Return transformers' class for this config: a model of text and images or a causal one; None without either."""
    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        if type(config) in mapping:
            return cast("type[transformers.PreTrainedModel]", mapping[type(config)])
    return None


def text_model_class(base_class: type[transformers.PreTrainedModel]) -> type[transformers.PreTrainedModel]:
    """Return a subclass of the same name without the modules and parameters that are not run for text."""

    def initialise(self: transformers.PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        base_class.__init__(self, config, *args, **kwargs)
        naming.drop_unused(self)
        experts.replace_experts(self)

    made: type[transformers.PreTrainedModel] = type(
        base_class.__name__, (base_class,), {"__init__": initialise, "__module__": base_class.__module__}
    )
    return made


def load_quantized(
    directory: Path, config: Any, quantization: str, dtype: torch.dtype, device: torch.device, cache_dir: Path
) -> transformers.PreTrainedModel:
    """Load the model of this config, with weights quantised by `quantization`. Raises UnservableModel."""
    method = _quantization_method(config)
    if method not in (None, experts.MXFP4) and "bitsandbytes" not in method:
        raise UnservableModel(
            f"the base is already quantised with {method}: serve the original weights instead, "
            f"they are quantised to --quantization {quantization} at load"
        )
    stored = method not in (None, experts.MXFP4)
    cached = cache_dir / "quantized" / _cache_key(directory, quantization, dtype)
    if not stored and quantization != "none" and cached.exists():
        model = _from_pretrained(cached, dtype, device)
        experts.load(model, cached, dtype, device)
        return model
    quantize = {} if stored or quantization == "none" else {"quantization_config": _bnb_config(quantization, dtype)}
    model = _from_pretrained(directory, dtype, device, **quantize)
    experts.read(model, directory, quantization, dtype, device)
    if quantize:
        _save_atomically(model, cached)
    return model


def _quantization_method(config: Any) -> str | None:
    """Return the quantisation method of the files' weights, or None."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    return str(stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", "?"))


def _from_pretrained(
    directory: Path, dtype: torch.dtype, device: torch.device, **kwargs: Any
) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    if _quantization_method(config) == experts.MXFP4:
        del config.quantization_config
    whole = model_class(config)
    assert whole is not None, "check_servable comes first"
    text = config.get_text_config(decoder=True)
    text.output_router_logits = False  # only for a training loss; transformers fails if there are no routers
    ours = {name: attention.ATTENTION for name in config.sub_configs if getattr(config, name, None) is text}
    ours[""] = attention.ATTENTION
    with _without_adapter(directory) as weights:
        # typed as Any by transformers 5
        model: transformers.PreTrainedModel = text_model_class(whole).from_pretrained(
            weights,
            config=config,
            dtype=dtype,
            device_map={"": str(device)},
            attn_implementation=dict.fromkeys(config.sub_configs, "eager") | ours,
            experts_implementation=experts.EXPERTS,
            local_files_only=True,
            use_safetensors=True,
            **kwargs,
        )
    model.name_or_path = str(directory)
    return model


@contextmanager
def _without_adapter(directory: Path) -> Iterator[Path]:
    """Yield the model's directory, or a view of it without its adapter files, which would be loaded too."""
    if not (directory / ADAPTER_CONFIG).exists():
        yield directory
        return
    log.warning("%s holds an adapter beside the model: the model is served without it", directory)
    with scratch() as view:
        for path in directory.resolve().iterdir():
            if not path.name.startswith("adapter_"):
                (view / path.name).symlink_to(path)
        yield view


def _bnb_config(quantization: str, dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    if quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _cache_key(directory: Path, quantization: str, dtype: torch.dtype) -> str:
    """Return the name of a quantised copy: a hash of its source files, the settings and the libraries' versions."""
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(directory.resolve().iterdir())
        if path.suffix in {".safetensors", ".json"}
    ]
    identity = [
        str(directory.resolve()),
        files,
        quantization,
        str(dtype),
        bitsandbytes.__version__,
        transformers.__version__,
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]


def _save_atomically(model: transformers.PreTrainedModel, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as directory:
            staging = Path(directory) / target.name
            model.save_pretrained(staging)
            experts.save(model, staging)
            staging.rename(target)
    except OSError as fault:
        if not target.exists():  # otherwise another process was first, with the same copy
            raise UnservableModel(f"the quantised base could not be written to the cache: {fault}") from fault
