"""Attention of whole sequences: one causal sequence, and packed groups that share a prompt.

Each is a callable `(layer, q [T, H, D], k [T, K, D], v [T, K, D]) -> [T, H, D]` that the model is called with, so the
model does not know what a token attends to. On the CPU, and as the reference, they are `scaled_dot_product_attention`,
which accumulates in at least fp32; on CUDA packed groups use FlexAttention. Decoding: sampler/paged_attention.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for every new length, 23 to 37 ms each


class Segment(NamedTuple):
    """A group in a packed stream: the prompt's tokens from `start` on, then those of each reply."""

    start: int  # offset in the stream
    prompt: int  # tokens of the prompt
    replies: tuple[int, ...]  # tokens of each reply; () for a prompt without replies


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v with grouped heads: q [B, Tq, H, D], k and v [B, Tk, K, D] -> [B, Tq, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None and q.is_cuda:  # no fused CUDA kernel takes both; the plain one stores all scores
        k, v, grouped = *(x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v)), False
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The stream is one sequence."""
    return attention(q[None], k[None], v[None], causal=True)[0]


def packed_attention(
    segments: tuple[Segment, ...], device: torch.device | str, kernel: str = "auto"
) -> PackedAttention | FlexPackedAttention:
    """Attention over a packed stream on `device`; kernel: "sdpa", "flex", or "auto" for the faster one."""
    flex = kernel == "flex" or (kernel == "auto" and torch.device(device).type == "cuda")
    return (FlexPackedAttention if flex else PackedAttention)(segments, device)


class PackedAttention:
    """The stream is a sequence of groups; a reply attends to its group's prompt and itself, not to its siblings.

    With prompt `a b` and replies `c d` and `e`, the stream a b c d e at positions 0 1 2 3 2 computes exactly what
    the two sequences `a b c d` and `a b e` would:

            a b c d e
        a   x
        b   x x
        c   x x x
        d   x x x x
        e   x x     x

    A prompt is one causal call, its replies are a few calls with a mask, each for at most MAX_BUNDLE_TOKENS tokens.
    """

    def __init__(self, segments: tuple[Segment, ...], device: torch.device | str):
        # A group of one reply is one causal sequence: treated as a prompt.
        segments = tuple(
            segment if len(segment.replies) > 1 else Segment(segment.start, segment.prompt + sum(segment.replies), ())
            for segment in segments
        )
        self.bundles = [(segment.prompt, _bundles(segment, device)) for segment in segments]
        self.sizes = [size for prompt, bundles in self.bundles for size in (prompt, *(len(mask) for mask in bundles))]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # One split instead of slices: the gradient of each slice would be a zero-filled copy of the whole stream.
        pieces = zip(*(x.split(self.sizes) for x in (q, k, v)), strict=True)
        out = []
        for _, bundles in self.bundles:
            queries, keys, values = next(pieces)
            out.append(causal(layer, queries, keys, values))
            for mask in bundles:
                own, own_keys, own_values = next(pieces)
                visible_keys, visible_values = torch.cat((keys, own_keys)), torch.cat((values, own_values))
                out.append(attention(own[None], visible_keys[None], visible_values[None], mask)[0])
        return torch.cat(out)  # [T, H, D]


MAX_BUNDLE_TOKENS = 640  # tokens of replies in one call: scores of all pairs are computed, the mask drops most of them


def _bundles(segment: Segment, device: torch.device | str) -> list[Tensor]:
    """The masks [n, P + n] of runs of replies with n tokens, at most MAX_BUNDLE_TOKENS or a single reply."""
    runs: list[list[int]] = []
    for length in segment.replies:
        if not runs or sum(runs[-1]) + length > MAX_BUNDLE_TOKENS:
            runs.append([])
        runs[-1].append(length)
    masks = []
    for run in runs:
        reply = torch.arange(len(run), device=device).repeat_interleave(
            torch.tensor(run, device=device), output_size=sum(run)
        )
        own = (reply[:, None] == reply).tril()  # [n, n] causal within each reply
        masks.append(F.pad(own, (segment.prompt, 0), value=True))
    return masks


# ------------------------------------------------------------------------------------------------ FlexAttention

BLOCK = 128  # tokens of a block that FlexAttention computes or skips
FLEX_TOKENS = 4096  # streams are padded to this or the next power of two: few lengths, so few compilations


class FlexPackedAttention:
    """What PackedAttention computes, as one FlexAttention call whose block mask is made from the segments.

    The stream is padded here, which costs little: a padding token attends only to itself.
    """

    def __init__(self, segments: tuple[Segment, ...], device: torch.device | str):
        group, reply = _owners(segments)
        self.length = max(FLEX_TOKENS, 1 << (len(group) - 1).bit_length())
        self.padding = self.length - len(group)
        last = int(reply.max())
        group = np.concatenate((group, len(segments) + np.arange(self.padding)))
        reply = np.concatenate((reply, last + 1 + np.arange(self.padding)))
        blocks = _blocks(group.reshape(-1, BLOCK), reply.reshape(-1, BLOCK))
        listed = blocks.sum(1), np.argsort(~blocks, axis=1, kind="stable")  # how many each row has, and these first
        counts, indices = (torch.from_numpy(x).to(device, torch.int32)[None, None] for x in listed)
        group, reply = (torch.from_numpy(x).to(device, torch.int32) for x in (group, reply))

        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = (group[query] == group[key]) & ((reply[key] == PROMPT) | (reply[key] == reply[query]))
            return same & (query >= key)

        size = (self.length, self.length)
        self.mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=size)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, self.padding)).transpose(0, 1)[None] for x in (q, k, v))  # [1, H, T', D]
        out = compiled_flex_attention()(q, k, v, block_mask=self.mask, enable_gqa=True)
        return out[0].transpose(0, 1)[: self.length - self.padding]  # [T, H, D]


PROMPT = -1  # stands for the number of a reply where a token belongs to the prompt


def _owners(segments: tuple[Segment, ...]) -> tuple[np.ndarray, np.ndarray]:
    """For each token of the stream the number of its group and of its reply (numbered through all groups)."""
    group, reply, number = [], [], 0
    for i, segment in enumerate(segments):
        group.append(np.full(segment.prompt + sum(segment.replies), i))
        reply += [np.full(segment.prompt, PROMPT)]
        for length in segment.replies:
            reply.append(np.full(length, number))
            number += 1
    return np.concatenate(group), np.concatenate(reply)


def _blocks(group: np.ndarray, reply: np.ndarray) -> np.ndarray:
    """Which blocks of keys a block of queries may need, bool [n, n], from the owners of their tokens [n, BLOCK].

    Never too few; a block too many only costs time, because the mask is applied inside it.
    """
    first, last = group[:, 0], group[:, -1]  # groups are in order
    own = np.where(reply == PROMPT, reply.max() + 1, reply).min(1), reply.max(1)  # range of the replies in a block
    same_group = (first[:, None] <= last) & (first <= last[:, None])
    same_reply = (own[0][:, None] <= own[1]) & (own[0] <= own[1][:, None])
    prompt = (reply == PROMPT).any(1)
    return same_group & (same_reply | prompt) & np.tri(len(group), dtype=bool)


@cache
def compiled_flex_attention() -> Callable:
    """FlexAttention, compiled for each new set of shapes."""
    torch._dynamo.config.recompile_limit = max(256, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # else it would continue unfused, slow without a message
    return torch.compile(flex_attention, dynamic=False)
