"""Division of the device's memory: KV blocks, adapter rows, adapters' variants, merged weights."""

import math
from typing import NamedTuple

import psutil
import torch

from adapters.kernels.reference import KEY_GROUP
from server.engine.blocks import blocks_of_window
from server.messages.protocol import EngineConfig
from server.model.attention import KV_DTYPES, block_bytes, windows
from server.model.base import Base, UnservableModel

BLOCK_SIZE = 16  # tokens
MAX_SNAPSHOTS = 4096
DEFAULT_BATCH_TOKENS = {"cpu": 256, "cuda": 2048}


class DevicePlan(NamedTuple):
    """The sizes of an engine's parts."""

    kv_dtype: torch.dtype
    blocks: list[int]  # KV blocks of BLOCK_SIZE tokens, per group of layers
    state_slots: int  # for layers that keep a state instead of KV
    max_model_len: int  # tokens
    max_batch_tokens: int
    pool_units: int  # adapter row units per module kind
    extra_bytes: int  # most bytes for adapters' variants, beyond rows
    merged_bytes: int  # most bytes for merged weights


def plan(base: Base, config: EngineConfig) -> DevicePlan:
    """Divide the device memory left beside a loaded base. Raises UnservableModel for settings that cannot work."""
    max_batch_tokens = config.max_batch_tokens or DEFAULT_BATCH_TOKENS.get(base.device.type, 512)
    if max_batch_tokens <= config.max_batch_requests:
        raise UnservableModel(
            f"--max-batch-tokens {max_batch_tokens} must exceed --max-batch-requests {config.max_batch_requests}, "
            "or decoding would leave no room for prompts"
        )
    max_model_len = base.context_length(config.max_model_len)
    kv_dtype = _kv_dtype(base, config.kv_cache_dtype)
    blocks = _blocks(base, kv_dtype, config.kv_cache_bytes, max_batch_tokens, config.max_batch_requests)
    cache_tokens = min(blocks[0] * BLOCK_SIZE, max_model_len)
    window = windows(base.layers)[0]
    if window and blocks[0] >= blocks_of_window(window, 2 * max_batch_tokens, KEY_GROUP, BLOCK_SIZE):
        cache_tokens = max_model_len  # every layer sees a window, and the windows fit
    if cache_tokens < max_model_len:
        if config.max_model_len is not None:
            raise UnservableModel(
                f"--max-model-len {max_model_len} needs more KV cache than there is "
                f"({cache_tokens} tokens): raise --kv-cache-bytes or lower --max-model-len"
            )
        max_model_len = cache_tokens
    adapter_bytes = _share(base, 8, 1 << 30, 0.1) if config.adapter_bytes is None else config.adapter_bytes
    merged_bytes = _share(base, 8, 1 << 30, 0.1) if config.merged_bytes is None else config.merged_bytes
    return DevicePlan(
        kv_dtype=kv_dtype,
        blocks=blocks,
        state_slots=_state_slots(base, config.state_cache_bytes, config.max_batch_requests),
        max_model_len=max_model_len,
        max_batch_tokens=max_batch_tokens,
        pool_units=_pool_units(base, adapter_bytes),
        extra_bytes=adapter_bytes,  # at most as much again as for rows, allocated only when needed
        merged_bytes=merged_bytes,
    )


def exact_kv_dtype(base: Base) -> torch.dtype:
    """Return the dtype in which attention computes: the model's on a GPU, fp32 on a CPU."""
    return torch.float32 if base.device.type == "cpu" else base.dtype


def _kv_dtype(base: Base, requested: str) -> torch.dtype:
    if requested == "auto":
        return exact_kv_dtype(base)
    if requested == "int8" and (unsupported := [layer.head_dim for layer in base.layers if layer.head_dim % 4]):
        raise UnservableModel(
            f"--kv-cache-dtype int8 is for heads of a multiple of 4 numbers; here they have {unsupported[0]}"
        )
    return KV_DTYPES[requested]


def _blocks(base: Base, dtype: torch.dtype, kv_cache_bytes: int | None, chunk: int, requests: int) -> list[int]:
    """Return the KV blocks of each group. Sliding groups get at most the blocks that a full batch can use."""
    sizes = block_bytes(base.layers, BLOCK_SIZE, dtype)
    size = _share(base, 4, 2 << 30, 0.7) if kv_cache_bytes is None else kv_cache_bytes
    equal = size // sum(sizes)
    if equal < 2:
        raise UnservableModel(
            f"--kv-cache-bytes {size} holds {equal} blocks of {sum(sizes)} bytes: at least 2 are needed"
        )
    # More blocks than 256 sequences of full length need would never be used.
    longest = math.ceil(base.max_model_len / BLOCK_SIZE) * 256
    sliding = [
        min(equal, longest, requests * blocks_of_window(window, 0, KEY_GROUP, BLOCK_SIZE) + 2 * chunk // BLOCK_SIZE)
        for window in windows(base.layers)[1:]
    ]
    left = size - sum(count * size for count, size in zip(sliding, sizes[1:], strict=True))
    return [min(left // sizes[0], longest), *sliding]


def _state_slots(base: Base, state_cache_bytes: int | None, requests: int) -> int:
    """Return the number of slots, for running sequences' states and snapshots."""
    if not base.states:
        return 0
    slot = sum(state.bytes for state in base.states.values())
    size = _share(base, 8, 2 << 30, 0.1) if state_cache_bytes is None else state_cache_bytes
    if size < 2 * slot:
        raise UnservableModel(
            f"--state-cache-bytes {size} holds {size // slot} states of {slot} bytes: at least 2 are needed"
        )
    return min(size // slot, requests + MAX_SNAPSHOTS)


def _share(base: Base, divisor: int, max_bytes: int, of_gpu: float) -> int:
    """Return the default for a size in bytes: a share of the GPU's free memory or the host's, at most `max_bytes`."""
    if base.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(base.device)
        return int(free * of_gpu)
    return min(max_bytes, psutil.virtual_memory().available // divisor)


def _pool_units(base: Base, adapter_bytes: int) -> int:
    unit = sum(size.unit_bytes for size in base.linear_sizes.values())
    units = adapter_bytes // unit
    if units < 2:
        raise UnservableModel(f"--adapter-bytes {adapter_bytes} holds no rank row: one takes {2 * unit} bytes in fp32")
    return units
