"""What the replies of a step say about the run: reward and its parts, lengths, agreement of sampler and trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tooln1.batch import PackedBatch
from tooln1.data import Rollout
from tooln1.grpo import zero_variance_groups
from tooln1.rewards import fault_of
from tooln1.run.metrics import Metrics
from tooln1.sampler.scheduler import Stats

FORMAT_FAULTS = ("no_call_block", "bad_json", "bad_format", "no_think")


def add_reply_metrics(
    metrics: Metrics,
    rollouts: Sequence[Rollout],
    replies: Sequence[str],
    answers: Sequence[list[dict]],
    rewards: Tensor,
    think: bool,
    ranks: int,
) -> None:
    """Add the figures of all replies of a step; every one of the `ranks` holds all of them and adds the same.

    accuracy is the share that the binary reward would pay, whatever the reward in use; format_ok the share whose
    calls at least read well. rewards: [N] float.
    """
    faults = [fault_of(*pair, think) for pair in zip(replies, answers, strict=True)]
    lengths = [len(rollout.reply) for rollout in rollouts]
    for name, total in (
        ("reward", rewards.sum()),
        ("accuracy", faults.count("none")),
        ("format_ok", sum(fault not in FORMAT_FAULTS for fault in faults)),
        ("truncated_fraction", sum(not rollout.finished for rollout in rollouts)),
        ("reply_tokens_mean", sum(lengths)),
    ):
        metrics.add_mean(name, total, len(rollouts))
    groups = torch.tensor([rollout.group for rollout in rollouts])
    metrics.add_mean("zero_variance_fraction", zero_variance_groups(rewards, groups))
    metrics.add_min("reply_tokens_min", min(lengths))
    metrics.add_max("reply_tokens_max", max(lengths))
    metrics.add_tokens("rollout", sum(lengths) / ranks)  # tokens of all ranks are added up


def add_sampler_stats(metrics: Metrics, stats: Stats) -> None:
    """Add what this rank's sampling took beside the reply tokens: prompt tokens computed, and rows put back."""
    metrics.add_sum("prompt_tokens_prefilled", stats.prefilled)
    metrics.add_sum("tokens_recomputed", stats.recomputed)
    metrics.add_sum("rows_put_back", stats.preemptions)


def add_sampler_gap(metrics: Metrics, rollouts: Sequence[Rollout], batches: Sequence[PackedBatch]) -> None:
    """Add the mean |log-prob of the sampler - log-prob of the trainer| over this rank's reply tokens."""
    for batch in batches:
        sampled = torch.tensor([logprob for row in batch.rows for logprob in rollouts[row].logprobs])
        gap = (batch.old_logprobs.cpu() - sampled).abs()
        metrics.add_mean("sampler_logprob_gap", gap.sum(), len(gap))
