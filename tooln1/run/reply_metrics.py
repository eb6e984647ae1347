"""Metrics of the replies of a step: rewards, lengths, and the sampler's work."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from tooln1.data import Rollout
from tooln1.grpo import equal_rewards
from tooln1.run.metrics import Metrics
from tooln1.sampler.scheduler import Stats


def add_reply_metrics(
    metrics: Metrics, rollouts: Sequence[Rollout], rewards: Tensor, measured: Iterable[Mapping[str, float]], ranks: int
) -> None:
    """Add metrics of all replies of a step; each of the `ranks` has all replies and adds the same.

    rewards: [N]. measured: the task's own metrics of this rank's part of the replies.
    """
    for values in measured:
        metrics.add_means({name: (value, 1) for name, value in values.items()})
    lengths = [len(rollout.reply) for rollout in rollouts]
    metrics.add_mean("reward", rewards.sum(), len(rollouts))
    metrics.add_mean("truncated_fraction", sum(not rollout.finished for rollout in rollouts), len(rollouts))
    metrics.add_mean("reply_tokens_mean", sum(lengths), len(rollouts))
    metrics.add("reply_tokens_min", "min", min(lengths))
    metrics.add("reply_tokens_max", "max", max(lengths))
    groups = torch.tensor([rollout.group for rollout in rollouts])
    metrics.add_mean("zero_variance_fraction", equal_rewards(rewards, groups).sum(), len(rollouts))
    metrics.add_tokens("rollout", sum(lengths) / ranks)  # summed over ranks again


def add_sampler_stats(metrics: Metrics, stats: Stats) -> None:
    """Add what this rank's sampler computed beside the reply tokens."""
    metrics.add("prompt_tokens_prefilled", "sum", stats.prefilled)
    metrics.add("tokens_recomputed", "sum", stats.recomputed)
    metrics.add("preemptions", "sum", stats.preemptions)
