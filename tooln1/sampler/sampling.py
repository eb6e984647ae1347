"""From logits to tokens: one uniform number per token, which depends only on what is drawn, and inverse CDF."""

from typing import NamedTuple

import torch
from torch import Tensor

_MASK = (1 << 63) - 1


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, whose products wrap: every input bit reaches every output bit."""
    x = (x ^ ((x >> 30) & (_MASK >> 29))) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & (_MASK >> 26))) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & (_MASK >> 30))


def _hash(state: Tensor, part: Tensor | int) -> Tensor:
    return _mix(_mix(state) + part - 7046029254386353131)  # the golden-ratio increment of splitmix64


def reply_streams(seed: int, step: int, keys: Tensor, samples: Tensor) -> Tensor:
    """The random stream of each reply, int64 [B]: a hash of (seed, step, key, sample).

    keys and samples, int64 [B]: the example's key and the number of the reply in its group.
    """
    state = torch.zeros_like(keys)
    for part in (seed, step, keys, samples):
        state = _hash(state, part)
    return state


def uniforms(streams: Tensor, positions: Tensor) -> Tensor:
    """One number in (0, 1) per row, fp32 [B], for the token at `positions` (int64 [B]) of each stream's reply."""
    return (((_hash(streams, positions) >> 41) & 0x7FFFFF).to(torch.float32) + 0.5) / (1 << 23)


def apply_top_k_top_p(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """-inf for every logit [B, V] outside the `top_k` largest (0: off) or the smallest set of mass `top_p` (1: off)."""
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        sorted_, order = logits.sort(dim=-1, descending=True)
        probs = sorted_.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p  # the mass before it already suffices
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    return logits


class SamplingParams(NamedTuple):
    """How logits become tokens."""

    temperature: float
    top_k: int
    top_p: float


def sample_tokens(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Token [B] and its log-probability [B] from fp32 logits [B, V] and one uniform number per row [B].

    Temperature 0 is greedy (first of equals), with log-probs at temperature 1. Else it is the first token whose
    cumulated probability exceeds the uniform number.
    """
    scaled = logits / (temperature or 1.0)
    probs = scaled.softmax(-1)  # [B, V]
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        unrestricted = top_k == 0 and top_p == 1
        allowed = probs if unrestricted else apply_top_k_top_p(scaled, top_k, top_p).softmax(-1)
        # At least two rows: CUDA sums a single one by another algorithm, whose result may differ from run to run.
        cdf = allowed.expand(max(2, len(allowed)), -1).cumsum(-1)[: len(allowed)]
        total = cdf[:, -1]
        below = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(cdf, below[:, None], right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
    return token, probs.gather(-1, token[:, None])[:, 0].log()
