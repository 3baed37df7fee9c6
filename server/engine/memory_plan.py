"""The device's memory divided: KV blocks, adapter rows, the adapters' variants, merged weights."""

import math
from typing import NamedTuple

import psutil
import torch

from server.messages.protocol import EngineConfig
from server.model.attention import KVCache
from server.model.base import Base, UnservableModel

BLOCK_SIZE = 16  # tokens
DEFAULT_BATCH_TOKENS = {"cpu": 256, "cuda": 2048}


class DevicePlan(NamedTuple):
    """Sizes of an engine's parts."""

    num_blocks: int  # KV blocks of BLOCK_SIZE tokens
    max_model_len: int  # tokens
    max_batch_tokens: int
    pool_units: int  # adapter row units per module kind
    extra_bytes: int  # for adapters' parts beside rows, at most
    merged_bytes: int  # for merged weights, at most


def plan(base: Base, config: EngineConfig) -> DevicePlan:
    """Divide a loaded base's device. Raises UnservableModel for settings that cannot work."""
    num_blocks = _num_blocks(base, config.kv_cache_bytes)
    max_model_len = base.context_length(config.max_model_len)
    if num_blocks * BLOCK_SIZE < max_model_len:
        if config.max_model_len is not None:
            raise UnservableModel(
                f"--max-model-len {max_model_len} needs more KV cache than there is "
                f"({num_blocks * BLOCK_SIZE} tokens): raise --kv-cache-bytes or lower --max-model-len"
            )
        max_model_len = num_blocks * BLOCK_SIZE
    max_batch_tokens = config.max_batch_tokens or DEFAULT_BATCH_TOKENS.get(base.device.type, 512)
    if max_batch_tokens <= config.max_batch_requests:
        raise UnservableModel(
            f"--max-batch-tokens {max_batch_tokens} must exceed --max-batch-requests {config.max_batch_requests}, "
            "or decoding would leave no room for prompts"
        )
    adapter_bytes = _share(base, 8, 1 << 30, 0.1) if config.adapter_bytes is None else config.adapter_bytes
    merged_bytes = _share(base, 8, 1 << 30, 0.1) if config.merged_bytes is None else config.merged_bytes
    return DevicePlan(
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_batch_tokens=max_batch_tokens,
        pool_units=_pool_units(base, adapter_bytes),
        extra_bytes=adapter_bytes,  # at most as much again as rows, and only when wanted
        merged_bytes=merged_bytes,
    )


def _num_blocks(base: Base, kv_cache_bytes: int | None) -> int:
    block = KVCache.block_bytes(base.num_layers, base.kv_heads, base.head_dim, BLOCK_SIZE, base.dtype)
    size = _share(base, 4, 2 << 30, 0.7) if kv_cache_bytes is None else kv_cache_bytes
    blocks = size // block
    if blocks < 2:
        raise UnservableModel(f"--kv-cache-bytes {size} holds {blocks} blocks of {block} bytes: at least 2 are needed")
    # More than every sequence of a full batch could use would never be touched.
    return min(blocks, math.ceil(base.max_model_len / BLOCK_SIZE) * 256)


def _share(base: Base, divisor: int, most: int, of_gpu: float) -> int:
    """Bytes where no setting says how many: a part of a GPU's free memory, or of the host's and at most `most`."""
    if base.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(base.device)
        return int(free * of_gpu)
    return min(most, psutil.virtual_memory().available // divisor)


def _pool_units(base: Base, adapter_bytes: int) -> int:
    unit = sum(size.unit_bytes for size in base.linear_sizes.values())
    units = adapter_bytes // unit
    if units < 2:
        raise UnservableModel(f"--adapter-bytes {adapter_bytes} holds no rank row: one takes {2 * unit} bytes in fp32")
    return units
