"""The attentions the model is handed: one causal sequence, packed groups that share their prompt, cached decoding.

Each is a callable `(layer, q [T, H, D], k [T, K, D], v [T, K, D]) -> [T, H, D]`, so the model itself never learns
what a token may look at. All are plain `scaled_dot_product_attention`, which accumulates in at least fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Segment(NamedTuple):
    """A group in a packed stream: the prompt's tokens from `start` on, then each reply's, back to back."""

    start: int  # offset in the stream
    prompt: int  # tokens of the prompt
    replies: tuple[int, ...]  # tokens of each reply; () for a prompt alone


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v with grouped heads: q [B, Tq, H, D], k and v [B, Tk, K, D] -> [B, Tq, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None and q.is_cuda:  # no fused CUDA kernel takes both; the plain one writes all scores
        k, v, grouped = *(x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v)), False
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def causal(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The stream is one sequence."""
    return attention(q[None], k[None], v[None], causal=True)[0]


class PackedAttention:
    """The stream is a row of groups; a reply sees its group's prompt and itself, never its siblings.

    With prompt `a b` and replies `c d` and `e`, the stream a b c d e at positions 0 1 2 3 2 computes exactly what
    the two sequences `a b c d` and `a b e` would:

            a b c d e
        a   x
        b   x x
        c   x x x
        d   x x x x
        e   x x     x
    """

    def __init__(self, segments: tuple[Segment, ...], device: torch.device | str):
        # A group of one reply is one causal sequence: all of it counts as the prompt.
        self.segments = tuple(
            segment if len(segment.replies) > 1 else Segment(segment.start, segment.prompt + sum(segment.replies), ())
            for segment in segments
        )
        self.sizes = [size for segment in self.segments for size in (segment.prompt, sum(segment.replies))]
        self.masks = [_reply_mask(segment, device) for segment in self.segments]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # One split, not a slice per group: each slice's gradient would be a zero-filled copy of the whole stream.
        pieces = zip(*(zip(*[iter(x.split(self.sizes))] * 2, strict=True) for x in (q, k, v)), strict=True)
        out = []
        for segment, mask, (queries, keys, values) in zip(self.segments, self.masks, pieces, strict=True):
            out.append(causal(layer, queries[0], keys[0], values[0]))
            if segment.replies:
                out.append(_attend_replies(segment, mask, queries[1], keys, values))
        return torch.cat(out)  # [T, H, D]


def _reply_mask(segment: Segment, device: torch.device | str) -> Tensor | None:
    """[R, P + R], R the longest reply: all of the prompt, the reply causally; padding stands behind every query."""
    longest = max(segment.replies, default=0)
    if longest == 0:
        return None
    full = torch.ones(longest, segment.prompt + longest, dtype=torch.bool, device=device)
    return full.tril(segment.prompt)


def _attend_replies(segment: Segment, mask: Tensor, q: Tensor, keys: tuple, values: tuple) -> Tensor:
    """A group's replies as rows of one batch, each behind the prompt; keys and values: (the prompt's, the replies')."""
    lengths = list(segment.replies)

    def rows(x: Tensor) -> Tensor:  # [sum of replies, heads, D] -> [G, R, heads, D]
        return torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True)

    def with_prompt(prompt: Tensor, replies: Tensor) -> Tensor:  # -> [G, P + R, K, D]
        return torch.cat((prompt.expand(len(lengths), -1, -1, -1), rows(replies)), dim=1)

    out = attention(rows(q), with_prompt(*keys), with_prompt(*values), mask)  # [G, R, H, D]
    return torch.cat([row[:length] for row, length in zip(out, lengths, strict=True)])
