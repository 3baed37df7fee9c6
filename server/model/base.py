"""Loading the base model: quantise it (or read the quantised copy), check that it is servable, wrap its linears.

The result is transformers' own model with our attention function and `LoraLinear`s; its bytes never change again, as
`Base.digest()` can prove.
"""

import copy
import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn

from adapters import kernels
from adapters.device.experts import ExpertLinear
from adapters.device.lora import FrozenLinear, LoraLinear, StepSlot, wrap_linears
from adapters.kernels import ExpertWeights, QuantizedWeight, native
from adapters.peft_format.sizes import ExpertsSize, LinearSize
from server.model import UnservableModel, attention, experts, geometry, loading, mixers, naming, positions, probe
from server.model.geometry import LayerKV
from server.model.loading import model_class
from server.model.states import LayerState

__all__ = ["Base", "UnservableModel", "check_servable", "errors_as_unservable", "load", "sketch_head", "with_weights"]

log = logging.getLogger("lorakeet.engine")

M = TypeVar("M", bound=nn.Module)

SERVED_LAYERS = {"full_attention", "sliding_attention"}
OTHER_LAYERS = {"linear_attention", "conv", "hybrid", "moe", "mlp"}  # served in the model types of `mixers.TYPES`
ALIBI = {"bloom", "mpt"}  # model types
# Config entries of features that the engine cannot serve, and how messages name them.
UNSERVED = {
    "kv_lora_rank": "this attention variant is",
}


@dataclass(frozen=True)
class Base:
    """A loaded base model and its geometry, as the engine needs it."""

    model: transformers.PreTrainedModel
    slot: StepSlot
    linears: list[LoraLinear]
    dtype: torch.dtype
    device: torch.device
    layers: list[LayerKV]
    max_model_len: int  # the longest context that its positions allow
    eos_token_ids: list[int]
    tied: bool  # head and input embedding are one matrix
    embedding: str  # full name
    head: str
    aside: list[str]  # full names of modules that are not run for text
    renamed: dict[str, str]  # parameter in the files -> in the model, where these differ
    transposed: bool  # whether the files hold weights of linears as [in, out]
    experts: list[ExpertLinear]
    states: dict[int, LayerState] = field(default_factory=dict)  # by layer, of those that keep a state
    norms: list[str] = field(default_factory=list)  # full names of norms that adapters may replace
    routers: list[str] = field(default_factory=list)  # full names of experts' routers that adapters may replace
    by_token: list[str] = field(default_factory=list)  # full names of further tables with a row per token
    opaque_embedding: bool = False  # whether it does more than look up rows and scale them

    @property
    def linear_sizes(self) -> dict[str, LinearSize]:
        """The sizes of all linears that adapters may target, by full name, in the order of their indices."""
        return {linear.name: linear.size for linear in self.linears}

    @property
    def expert_sizes(self) -> dict[str, ExpertsSize]:
        """The sizes of all experts' linears, by full name, in module order."""
        return {linear.name: linear.size for linear in self.experts}

    @property
    def trainable(self) -> list[LoraLinear | ExpertLinear]:
        """All linears that LoRA may target, in the order of their indices."""
        return [*self.linears, *self.experts]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

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

    def context_length(self, requested: int | None) -> int:
        """Return the context length to serve: `requested` tokens, or the most that the positions allow.

        Raises UnservableModel if `requested` exceeds that, since answers beyond it would be wrong.
        """
        if requested is not None and requested > self.max_model_len:
            raise UnservableModel(
                f"--max-model-len {requested} is more than the {self.max_model_len} tokens that this "
                f"{self.architecture} allows ({positions.describe_limits(self.model.config.get_text_config())})"
            )
        return requested or self.max_model_len

    def digest(self) -> str:
        """Return a hash of all bytes that define the base: weights, quantisation state, biases, norms, embeddings."""
        digest = hashlib.sha256()
        for name, tensor in sorted(_frozen_tensors(self.model), key=itemgetter(0)):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
            # Views of two-byte floats have no numpy dtype: hash raw bytes.
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
        return f"sha256:{digest.hexdigest()}"


