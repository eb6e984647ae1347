"""The key/value cache in blocks, and how large it is."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tooln1.io.model_config import ModelConfig

CUDA_BLOCK_SIZE, CPU_BLOCK_SIZE = 128, 32  # tokens
CUDA_MAX_NUM_SEQS = 512
CUDA_RESERVE = 4 << 30  # bytes that CUDA's context, captured graphs and the logits of sampling take


def kv_bytes_per_token(config: ModelConfig, element_size: int) -> int:
    """Bytes of one token's keys and values in all layers; `element_size`: bytes of a number."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * element_size


def plan_cache(
    config: ModelConfig,
    element_size: int,
    free_bytes: int,
    block_size: int,
    max_num_seqs: int,
    cache_tokens: int = 0,
    lengths: Sequence[tuple[int, int]] | None = None,
) -> int:
    """Number of blocks of the key/value cache.

    cache_tokens decides if it is not 0; else what the sequences can need, in at most half of `free_bytes`.
    lengths: (prompt tokens, max_new_tokens) of each sequence of the call, of which `max_num_seqs` run at once.
    None: any call, that is max_num_seqs sequences as long as the model's context. So it is on CUDA, where kernels and
    graphs are compiled for one cache; a multiple of 64 blocks then, because known shapes are in the compiler's cache.
    """
    if cache_tokens:
        return max(1, cache_tokens // block_size)
    affordable = free_bytes // 2 // kv_bytes_per_token(config, element_size) // block_size
    if lengths is None:
        context = config.raw.get("max_position_embeddings") or 32768
        return max(1, min(max_num_seqs * -(-context // block_size), affordable // 64 * 64))
    blocks = [-(-(prompt + new) // block_size) for prompt, new in lengths]
    waiting_prompt = max((-(-prompt // block_size) for prompt, _ in lengths), default=0)  # kept for its group to start
    return max(1, min(sum(blocks), max_num_seqs * (max(blocks, default=1) + waiting_prompt), affordable))


def to_device(numbers: np.ndarray | Sequence, device: torch.device) -> Tensor:
    """Numbers on `device`, without waiting for the work queued there."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class KVCache:
    """Keys and values of every layer in blocks: [L, num_blocks + 1, block_size, 2, K, D]; block 0 is for padding.

    A token's key and value are neighbours, so that both are stored, gathered and copied at once. All numbers start
    finite (zero): attention gives masked tokens the weight 0, and 0 · NaN would still be NaN.
    """

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, like: Tensor):
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (config.num_hidden_layers, num_blocks + 1, block_size, 2, config.num_key_value_heads, config.head_dim)
        self.data = like.new_zeros(shape)

    def write(self, layer: int, slot_mapping: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v [T, K, D] at `slot_mapping` [T]: block number · block_size + offset in the block."""
        self.data[layer].flatten(0, 1).index_copy_(0, slot_mapping, torch.stack((k, v), dim=1))

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values in `blocks` [N, S], each [N, S · block_size, K, D]."""
        _, size, _, heads, dim = self.data[layer].shape
        flat = self.data[layer].view(self.num_blocks + 1, -1)  # a block is one row: plain memory copies
        both = flat.index_select(0, blocks.view(-1)).view(len(blocks), blocks.shape[1] * size, 2, heads, dim)
        return both[:, :, 0], both[:, :, 1]

    def slots(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views of all keys and of all values, each [slots, K, D]."""
        return self.data[layer].flatten(0, 1).unbind(1)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, (from, to), in all layers; no block is both."""
        source, target = to_device(np.array(pairs).T, self.data.device)
        for layer in self.data:  # one by one: the copies of all layers at once may be large
            layer[target] = layer[source]
