"""Sampling replies: a prompt is computed once per group, rows leave when they stop, every draw is reproducible.

    prefill   the distinct prompts as one packed stream; their keys and values are copied to each row of the group
    decode    one token per row and step, all rows at once; a row that stopped is dropped from the cache
    draw      inverse CDF at one uniform number that depends only on (seed, step, key, sample, position)

So a reply does not depend on which rows it was sampled beside, on which rank, or in which order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tooln1.attention import PackedAttention, Segment, attention
from tooln1.model import Transformer


@dataclass(frozen=True)
class Rollout:
    """One sampled reply."""

    group: int  # which prompt of the call it answers; replies of one group are compared with each other
    sample: int  # which of the group's replies it is, 0 .. G-1
    prompt: list[int]  # token ids
    reply: list[int]  # token ids, the stop token included
    logprobs: list[float]  # of each reply token at the sampling temperature, before top-k and top-p
    finished: bool  # ended with a stop token; False: cut at the cap


# ------------------------------------------------------------------------------------------------ randomness

_MASK = (1 << 63) - 1


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64, whose products wrap: every input bit reaches every output bit."""
    x = (x ^ ((x >> 30) & (_MASK >> 29))) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & (_MASK >> 26))) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & (_MASK >> 30))


def uniforms(seed: int, step: int, keys: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
    """One uniform number in (0, 1) per row, fp32 [B], a hash of (seed, step, key, sample, position).

    keys, samples, positions: int64 [B], the example's key, the number of the reply in its group and the number of
    the token in its reply.
    """
    state = torch.zeros_like(keys)
    for part in (torch.full_like(keys, seed), torch.full_like(keys, step), keys, samples, positions):
        state = _mix(_mix(state) + part - 7046029254386353131)  # the golden-ratio increment of splitmix64
    return (((state >> 41) & 0x7FFFFF).to(torch.float32) + 0.5) / (1 << 23)


# ------------------------------------------------------------------------------------------------ choosing a token


def restrict(logits: Tensor, top_k: int, top_p: float) -> Tensor:
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


def choose(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Token [B] and its log-probability [B] from fp32 logits [B, V] and one uniform number per row [B].

    Temperature 0 is greedy (first of equals), with log-probs at temperature 1. The draw is the first token whose
    cumulated probability exceeds the uniform number.
    """
    logprobs = F.log_softmax(logits / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        cdf = restrict(logprobs, top_k, top_p).softmax(-1).cumsum(-1)  # [B, V]
        total = cdf[:, -1]
        below = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(cdf, below[:, None], right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
    return token, logprobs.gather(-1, token[:, None])[:, 0]


# ------------------------------------------------------------------------------------------------ cache


class KVCache:
    """Keys and values of B rows, per layer [B, S, K, D]; row b holds its first `lengths[b]` places."""

    def __init__(self, lengths: list[int], model: Transformer):
        config, like = model.config, model.head
        self.lengths = torch.tensor(lengths, device=like.device)  # [B] places taken
        shape = (len(lengths), max(lengths), config.num_key_value_heads, config.head_dim)
        self.keys = [like.new_empty(shape) for _ in range(config.num_hidden_layers)]
        self.values = [like.new_empty(shape) for _ in range(config.num_hidden_layers)]
        self.clear()

    def clear(self) -> None:
        """Zero the places not yet written: attention weighs them 0, and 0 · NaN would still be NaN."""
        for cached in (*self.keys, *self.values):
            cached.zero_()

    def grow(self, places: int) -> None:
        """Room for `places` more tokens in every row."""
        for layers in (self.keys, self.values):
            for i, cached in enumerate(layers):  # one by one: two whole caches at once might not fit
                layers[i] = F.pad(cached, (0, 0, 0, 0, 0, places))

    def keep(self, rows: Tensor) -> None:
        """Drop every row but `rows` (int64 indices)."""
        self.lengths = self.lengths[rows]
        for layers in (self.keys, self.values):
            for i, cached in enumerate(layers):
                layers[i] = cached[rows]

    @property
    def capacity(self) -> int:
        """Places per row."""
        return self.keys[0].shape[1]


class PrefillAttention(PackedAttention):
    """Attention over packed prompts that copies each prompt's keys and values to the rows of its group."""

    def __init__(self, segments: tuple[Segment, ...], cache: KVCache, rows_of: list[list[int]]):
        super().__init__(segments, cache.lengths.device)
        self.cache, self.rows_of = cache, rows_of

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for (start, length, _), rows in zip(self.segments, self.rows_of, strict=True):
            self.cache.keys[layer][rows, :length] = k[start : start + length]
            self.cache.values[layer][rows, :length] = v[start : start + length]
        return super().__call__(layer, q, k, v)


class DecodeAttention:
    """One new token per row: it is appended to the cache and looks at all of its row."""

    def __init__(self, cache: KVCache):
        self.cache, self.rows = cache, torch.arange(len(cache.lengths), device=cache.lengths.device)
        places = torch.arange(cache.capacity, device=cache.lengths.device)
        self.mask = (places <= cache.lengths[:, None])[:, None, None]  # [B, 1, 1, S], the new token included

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, self.cache.lengths] = k
        values[self.rows, self.cache.lengths] = v
        # The H/K query heads of a key head stand as that head's "queries", so nothing is copied H/K times.
        grouped = q.unflatten(1, (k.shape[1], -1)).transpose(1, 2)  # [B, H/K, K, D]
        return attention(grouped, keys, values, self.mask).transpose(1, 2).flatten(1, 2)  # [B, H, D]


# ------------------------------------------------------------------------------------------------ sampler


class Sampler:
    """Samples groups of replies from a whole (unsharded) copy of the model.

    `stop_ids` end a reply and belong to it. At most `rows` replies are in flight at once (0: all), in whole groups.
    """

    def __init__(self, model: Transformer, stop_ids: Sequence[int], rows: int = 0):
        self.model = model
        self.stop_ids = torch.tensor(list(stop_ids), device=model.head.device)
        self.rows = rows

    def generate(
        self,
        prompts: list[list[int]],
        group_size: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int | list[int] = 256,
        seed: int = 0,
        step: int = 0,
        keys: list[int] | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
        on_finished: Callable[[int], None] | None = None,
    ) -> list[Rollout]:
        """`group_size` replies to each prompt (token ids), in prompt order.

        `keys` name the prompts for the randomness (default: their place in the list); `max_new_tokens` caps the
        replies, one number or one per prompt; temperature 0 is greedy. `on_finished(n)` is told of n more finished
        replies. Raises ValueError for an empty prompt, an empty cap or numbers out of range.
        """
        caps = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        keys = list(range(len(prompts))) if keys is None else list(keys)
        _check(prompts, group_size, temperature, caps, keys, top_p, top_k)
        # Prompts of like length share a batch, so that little of its cache is padding.
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        groups_at_once = max(1, self.rows // group_size) if self.rows else max(1, len(prompts))
        rollouts: list[Rollout] = []
        for start in range(0, len(order), groups_at_once):
            batch = order[start : start + groups_at_once]
            rows = [(group, sample) for group in batch for sample in range(group_size)]
            draw = _Draw(seed, step, temperature, top_k, top_p)
            rollouts += self._generate_batch(prompts, batch, rows, keys, caps, draw, on_finished)
        return sorted(rollouts, key=lambda rollout: (rollout.group, rollout.sample))

    @torch.inference_mode()
    def _generate_batch(self, prompts, batch, rows, keys, caps, draw, on_finished) -> list[Rollout]:
        device = self.stop_ids.device
        cache = KVCache([len(prompts[group]) for group, _ in rows], self.model)
        hidden = self._prefill(prompts, batch, rows, cache)  # [B, C]
        key = torch.tensor([keys[group] for group, _ in rows], device=device)
        sample = torch.tensor([sample for _, sample in rows], device=device)
        cap = torch.tensor([caps[group] for group, _ in rows], device=device)
        alive = torch.arange(len(rows), device=device)  # which of `rows` each place of the batch holds
        replies: list[list[int]] = [[] for _ in rows]
        logprobs: list[list[float]] = [[] for _ in rows]
        finished = [False] * len(rows)
        for position in range(max(caps[group] for group in batch)):
            logits = F.linear(hidden, self.model.head).float()  # [B, V]
            token, logprob = draw(logits, key, sample, position)
            if not torch.isfinite(logprob).all():
                raise ValueError(f"the model's logits are not finite at token {position} of a reply; are its weights?")
            stopped = torch.isin(token, self.stop_ids)
            for row, t, p, s in zip(
                alive.tolist(), token.tolist(), logprob.tolist(), stopped.tolist(), strict=True
            ):
                replies[row].append(t)
                logprobs[row].append(p)
                finished[row] = s
            going = (~stopped & (position + 1 < cap)).nonzero()[:, 0]
            if on_finished and len(going) < len(alive):
                on_finished(len(alive) - len(going))
            if len(going) == 0:
                break
            if len(going) < len(alive):
                cache.keep(going)
                alive, token, key, sample, cap = (x[going] for x in (alive, token, key, sample, cap))
            if position % GROWTH == 0:
                cache.grow(GROWTH)
            hidden = self.model(token, cache.lengths, DecodeAttention(cache))
            cache.lengths = cache.lengths + 1
        return [
            Rollout(group, sample_, prompts[group], replies[row], logprobs[row], finished[row])
            for row, (group, sample_) in enumerate(rows)
        ]

    def _prefill(self, prompts, batch, rows, cache) -> Tensor:
        """Run the distinct prompts of `batch` once, fill the cache, return each row's last hidden state [B, C]."""
        device = self.stop_ids.device
        segments, rows_of, last, start = [], [], [], 0
        for group in batch:
            segments.append(Segment(start, len(prompts[group]), ()))
            rows_of.append([row for row, (of, _) in enumerate(rows) if of == group])
            start += len(prompts[group])
            last.append(start - 1)
        tokens = torch.tensor([token for group in batch for token in prompts[group]], device=device)
        positions = torch.cat([torch.arange(len(prompts[group]), device=device) for group in batch])
        hidden = self.model(tokens, positions, PrefillAttention(tuple(segments), cache, rows_of))
        place = {group: last[i] for i, group in enumerate(batch)}
        return hidden[[place[group] for group, _ in rows]]


GROWTH = 32  # places added to every row of the cache at a time


@dataclass(frozen=True)
class _Draw:
    """How this call turns logits into tokens."""

    seed: int
    step: int
    temperature: float
    top_k: int
    top_p: float

    def __call__(self, logits: Tensor, key: Tensor, sample: Tensor, position: int) -> tuple[Tensor, Tensor]:
        uniform = uniforms(self.seed, self.step, key, sample, torch.full_like(key, position))
        return choose(logits, uniform, self.temperature, self.top_k, self.top_p)


def _check(prompts, group_size, temperature, caps, keys, top_p, top_k) -> None:
    if empty := [i for i, prompt in enumerate(prompts) if not prompt]:
        raise ValueError(f"prompt {empty[0]} is empty; there is nothing to continue")
    if len(caps) != len(prompts) or len(keys) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(caps)} max_new_tokens and {len(keys)} keys")
    if min(caps, default=1) < 1 or group_size < 1:
        raise ValueError(f"max_new_tokens ({min(caps)}) and group_size ({group_size}) must be at least 1")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"out of range: temperature {temperature} >= 0, top_p {top_p} in (0, 1], top_k {top_k} >= 0")