def load(
    directory: Path, quantization: str, dtype: str, device: str, cache_dir: Path, max_model_len: int | None = None
) -> Base:
    """Load the base in `directory` (Hugging Face layout).

    Args:
        quantization: nf4 or fp4 (with double quantisation), int8, or none.
        dtype: "auto" (bf16 on CUDA, fp32 on CPU) or a torch dtype's name.
        device: "auto", "cpu" or "cuda[:N]".
        cache_dir: holds quantised copies, so that the next start takes seconds.
        max_model_len: the requested context length, which selects longrope's short or long factors.

    Raises:
        UnservableModel: the model, its attention or its positions cannot be served, or the device does not exist.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UnservableModel(f"--device {device}: this machine has no CUDA device that torch can use")
    torch_device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if torch_device.type == "cuda" and ":" in device:
        torch.cuda.set_device(torch_device)  # kernels run on the current device, wherever their tensors lie
    if dtype == "auto":
        torch_dtype = torch.bfloat16 if torch_device.type == "cuda" else torch.float32
    else:
        torch_dtype = getattr(torch, dtype)
    with errors_as_unservable(str(directory)):
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        check_servable(config)
    attention.register()
    experts.register()
    with errors_as_unservable(naming.class_name(config)):
        model = loading.load_quantized(directory, config, quantization, torch_dtype, torch_device, cache_dir)
        model.requires_grad_(False)
        model.eval()
        return _wrap(model, directory, torch_dtype, torch_device, max_model_len)


@contextmanager
def errors_as_unservable(model: str) -> Iterator[None]:
    """Turn libraries' exceptions into an UnservableModel of one line that names the model.

    Faults of the device and of memory pass through.
    """
    try:
        yield
    except (UnservableModel, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as fault:
        log.debug("the libraries cannot load this model", exc_info=True)
        if isinstance(fault, KeyError) and fault.args == (attention.ATTENTION,):
            reason = "its attention cannot be replaced by the server's, which transformers must look up by name"
        else:
            reason = f"{type(fault).__name__}: {_first_line(fault)}"
        raise UnservableModel(f"{model} cannot be served: {reason}") from fault


def _first_line(fault: Exception) -> str:
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    return lines[0] if lines else "no reason given"


def with_weights(base: Base, weights: Mapping[str, QuantizedWeight | ExpertWeights]) -> Base:
    """Return the base with other weights in some linears, experts included, by full name.

    Everything else is shared, not copied.
    """
    linears = [_copy_with(one, weight=weights[one.name]) if one.name in weights else one for one in base.linears]
    routed = [_copy_with(one, weights=weights[one.name]) if one.name in weights else one for one in base.experts]
    replaced = {id(old): new for old, new in zip(base.trainable, [*linears, *routed], strict=True)}
    return dataclasses.replace(base, model=_view(base.model, replaced), linears=linears, experts=routed)


def _copy_with(module: M, **attributes: Any) -> M:
    """Return a shallow copy with other attributes."""
    copied = copy.copy(module)
    for name, value in attributes.items():
        setattr(copied, name, value)
    return copied


def _view(module: nn.Module, replaced: Mapping[int, nn.Module]) -> Any:
    """Return a module with some submodules replaced (id of the old one -> new one); parents are shallow copies."""
    if id(module) in replaced:
        return replaced[id(module)]
    children = {name: None if child is None else _view(child, replaced) for name, child in module._modules.items()}
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    view = copy.copy(module)
    view._modules = children
    return view


def sketch_head(base: Base) -> None:
    """Add a screening copy to the head, so that greedy tokens need not read all of it, where kernels support that."""
    head: FrozenLinear = base.model.get_output_embeddings()
    if kernels.runs_natively(base.device, base.dtype):
        with suppress(ValueError):  # a shape that they do not support
            head.weight = head.weight.with_sketch()


def check_servable(config: Any) -> None:
    """Raise UnservableModel for features that the engine's attention and batching do not support."""
    name = naming.class_name(config)
    if model_class(config) is None:
        raise UnservableModel(
            f"{name} is not served: transformers has no causal language model of type '{config.model_type}'"
        )
    if config.model_type.endswith("_assistant"):
        raise UnservableModel(f"{name} is not served: it drafts for another model, whose keys it reads")
    if getattr(config, "canvas_length", None):
        raise UnservableModel(f"{name} is not served: it denoises a whole text, not one token after the other")
    if getattr(config, "is_encoder_decoder", False):
        raise UnservableModel(f"{name} is an encoder with a decoder: only decoders are served")
    if config.model_type in ALIBI:
        raise UnservableModel(f"{name} is not served: its attention is biased by distance (ALiBi)")
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    kinds -= SERVED_LAYERS | (OTHER_LAYERS if text.model_type in mixers.TYPES else set())
    if kinds:
        raise UnservableModel(f"layers of type {sorted(kinds)} are not served (only full and sliding attention)")
    for entry, kind in UNSERVED.items():
        if getattr(text, entry, None):
            raise UnservableModel(f"{kind} not served ({entry} = {getattr(text, entry)})")
    positions.longest_context(text)


