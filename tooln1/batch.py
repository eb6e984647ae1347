"""Rollouts to packed batches: one flat stream without padding, a prompt stored once per group, balanced over ranks.

Worked example. Two rollouts of one prompt `a b`, with replies `c d` and `e`, and one of prompt `f` with reply `g`:

    tokens      a  b  c  d  e  f  g         one stream, T = 7
    positions   0  1  2  3  2  0  1         each reply goes on where its prompt ended
    segments    (0, 2, (2, 1)), (5, 1, (1,))
    targets     c  d  e  g                  the reply tokens, N = 4, in stream order
    predictors  1  2  1  5                  where the token before each stands; `b` predicts both c and e
    lengths     2     1  1                  R = 3 replies

What a reply may look at is decided by `attention.packed_attention(segments)`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tooln1.attention import Segment
from tooln1.data import Rollout


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch of one rank. N counts reply tokens, R replies, T all tokens of the stream."""

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64, restarting in every segment, continued after the prompt by each reply
    segments: tuple[Segment, ...]  # the groups in the stream
    predictors: Tensor  # [N] int64, index into the stream of the token before each reply token
    targets: Tensor  # [N] int64, the reply tokens, stop token included
    lengths: tuple[int, ...]  # [R] reply tokens of each reply; they sum to N
    rows: tuple[int, ...]  # [R] index of each reply's rollout in the step
    advantages: Tensor  # [R] float32
    attention: str  # the kernel of `attention.packed_attention`
    sampler_logprobs: Tensor  # [N] float32, as the sampler computed them
    old_logprobs: Tensor | None = None  # [N] float32, under the policy as it sampled; None: no pass was made
    ref_logprobs: Tensor | None = None  # [N] float32, under the frozen initial model


