"""Load the base model once: quantise it (or read the quantised copy), check that it is servable, wrap its linears.

What comes out is transformers' own model with our attention function and `LoraLinear`s; its bytes never change again,
and `Base.digest()` can prove it. Knows no requests and no adapters.
"""

import copy
import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from torch import Tensor, nn

from adapters import kernels
from adapters.device.lora import FrozenLinear, LoraLinear, StepSlot, wrap_linears
from adapters.kernels import QuantizedWeight, native
from adapters.peft_format.sizes import LinearSize
from server.model import attention

SERVED_LAYERS = {"full_attention", "sliding_attention"}
UNSERVED_ROPE = {"dynamic", "longrope"}  # their frequencies depend on the longest sequence of the batch


class UnservableModel(ValueError):
    """This base cannot be served as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Base:
    """A loaded base model and the geometry that the engine needs of it."""

    model: transformers.PreTrainedModel
    slot: StepSlot
    linears: list[LoraLinear]
    dtype: torch.dtype
    device: torch.device
    num_layers: int
    kv_heads: int
    head_dim: int
    windows: list[int]  # per layer, 0 for full attention
    max_model_len: int
    eos_token_ids: list[int]

    @property
    def linear_sizes(self) -> dict[str, LinearSize]:
        """Of every linear that adapters may touch, by full name, in the order of their indices."""
        return {linear.name: linear.size for linear in self.linears}

    @property
    def decoder(self) -> nn.Module:
        """The model below its head: embeddings, decoder layers, final norm."""
        return self.model.get_decoder()

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def architecture(self) -> str:
        return type(self.model).__name__

    def digest(self) -> str:
        """Hash of every byte that defines the base: weights, quantisation state, biases, norms, embeddings."""
        digest = hashlib.sha256()
        for name, tensor in sorted(_frozen_tensors(self.model), key=itemgetter(0)):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
            # Views of two-byte floats have no numpy dtype: hash raw bytes.
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
        return f"sha256:{digest.hexdigest()}"


def load(directory: Path, quantization: str, dtype: str, device: str, cache_dir: Path) -> Base:
    """Load the base in `directory` (Hugging Face layout).

    Args:
        quantization: nf4 or fp4 (with double quantisation), int8, or none.
        dtype: "auto" (bf16 on CUDA, fp32 on CPU) or a torch dtype's name.
        device: "auto", "cpu" or "cuda[:N]".
        cache_dir: holds quantised copies, so that the next start takes seconds.

    Raises:
        UnservableModel: the architecture, its attention or its rope cannot be served.
    """
    torch_device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if torch_device.type == "cuda" and ":" in device:
        torch.cuda.set_device(torch_device)  # kernels run on the current device, wherever their tensors lie
    if dtype == "auto":
        torch_dtype = torch.bfloat16 if torch_device.type == "cuda" else torch.float32
    else:
        torch_dtype = getattr(torch, dtype)
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    check_servable(config)
    attention.register()
    model = _load_quantized(directory, config, quantization, torch_dtype, torch_device, cache_dir)
    model.requires_grad_(False)
    model.eval()
    return _wrap(model, torch_dtype, torch_device)


def with_weights(base: Base, weights: Mapping[str, QuantizedWeight]) -> Base:
    """The same base with other weights in some of its linears (by full name); everything else is shared, not copied."""
    linears = []
    for linear in base.linears:
        if linear.name in weights:
            linear = copy.copy(linear)
            linear.weight = weights[linear.name]
        linears.append(linear)
    replaced = {id(old): new for old, new in zip(base.linears, linears, strict=True)}
    return dataclasses.replace(base, model=_view(base.model, replaced), linears=linears)


def _view(module: nn.Module, replaced: Mapping[int, nn.Module]) -> Any:
    """A module with other modules (old one's id -> new one) somewhere below it; those above them are shallow copies."""
    if id(module) in replaced:
        return replaced[id(module)]
    children = {name: None if child is None else _view(child, replaced) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    view = copy.copy(module)
    view._modules = children
    return view


def sketch_head(base: Base) -> None:
    """Let greedy tokens be found without reading all of the head, where there are kernels that do."""
    head: FrozenLinear = base.model.get_output_embeddings()
    if kernels.runs_natively(base.device, base.dtype):
        with suppress(ValueError):  # not of a shape that they take
            head.weight = head.weight.with_sketch()


def check_servable(config: Any) -> None:
    """Raise UnservableModel for what the engine's attention and batching cannot do right."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds - SERVED_LAYERS:
        raise UnservableModel(
            f"layers of type {sorted(kinds - SERVED_LAYERS)} are not served (only full and sliding attention)"
        )
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if getattr(text, name, None):
            raise UnservableModel(f"mixture-of-experts models are not served ({name} = {getattr(text, name)})")
    for name in ("attn_logit_softcapping", "kv_lora_rank"):
        if getattr(text, name, None):
            raise UnservableModel(f"this attention variant is not served ({name} = {getattr(text, name)})")
    rope = getattr(text, "rope_parameters", None) or {}
    types = {rope.get("rope_type")} | {value.get("rope_type") for value in rope.values() if isinstance(value, dict)}
    for kind in types & UNSERVED_ROPE:
        raise UnservableModel(f"rope type {kind!r} depends on the batch and is not served")


# --- quantisation ----------------------------------------------------------------------------------


def _load_quantized(
    directory: Path, config: Any, quantization: str, dtype: torch.dtype, device: torch.device, cache_dir: Path
) -> transformers.PreTrainedModel:
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", "?")
        if "bitsandbytes" not in str(method):
            raise UnservableModel(
                f"the base is already quantised with {method}: serve the original weights instead, "
                f"they are quantised to --quantization {quantization} at load"
            )
        return _from_pretrained(directory, dtype, device)
    if quantization == "none":
        return _from_pretrained(directory, dtype, device)
    cached = cache_dir / "quantized" / _cache_key(directory, quantization, dtype)
    if not cached.exists():
        model = _from_pretrained(directory, dtype, device, quantization_config=_bnb_config(quantization, dtype))
        _save_atomically(model, cached)
        return model
    return _from_pretrained(cached, dtype, device)


def _from_pretrained(
    directory: Path, dtype: torch.dtype, device: torch.device, **kwargs: Any
) -> transformers.PreTrainedModel:
    # transformers 5 types this as returning Any.
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        device_map={"": str(device)},
        attn_implementation=attention.ATTENTION,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        **kwargs,
    )
    return model


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
    """Names a quantised copy by its source files and everything that shapes the result."""
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
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.save_pretrained(staging)
        staging.rename(target)
    except FileExistsError:  # another process was first; its copy is as good
        pass
    except OSError as fault:
        if not target.exists():
            raise UnservableModel(f"the quantised base could not be written to the cache: {fault}") from fault
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# --- wrapping --------------------------------------------------------------------------------------


class NarrowEmbedding(nn.Module):
    """An embedding table kept in a narrower dtype that holds it exactly; rows are widened as they are looked up."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight).to(self.dtype)


def _wrap(model: transformers.PreTrainedModel, dtype: torch.dtype, device: torch.device) -> Base:
    config = model.config.get_text_config()
    slot = StepSlot()
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    linears = wrap_linears(decoder, f"{prefix}.", slot)
    if not linears:
        raise UnservableModel("the model has no linear layers that adapters could use")
    _narrow_head(model, dtype)
    attention.attach(model, slot)
    window = getattr(config, "sliding_window", None) or 0
    # Families without `layer_types` (Mistral) slide in every layer or in none.
    uniform = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    layer_types = getattr(config, "layer_types", None) or uniform
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None) if generation is not None else None
    eos = config.eos_token_id if eos is None else eos
    return Base(
        model=model,
        slot=slot,
        linears=linears,
        dtype=dtype,
        device=device,
        num_layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        windows=[window if kind == "sliding_attention" else 0 for kind in layer_types],
        max_model_len=config.max_position_embeddings,
        eos_token_ids=[] if eos is None else [eos] if isinstance(eos, int) else list(eos),
    )


def _narrow_head(model: transformers.PreTrainedModel, dtype: torch.dtype) -> None:
    """Freeze the head; keep it and the embeddings in bf16 where that is exact: half the bytes to read per token.

    Only where a kernel reads bf16 in place: a library product would widen the whole head in every step.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, nn.Linear)
    assert isinstance(embedding, nn.Embedding)
    tied = head.weight.data_ptr() == embedding.weight.data_ptr()
    if dtype == torch.float32 and native.load() is not None and _exact_in_bf16(head.weight):
        head.weight.data = head.weight.data.bfloat16()
        if tied and type(embedding) is nn.Embedding:
            model.set_input_embeddings(NarrowEmbedding(head.weight.data, dtype))
    model.set_output_embeddings(FrozenLinear(head))


def _exact_in_bf16(weight: Tensor) -> bool:
    return all(torch.equal(rows, rows.bfloat16().to(rows.dtype)) for rows in weight.data.split(4096))


def _frozen_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Every distinct tensor that defines the base, quantisation state included."""
    found: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            weight = module.weight
            for part in ("absmax", "code", "nested_absmax", "nested_code"):
                tensor = getattr(weight, part)
                if tensor is not None:
                    found.append((f"{name}.{part}", tensor))
            found.append((f"{name}.offset", torch.tensor(weight.offset)))
    return found