# --- wrapping --------------------------------------------------------------------------------------


class NarrowEmbedding(nn.Module):
    """An embedding table kept in a narrower dtype that holds it exactly; rows are widened as they are looked up."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.dtype = dtype
        if scale is not None:
            self.embed_scale = scale  # of the rows; the name is that of Gemma's embedding

    def forward(self, ids: Tensor) -> Tensor:
        rows = nn.functional.embedding(ids, self.weight).to(self.dtype)
        scale: Tensor | None = getattr(self, "embed_scale", None)
        return rows if scale is None else rows * scale.to(self.dtype)


def _wrap(
    model: transformers.PreTrainedModel,
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int | None,
) -> Base:
    config = model.config.get_text_config()
    longest = positions.longest_context(config, max_model_len)
    if longest > positions.longest_context(config):
        log.info("using longrope's long factors for every length, since --max-model-len is %s", max_model_len)
    slot = StepSlot()
    decoder = model.get_decoder()
    lists = [module for module in decoder.children() if isinstance(module, nn.ModuleList)]
    if not any(len(layers) == config.num_hidden_layers for layers in lists):
        raise UnservableModel(f"{type(model).__name__} has no list of its {config.num_hidden_layers} decoder layers")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
        raise UnservableModel(f"{type(model).__name__} has no plain input embedding or no linear head")
    tied = head.weight.data_ptr() == embedding.weight.data_ptr()
    names = {id(module): name for name, module in model.named_modules()}
    prefix = names[id(decoder)]
    renamed, transposed = naming.renamed(model, directory), naming.transposed(model)
    linears = wrap_linears(decoder, f"{prefix}.", slot)
    if not linears:
        raise UnservableModel("the model has no linear layers that adapters could use")
    _narrow_head(model, dtype)
    routers = experts.pad_routers(model)
    expert_linears = experts.attach(model, slot, len(linears), renamed)
    attention.attach(model, slot)
    states = mixers.attach(model, slot)
    positions.fix_rope(model, longest)
    kinds = enumerate(getattr(config, "layer_types", None) or ())
    without = [layer for layer, kind in kinds if kind not in SERVED_LAYERS]
    with probe.recorded_modules(model, routers) as seen:
        layers = geometry.probe(model, slot, config.num_hidden_layers, device, without)
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None) if generation is not None else None
    eos = getattr(config, "eos_token_id", None) if eos is None else eos
    return Base(
        model=model,
        slot=slot,
        linears=linears,
        dtype=dtype,
        device=device,
        layers=layers,
        max_model_len=longest,
        eos_token_ids=[] if eos is None else [eos] if isinstance(eos, int) else list(eos),
        tied=tied,
        embedding=names[id(embedding)],
        head=names[id(head)],
        aside=naming.unused_modules(model),
        renamed=renamed,
        transposed=transposed,
        experts=expert_linears,
        states=states,
        norms=seen.norms,
        routers=seen.routers,
        by_token=seen.by_token,
        opaque_embedding=type(embedding).forward is not nn.Embedding.forward and not hasattr(embedding, "embed_scale"),
    )


def _narrow_head(model: transformers.PreTrainedModel, dtype: torch.dtype) -> None:
    """Freeze the head; keep it and the embeddings in bf16 where that is exact: half the bytes to read per token.

    Only where a kernel reads bf16 in place: a library product would widen the whole head in every step.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, nn.Linear)
    assert isinstance(embedding, nn.Embedding)
    tied = head.weight.data_ptr() == embedding.weight.data_ptr()
    scale = getattr(embedding, "embed_scale", None)
    scaled = isinstance(scale, Tensor) and type(embedding).__name__.endswith("TextScaledWordEmbedding")
    # Other kinds of tied embeddings compute in their matrix's dtype.
    narrows = not tied or scaled or type(embedding) is nn.Embedding
    if narrows and dtype == torch.float32 and native.load() is not None and _exact_in_bf16(head.weight):
        narrow = head.weight.data.bfloat16()
        if tied:
            model.set_input_embeddings(NarrowEmbedding(narrow, dtype, scale if scaled else None))
        head.weight = nn.Parameter(narrow, requires_grad=False)
    model.set_output_embeddings(FrozenLinear(head))


def _exact_in_bf16(weight: Tensor) -> bool:
    return all(torch.equal(rows, rows.bfloat16().to(rows.dtype)) for rows in weight.data.split(4096))


def _frozen_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return all tensors that define the base, quantisation state included, by name."""
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