def pack(
    rollouts: Sequence[Rollout],
    rows: Sequence[int],
    advantages: Tensor,
    device: torch.device | str = "cpu",
    attention: str = "auto",
) -> PackedBatch:
    """The rollouts `rows` (indices into `rollouts` and `advantages` [len(rollouts)]) as one stream.

    attention: the `kernel` of `packed_attention`. Consecutive rows of one group share their prompt. No rows give a
    stream of one token without a reply: a rank without work runs it, so that all ranks run the same collectives.
    """
    tokens: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    segments: list[Segment] = []
    for members in _group_runs(rollouts, rows):
        prompt = rollouts[members[0]].prompt
        start, replies = len(tokens), [rollouts[row].reply for row in members]
        tokens.extend(prompt)
        positions.extend(range(len(prompt)))
        for reply in replies:
            before = len(tokens) - 1  # predicts the reply's second token, and so on
            predictors.extend([start + len(prompt) - 1, *range(before + 1, before + len(reply))][: len(reply)])
            targets.extend(reply)
            tokens.extend(reply)
            positions.extend(range(len(prompt), len(prompt) + len(reply)))
        segments.append(Segment(start, len(prompt), tuple(map(len, replies))))
    if not rows:
        tokens, positions, segments = [0], [0], [Segment(0, 1, ())]

    def int64(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return PackedBatch(
        tokens=int64(tokens),
        positions=int64(positions),
        segments=tuple(segments),
        attention=attention,
        predictors=int64(predictors),
        targets=int64(targets),
        lengths=tuple(len(rollouts[row].reply) for row in rows),
        rows=tuple(rows),
        advantages=advantages[list(rows)].to(device, torch.float32),
        sampler_logprobs=torch.tensor([x for row in rows for x in rollouts[row].logprobs], device=device),
    )


def _group_runs(rollouts: Sequence[Rollout], rows: Sequence[int]) -> list[list[int]]:
    """Consecutive rows of the same group, together."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and rollouts[runs[-1][0]].group == rollouts[row].group:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def pad_to_rows(values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Per-token values [N] as one row per reply, [R, longest], and the mask [R, longest] of non-padding."""
    if not lengths:
        return values.new_zeros(0, 1) + values.sum(), torch.zeros(0, 1, dtype=torch.bool, device=values.device)
    padded = torch.nn.utils.rnn.pad_sequence(values.split(list(lengths)), batch_first=True)
    sizes = torch.tensor(lengths, device=values.device)
    return padded, torch.arange(padded.shape[1], device=values.device) < sizes[:, None]


def split_into_minibatches(
    rollouts: Sequence[Rollout], rows: Iterable[int], prompts: int, mask_truncated: bool = False
) -> list[list[int]]:
    """`rows`, indices of rollouts, by mini-batch: `prompts` whole groups each, in order.

    mask_truncated: replies that were cut off are left out, and so count neither in the loss nor in its denominator:
    their reward says nothing of how they would have ended (DAPO's overlong filtering, arXiv 2503.14476, Sec. 3.4). For
    a max_reply_tokens that good replies reach; otherwise being cut off is a fault that training should mend.
    """
    groups: dict[int, list[int]] = {}
    for row in rows:
        members = groups.setdefault(rollouts[row].group, [])
        if rollouts[row].finished or not mask_truncated:
            members.append(row)
    kept = list(groups.values())
    return [sum(kept[start : start + prompts], []) for start in range(0, len(kept), prompts)]


def plan_microbatches(
    rollouts: Sequence[Rollout], rows: Sequence[int], budget: int, ranks: int, pair_cost: float = 0.0
) -> list[list[list[int]]]:
    """Micro-batches of at most `budget` tokens for each of `ranks` ranks: [rank][micro-batch] -> indices of rollouts.

    Every rank gets the same number of micro-batches (an empty one where there is too little work), and the j-th ones
    of all ranks cost about the same, because they run at the same time. The cost is tokens + `pair_cost` · (query, key)
    pairs, in units of a token (`model_config.pair_cost`). A group is split, its prompt repeated, only where it exceeds
    the budget, or a rank's share of all tokens; one sequence over the budget gets a micro-batch of its own. Greedy,
    largest cost first. The plan depends only on the arguments, so every rank computes the same one.
    """
    runs = _group_runs(rollouts, rows)
    share = sum(_measured(rollouts, run, 0.0).tokens for run in runs) // ranks
    pieces = [
        _measured(rollouts, piece, pair_cost) for run in runs for piece in _split(rollouts, run, min(budget, share))
    ]
    pieces.sort(key=lambda piece: -piece.cost)  # ties keep their order
    per_rank = max(1, -(-sum(piece.tokens for piece in pieces) // (budget * ranks)))
    while (bins := _fill(pieces, budget, per_rank * ranks)) is None:
        per_rank += 1
    bins.sort(key=lambda bin: -sum(piece.cost for piece in bin))
    return [
        [sorted(row for piece in bins[step * ranks + rank] for row in piece.rows) for step in range(per_rank)]
        for rank in range(ranks)
    ]


class _Piece(NamedTuple):
    """Rows of one group that stay together."""

    rows: list[int]
    tokens: int
    cost: float


def _measured(rollouts: Sequence[Rollout], rows: list[int], pair_cost: float) -> _Piece:
    prompt, replies = len(rollouts[rows[0]].prompt), [len(rollouts[row].reply) for row in rows]
    tokens = prompt + sum(replies)
    pairs = prompt**2 / 2 + sum(prompt * reply + reply**2 / 2 for reply in replies)
    return _Piece(rows, tokens, tokens + pair_cost * pairs)


def _split(rollouts: Sequence[Rollout], run: list[int], budget: int) -> list[list[int]]:
    """A group's rows in as few pieces as the budget allows, each with the prompt of its own."""
    pieces: list[list[int]] = []
    room = 0
    for row in run:
        reply = len(rollouts[row].reply)
        if not pieces or reply > room:
            pieces.append([])
            room = budget - len(rollouts[row].prompt)
        pieces[-1].append(row)
        room -= reply
    return pieces


def _fill(pieces: Sequence[_Piece], budget: int, count: int) -> list[list[_Piece]] | None:
    """Each piece into the cheapest of `count` bins that has room; None if one has room nowhere."""
    bins: list[list[_Piece]] = [[] for _ in range(count)]
    tokens, cost = [0] * count, [0.0] * count
    for piece in pieces:
        fitting = [i for i in range(count) if not bins[i] or tokens[i] + piece.tokens <= budget]
        if not fitting:
            return None
        best = min(fitting, key=cost.__getitem__)
        bins[best].append(piece)
        tokens[best] += piece.tokens
        cost[best] += piece.cost
    return bins
