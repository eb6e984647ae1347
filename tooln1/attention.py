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
        self.segments = segments
        self.masks = [_reply_mask(segment, device) for segment in segments]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pieces = []
        for segment, mask in zip(self.segments, self.masks, strict=True):
            prompt = slice(segment.start, segment.start + segment.prompt)
            pieces.append(causal(layer, q[prompt], k[prompt], v[prompt]))
            if segment.replies:
                replies = slice(prompt.stop, prompt.stop + sum(segment.replies))
                pieces.append(_attend_replies(segment, mask, q[replies], k, v))
        return torch.cat(pieces)  # [T, H, D]


def _reply_mask(segment: Segment, device: torch.device | str) -> Tensor | None:
    """[R, P + R], R the longest reply: the whole prompt, then the reply causally. Padding sits behind every query."""
    longest = max(segment.replies, default=0)
    if longest == 0:
        return None
    full = torch.ones(longest, segment.prompt + longest, dtype=torch.bool, device=device)
    return full.tril(segment.prompt)


def _attend_replies(segment: Segment, mask: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The group's replies as the rows of one batch, each with the prompt's keys in front: [sum of replies, H, D]."""
    prompt, lengths = slice(segment.start, segment.start + segment.prompt), list(segment.replies)
    replies = slice(prompt.stop, prompt.stop + sum(lengths))

    def rows(x: Tensor) -> Tensor:  # [sum, heads, D] -> [G, R, heads, D]
        return torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True)

    def with_prompt(x: Tensor) -> Tensor:  # -> [G, P + R, K, D]
        return torch.cat((x[prompt].expand(len(lengths), -1, -1, -1), rows(x[replies])), dim=1)

    out = attention(rows(q), with_prompt(k), with_prompt(v), mask)  # [G, R, H, D]
    return torch.cat([row[:length] for row, length in zip(out, lengths, strict=True)])
