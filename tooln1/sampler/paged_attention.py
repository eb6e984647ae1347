"""Attention over the blocks of a key/value cache: prefill, and decoding in two forms that are asserted equal.

    PrefillAttention   packed spans of tokens; a span attends to itself and to what the cache holds before it
    GatheredDecode     one new token a sequence, by plain SDPA: sequences that share prompt blocks form one small batch
    FlexDecode         the same by FlexAttention on CUDA: the block table is the block mask's indices, nothing is copied

Like those of attention.py, each is a callable (layer, q [T, H, D], k [T, K, D], v [T, K, D]) -> [T, H, D].
"""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from tooln1.attention import attention, compiled_flex_attention
from tooln1.sampler.kv_cache import KVCache, to_device
from tooln1.sampler.scheduler import Prefill, Sequence

MAX_GROUP = 8  # sequences of a group in one small batch: each query is multiplied with the keys of all of them
MAX_PADDING = 512  # tokens of padding in a bucket; beyond them another bucket costs less


class PrefillAttention:
    """Causal attention of packed spans, each from a position to the last token of its sequence."""

    def __init__(self, cache: KVCache, prefills: list[Prefill]):
        device, size = cache.data.device, cache.block_size
        self.cache, self.spans, slots, offset = cache, [], [], 0
        for seq, start, _ in prefills:
            positions = np.arange(start, seq.num_tokens)
            slots.append(np.array(seq.block_table)[positions // size] * size + positions % size)
            blocks = to_device([seq.block_table], device) if start else None
            self.spans.append((slice(offset, offset + len(positions)), start, seq.num_tokens, blocks))
            offset += len(positions)
        self.slot_mapping = to_device(np.concatenate(slots), device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.write(layer, self.slot_mapping, k, v)  # all first: a span may read blocks that another one fills
        out = torch.empty_like(q)
        for own, start, end, blocks in self.spans:
            if blocks is None:
                out[own] = attention(q[None, own], k[None, own], v[None, own], causal=True)[0]
                continue
            keys, values = (x[:, :end] for x in self.cache.gather(layer, blocks))
            mask = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
            out[own] = attention(q[None, own], keys, values, mask)[0]
        return out


class GatheredDecode:
    """Decoding by SDPA over copies of the blocks: one small batch for each prompt group, groups bucketed by length.

    A group's blocks are gathered once, the shared ones first, and a mask lets each sequence see those and its own:

                  shared      seq 0       seq 1
        seq 0   x x x x x   x x x x .   . . . . .
        seq 1   x x x x x   . . . . .   x x . . .
    """

    def __init__(self, cache: KVCache, seqs: list[Sequence]):
        size, device = cache.block_size, cache.data.device
        last_slots = [seq.block_table[-1] * size + (seq.num_cached_tokens - 1) % size for seq in seqs]
        self.cache, self.slot_mapping = cache, to_device(last_slots, device)
        self.buckets = [_Bucket(cache, groups, seqs) for groups in _bucketed_groups(seqs, size)]
        first_output: dict[int, int] = {}  # of each row of q in the buckets' outputs; later ones are padding
        for i, row in enumerate(row for bucket in self.buckets for row in bucket.padded_rows):
            first_output.setdefault(row, i)
        self.order = to_device([first_output[row] for row in range(len(seqs))], device)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.write(layer, self.slot_mapping, k, v)
        return torch.cat([bucket(layer, q) for bucket in self.buckets]).index_select(0, self.order)


def _bucketed_groups(seqs: list[Sequence], block_size: int) -> list[list[list[int]]]:
    """Rows with the same first block as groups of at most MAX_GROUP, and those, longest first, cut into buckets."""
    by_first_block = defaultdict(list)
    for row, seq in enumerate(seqs):
        by_first_block[seq.block_table[0]].append(row)
    groups = [rows[i : i + MAX_GROUP] for rows in by_first_block.values() for i in range(0, len(rows), MAX_GROUP)]
    buckets, padding, longest = [], 0, 0
    for group in sorted(groups, key=lambda group: -_num_blocks(group, seqs, block_size)):
        length = _num_blocks(group, seqs, block_size)
        padding += (longest - length) * block_size
        if not buckets or padding >= MAX_PADDING:
            buckets.append([])
            padding, longest = 0, length
        buckets[-1].append(group)
    return buckets


def _num_blocks(group: list[int], seqs: list[Sequence], block_size: int) -> int:
    """Blocks of a group's sequences, those that are full with the prompt counted once."""
    shared = len(seqs[group[0]].group.prompt) // block_size
    return shared + sum(len(seqs[row].block_table) - shared for row in group)


class _Bucket:
    """N prompt groups, padded to R sequences and S blocks each; padding repeats a group's first sequence."""

    def __init__(self, cache: KVCache, groups: list[list[int]], seqs: list[Sequence]):
        size, device = cache.block_size, cache.data.device
        num_seqs, num_blocks = max(map(len, groups)), _num_blocks(groups[0], seqs, size)  # the first is the longest
        blocks = np.zeros((len(groups), num_blocks), dtype=np.int64)
        visible = np.zeros((len(groups), num_seqs, num_blocks), dtype=np.int64)  # tokens of a block that a row sees
        for n, group in enumerate(groups):
            shared = end = len(seqs[group[0]].group.prompt) // size
            blocks[n, :end] = seqs[group[0]].block_table[:end]
            visible[n, :, :end] = size
            for r, row in enumerate(group):
                own = seqs[row].block_table[shared:]
                begin, end = end, end + len(own)
                blocks[n, begin:end] = own
                visible[n, r, begin:end] = size
                visible[n, r, end - 1] = (seqs[row].num_cached_tokens - 1) % size + 1
            visible[n, len(group) :] = visible[n, 0]
        self.cache, self.shape = cache, (len(groups), num_seqs)
        self.padded_rows = [row for group in groups for row in group + group[:1] * (num_seqs - len(group))]
        self.rows, self.blocks, visible = (to_device(x, device) for x in (self.padded_rows, blocks, visible))
        self.seen = (visible[..., None] > torch.arange(size, device=device)).flatten(2)  # [N, R, S · block_size]
        self.mask: Tensor | None = None

    def __call__(self, layer: int, q: Tensor) -> Tensor:
        """The output of the bucket's rows, padding included, [N · R, H, D]."""
        keys, values = self.cache.gather(layer, self.blocks)  # [N, S · block_size, K, D]
        (groups, seqs), (heads, dim), ratio = self.shape, keys.shape[2:], q.shape[1] // keys.shape[2]
        if self.mask is None:  # the same in every layer
            seen = self.seen.repeat_interleave(ratio, dim=1)[:, None]
            self.mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
        # The H/K query heads of a key head become further queries of that head.
        grouped = q.index_select(0, self.rows).view(groups, seqs, heads, ratio, dim).transpose(2, 3)
        out = attention(grouped.reshape(groups, seqs * ratio, heads, dim), keys, values, self.mask)
        return out.view(groups, seqs, ratio, heads, dim).transpose(2, 3).reshape(groups * seqs, -1, dim)


class FlexDecode:
    """Decoding by FlexAttention over the cache itself: the blocks of the block mask are those of the block table.

    block_table, int [B, up to the cache's blocks]: each sequence's blocks in order, then anything; positions [B]: of
    the new tokens. Compiled once for each B. Only what a block holds beyond the newest token needs the mask.
    """

    def __init__(self, cache: KVCache, block_table: Tensor, positions: Tensor):
        size = cache.block_size
        last_block = block_table.gather(1, (positions // size)[:, None])[:, 0]  # [B]
        offset = positions % size
        self.cache, self.block_table, self.slot_mapping = cache, block_table, last_block * size + offset
        self.num_blocks = (positions // size + 1).to(torch.int32)

        def mask_mod(seq: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
            return (slot // size != last_block[seq]) | (slot % size <= offset[seq])

        self.mask_mod = mask_mod

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache.write(layer, self.slot_mapping, k, v)
        keys, values = (x.transpose(0, 1)[None] for x in self.cache.slots(layer))  # [1, K, slots, D]
        # The H/K query heads of a key head become its queries: FlexAttention's own grouping wants a power of two.
        grouped = q.unflatten(1, (k.shape[1], -1))  # [B, K, H/K, D]
        mask = BlockMask.from_kv_blocks(
            self.num_blocks[:, None, None],
            self.block_table[:, None, None],
            BLOCK_SIZE=(128, self.cache.block_size),
            mask_mod=self.mask_mod,
            seq_lengths=(grouped.shape[2], keys.shape[2]),
            compute_q_blocks=False,
        )
        # By default it uses a single pipeline stage on Hopper, which leaves memory idle.
        options = {"BLOCK_N": min(64, self.cache.block_size), "num_stages": 3} if q.is_cuda else None
        return compiled_flex_attention()(grouped, keys, values, block_mask=mask, kernel_options=options).flatten(1, 2)
