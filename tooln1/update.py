"""The passes over packed batches: log-probs without gradients, and one optimizer step over micro-batches.

The denominators are arguments: each micro-batch returns a sum over its tokens divided by the count of the whole
global mini-batch, gradients are summed over micro-batches and ranks, so the step is the same however it was cut.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tooln1.attention import packed_attention
from tooln1.batch import PackedBatch, pad_to_rows
from tooln1.distributed import Reduce, full_tensor, local_reduce, next_microbatch, reshard
from tooln1.grpo import (
    KL_ESTIMATES,
    POLICY_LOSSES,
    SAMPLER_CORRECTIONS,
    aggregate,
    clipped_tokens,
    token_logprobs,
)
from tooln1.model import Transformer

Sums = dict[str, tuple[float, float]]
"""Name of a metric -> (sum, count) over this rank's tokens."""


def batch_logprobs(
    model: Transformer, batch: PackedBatch, temperature: float, chunk: int, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probability [N] of the batch's reply tokens under `model` at `temperature`, and their entropy [N]."""
    attend = packed_attention(batch.segments, batch.tokens.device, batch.attention)
    hidden = model(batch.tokens, batch.positions, attend)  # [T, C]
    return token_logprobs(
        hidden[batch.predictors], model.head, batch.targets, temperature, chunk, with_entropy, model.vocabulary
    )


@torch.no_grad()
def add_logprobs(
    batches: Sequence[PackedBatch],
    policy: Transformer | None,
    reference: Transformer | None,
    temperature: float,
    chunk: int,
    before_each: Callable[[], None] = lambda: None,
) -> tuple[list[PackedBatch], Sums]:
    """The batches with `old_logprobs`, given a policy, and `ref_logprobs`, given a reference; and the policy's entropy.

    before_each: is called before each batch; what it raises, on all ranks alike, ends the pass.
    """
    filled, entropy_sum, tokens = list(batches), 0.0, 0
    if policy is not None:
        for i, batch in enumerate(filled):
            before_each()
            old, entropy = batch_logprobs(policy, batch, temperature, chunk, with_entropy=True)
            filled[i] = replace(batch, old_logprobs=old)
            entropy_sum += entropy.sum().item()
            tokens += len(old)
        reshard(policy)
    if reference is not None:
        for i, batch in enumerate(filled):
            before_each()
            filled[i] = replace(batch, ref_logprobs=batch_logprobs(reference, batch, temperature, chunk)[0])
        reshard(reference)
    return filled, {"entropy": (entropy_sum, tokens)}


@dataclass(frozen=True)
class PolicyLoss:
    """GRPO's loss of one micro-batch (Eq. 3): clipped policy term + kl_coef · KL - entropy_coef · entropy.

    A batch without `old_logprobs` takes this pass's own, so that rho is 1 with the gradient of log pi: those of the
    policy as it sampled in a step's first mini-batch. With old_logprobs "sampler" the ratio has the sampler's in their
    place, and "sampler_logprob_gap" includes what the step's earlier updates changed. No `ref_logprobs`: no KL term.
    """

    temperature: float = 0.7
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0  # 0: off
    kl_coef: float = 1e-3
    entropy_coef: float = 0.0
    aggregation: str = "token_mean"
    chunk: int = 1024  # rows of logits alive at a time
    policy_loss: str = "clipped"  # a row of POLICY_LOSSES
    kl: str = "k3"  # a row of KL_ESTIMATES
    sampler_correction: str = "off"  # a row of SAMPLER_CORRECTIONS
    sampler_ratio_cap: float = 2.0
    old_logprobs: str = "policy"  # "sampler": the ratio's denominator is what the sampler says

    def __call__(self, policy: Transformer, batch: PackedBatch, total: float) -> tuple[Tensor, Sums]:
        """The loss, a scalar whose sum over micro-batches and ranks is the mini-batch's; and sums for the log."""
        unchanged = batch.old_logprobs is None
        with_entropy = unchanged or self.entropy_coef != 0
        logprobs, entropy = batch_logprobs(policy, batch, self.temperature, self.chunk, with_entropy)
        before = logprobs.detach() if unchanged else batch.old_logprobs
        sums = {"sampler_logprob_gap": _sum((before - batch.sampler_logprobs).abs())}
        sums |= {"entropy": _sum(entropy)} if unchanged else {}
        logprobs, mask = pad_to_rows(logprobs, batch.lengths)  # [R, longest], as all below
        before, sampled = (pad_to_rows(values, batch.lengths)[0] for values in (before, batch.sampler_logprobs))
        level, loss = POLICY_LOSSES[self.policy_loss]
        new, old = level(logprobs, mask), level(sampled if self.old_logprobs == "sampler" else before, mask)
        against = (old, batch.advantages[:, None], self.clip_low, self.clip_high)
        weights = SAMPLER_CORRECTIONS[self.sampler_correction](before - sampled, self.sampler_ratio_cap)
        values = weights * loss(new, *against, self.dual_clip)
        sums |= {"policy_loss": _sum(values[mask]), "clip_fraction": _sum(clipped_tokens(new, *against)[mask].float())}
        if batch.ref_logprobs is not None:
            kl = KL_ESTIMATES[self.kl](logprobs, pad_to_rows(batch.ref_logprobs, batch.lengths)[0])
            sums["kl"] = _sum(kl[mask])
            values = values + self.kl_coef * kl
        if self.entropy_coef:
            values = values - self.entropy_coef * pad_to_rows(entropy, batch.lengths)[0]
        return aggregate(values, mask, self.aggregation, total), sums


@dataclass(frozen=True)
class SupervisedLoss:
    """Cross-entropy of the reply tokens: the mean over the whole global mini-batch."""

    chunk: int = 1024

    def __call__(self, policy: Transformer, batch: PackedBatch, total: float) -> tuple[Tensor, Sums]:
        """The loss, a scalar whose sum over micro-batches and ranks is the mini-batch's; and sums for the log."""
        logprobs, _ = batch_logprobs(policy, batch, 1.0, self.chunk)
        return -logprobs.sum() / total, {"cross_entropy": _sum(-logprobs)}


def _sum(values: Tensor) -> tuple[float, float]:
    return values.detach().sum().item(), float(values.numel())


def scheduled_learning_rate(step: int, steps: int, peak: float, schedule: str, warmup_ratio: float) -> float:
    """Learning rate of `step` (from 0) of `steps`: linear warm-up to `peak`, then "constant" or "cosine" to 0."""
    warmup = int(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: float  # of the whole mini-batch, the parts of all ranks added up
    grad_norm: float  # global, before clipping
    applied: bool  # False: loss or gradient was not finite, and the weights are as before
    sums: Sums


def optimizer_step(
    policy: Transformer,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    loss_of: Callable[[Transformer, PackedBatch, float], tuple[Tensor, Sums]],
    total: float,
    max_grad_norm: float,
    learning_rate: float,
    reduce: Reduce = local_reduce,
    before_each: Callable[[], None] = lambda: None,
) -> StepResult:
    """Accumulate the gradients of all micro-batches, clip their global norm, step.

    A loss or gradient that is not finite on any rank leaves weights and Adam state untouched on all of them. `reduce`
    adds up numbers over the ranks. `before_each` is called before each micro-batch; what it raises, on all ranks alike,
    leaves them untouched, too: after `reshard` they can be saved, but the gradients that are left spoil a next step.
    """
    optimizer.zero_grad(set_to_none=True)
    loss_sum, sums = 0.0, {}
    for i, batch in enumerate(batches):
        before_each()
        next_microbatch(policy, last=i == len(batches) - 1)
        loss, parts = loss_of(policy, batch, total)
        loss.backward()
        loss_sum += loss.item()
        for name, (value, count) in parts.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + value, before[1] + count)
    parameters = [parameter for parameter in policy.parameters() if parameter.grad is not None]
    norm = full_tensor(torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters]))
    (loss_sum,) = reduce([loss_sum], "sum")
    applied = math.isfinite(loss_sum) and math.isfinite(norm.item())  # both are global: every rank decides alike
    if applied:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    return StepResult(loss_sum, norm.item(), applied, sums)
