"""The mathematics of GRPO, pure: advantages, token log-probabilities, clipped loss, KL, aggregation.

Symbols follow the Tool-N1 paper (arXiv 2505.00024), Eq. 3 and 4. For each prompt the policy writes a group of G
replies with rewards r_1 .. r_G:

    A_i      = (r_i - mean r) / (std r + eps)                         group_advantages
    rho_t    = pi(token_t) / pi_old(token_t)                          token_logprobs, then exp of the difference
    L_t      = -min(rho_t A, clip(rho_t, 1 - eps_low, 1 + eps_high) A)   clipped_policy_loss
    k3_t     = exp(d) - d - 1,  d = log pi_ref - log pi               k3_kl
    loss     = sum over reply tokens of (L_t + beta k3_t) / total     aggregate

What other papers put in place of a line is a row of a table: ADVANTAGES, POLICY_LOSSES, KL_ESTIMATES, AGGREGATIONS, and
SAMPLER_CORRECTIONS, weights that the paper does not have. The first row of each is the paper's.

Where paper and released code (NVlabs/Tool-N1, a verl fork) leave room or differ, this file does the following:
  * std is unbiased (n - 1), eps 1e-6, as the code; a group of one gets its reward as its advantage, as the code.
    A group whose rewards are all equal gets exactly 0 here; the code's fp32 mean can leave rounding noise that its
    small eps blows up (reward 1.2, G = 6: |A| = 0.1).
  * The KL is against the frozen initial model, as the code; the paper's Eq. 3 prints pi_old.
  * The default denominator is the number of reply tokens in the whole global mini-batch, so that micro-batches,
    packing and world size cannot change the gradient. The code averages tokens per micro-batch and weighs by
    sequences, which depends on the packing; it is here as "microbatch_token_mean".
  * The learning rate is constant from the first step on. The code's scheduler gives 0 in the first rollout step
    (its four optimizer steps only fill the Adam moments); that is not reproduced.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# --------------------------------------------------------------------------------------------------- advantages


ADVANTAGES: dict[str, Callable[..., Tensor]] = {  # of r - mean, the group's mean, std and n, each [N], and eps
    "std": lambda centred, mean, std, n, eps: centred / (std + eps),
    "mean": lambda centred, mean, std, n, eps: centred,
    "leave_one_out": lambda centred, mean, std, n, eps: centred * n / (n - 1).clamp(min=1),
    "max_rl": lambda centred, mean, std, n, eps: torch.where(mean > 0, centred / mean, 0.0),
}


def group_advantages(
    rewards: Tensor, groups: Tensor, eps: float = 1e-6, scale_by_std: bool = True, kind: str = "std"
) -> Tensor:
    """Advantage of each reply within its group of n, `kind` being a row of ADVANTAGES.

      std            (r - mean) / (std + eps)   Eq. 4, std unbiased: all groups with unequal rewards weigh alike
      mean           r - mean                   Dr. GRPO (arXiv 2503.20783): nearly solved, nearly hopeless ones less
      leave_one_out  (r - mean) n / (n - 1)     RLOO (arXiv 2402.14740), r - mean of the others: for small groups
      max_rl         (r - mean) / mean          MaxRL (arXiv 2602.02710), 0 unless mean > 0: rarely solved ones most

    rewards [N] and groups [N] int (equal numbers share a prompt, in any order) -> [N], in the dtype of `rewards` or,
    where that is an integer, fp32.
    `scale_by_std=False` is the kind "mean". A group of one keeps its reward: mean 0, std 1.

    >>> group_advantages(torch.tensor([1.0, 0.0, 5.0, 5.0]), torch.tensor([7, 7, 8, 8]))
    tensor([ 0.7071, -0.7071,  0.0000,  0.0000])
    """
    if rewards.shape != groups.shape or rewards.dim() != 1:
        raise ValueError(f"rewards {tuple(rewards.shape)} and groups {tuple(groups.shape)} must both be [N]")
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    rewards = rewards.to(at_least_fp32(dtype))
    _, index = torch.unique(groups, return_inverse=True)
    size = torch.bincount(index)[index].to(rewards)  # [N] members of each reply's group
    mean = _group_sum(rewards, index) / size
    is_singleton = size == 1
    centred = torch.where(equal_rewards(rewards, groups), 0.0, rewards - mean)
    centred = torch.where(is_singleton, rewards, centred)
    std = (_group_sum(centred.square(), index) / (size - 1).clamp(min=1)).sqrt()
    std = torch.where(is_singleton, torch.ones_like(std), std)
    return ADVANTAGES[kind if scale_by_std else "mean"](centred, mean, std, size, eps).to(dtype)


def equal_rewards(rewards: Tensor, groups: Tensor) -> Tensor:
    """[N] bool: whether all replies of a reply's group got one reward, so that the group has no policy gradient."""
    _, index = torch.unique(groups, return_inverse=True)
    rewards = rewards.to(at_least_fp32(rewards.dtype))
    return _group_max(rewards, index) == -_group_max(-rewards, index)


def rows_to_train_on(rewards: Tensor, groups: Tensor, count: int) -> list[int]:
    """`count` rows of [N], in order: of the groups with unequal rewards and, as far as these do not do, of others."""
    unequal_first = equal_rewards(rewards, groups).int().argsort(stable=True)
    return sorted(unequal_first[:count].tolist())


def _group_sum(values: Tensor, index: Tensor) -> Tensor:
    sums = torch.zeros(int(index.max()) + 1, dtype=values.dtype, device=values.device)
    return sums.index_add_(0, index, values)[index]


def _group_max(values: Tensor, index: Tensor) -> Tensor:
    start = torch.full((int(index.max()) + 1,), -torch.inf, dtype=values.dtype, device=values.device)
    return start.scatter_reduce_(0, index, values, "amax")[index]


# --------------------------------------------------------------------------------------------------- log-probs


class _ChunkedLogprobs(torch.autograd.Function):
    """Log-probability and entropy of softmax(hidden @ headᵀ / temperature), a few rows of logits alive at a time.

    With z the tempered logits, p = softmax(z), H the entropy:  d logp / d z = onehot - p,  d H / d z = -p (log p + H).
    The backward pass recomputes p, chunk by chunk, and sums the head's gradient in at least fp32.
    """

    @staticmethod
    def forward(ctx, hidden, head, targets, temperature, chunk, with_entropy, vocabulary):
        logprobs = torch.empty(len(targets), dtype=at_least_fp32(hidden.dtype), device=hidden.device)
        entropy = torch.empty_like(logprobs) if with_entropy else None
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            logp = _tempered_log_softmax(hidden[rows], head, temperature, vocabulary)  # [chunk, V]
            logprobs[rows] = logp.gather(1, targets[rows, None])[:, 0]
            if with_entropy:
                entropy[rows] = -(logp.exp() * logp).sum(-1)
        ctx.save_for_backward(hidden, head, targets, entropy)
        ctx.temperature, ctx.chunk, ctx.vocabulary = temperature, chunk, vocabulary
        ctx.set_materialize_grads(False)  # a result nobody used then costs nothing
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, head, targets, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_head = None  # of a frozen one
        if ctx.needs_input_grad[1]:
            grad_head = torch.zeros(head.shape, dtype=at_least_fp32(head.dtype), device=head.device)
        for start in range(0, len(targets), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logp = _tempered_log_softmax(hidden[rows], head, ctx.temperature, ctx.vocabulary)
            p = logp.exp()
            grad = torch.zeros_like(p)
            if grad_logprobs is not None:
                grad = (-p * grad_logprobs[rows, None]).scatter_add_(1, targets[rows, None], grad_logprobs[rows, None])
            if grad_entropy is not None:
                grad -= p * (logp + entropy[rows, None]) * grad_entropy[rows, None]
            grad = (grad / ctx.temperature).to(hidden.dtype)  # [chunk, V]
            grad_hidden[rows] = grad @ head
            if grad_head is not None:
                grad_head += grad.T @ hidden[rows]
        return grad_hidden, None if grad_head is None else grad_head.to(head.dtype), None, None, None, None, None


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _tempered_log_softmax(hidden: Tensor, head: Tensor, temperature: float, vocabulary: int | None) -> Tensor:
    logits = F.linear(hidden, head).to(at_least_fp32(hidden.dtype)) / temperature
    return F.log_softmax(mask_padded_vocab(logits, vocabulary), dim=-1)


def mask_padded_vocab(logits: Tensor, vocabulary: int | None) -> Tensor:
    """`logits` [N, V], those of ids from `vocabulary` on (None: of none) overwritten in place: their probability is 0.

    Overwritten, not cut off: matrix products like V as it is, a multiple of 64. Not with -inf, whose product with a
    probability of 0 has no value.
    """
    if vocabulary is not None and vocabulary < logits.shape[-1]:
        logits[:, vocabulary:] = torch.finfo(logits.dtype).min / 2
    return logits


def token_logprobs(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk: int = 1024,
    with_entropy: bool = True,
    vocabulary: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target token and entropy of its distribution, both at `temperature`.

    hidden [N, C] (the state that predicts the token), head [V, C], targets [N] int64 -> (logprobs [N], entropy [N])
    in at least fp32; entropy is None without `with_entropy`. Logits are divided by the temperature first, as in
    sampling; only [chunk, V] of them exist at a time, and the backward pass recomputes them. Ids from `vocabulary` on
    (None: of none) have probability 0. Both results are differentiable. Raises ValueError for a temperature that is
    not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}: a greedy choice has no log-probability")
    return _ChunkedLogprobs.apply(hidden, head, targets, temperature, chunk, with_entropy, vocabulary)


# --------------------------------------------------------------------------------------------------- loss


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    max_log_ratio: float | None = None,
) -> Tensor:
    """Per-token PPO loss (Eq. 3): -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), any shape, elementwise.

    `advantages` broadcasts against the log-probs. `dual_clip` c bounds the loss of a negative advantage at -c A
    (verl's dual clip, off in the paper); `max_log_ratio` clamps log rho to +-that (verl main: 20; off in the paper).
    """
    log_ratio = logprobs - old_logprobs
    if max_log_ratio is not None:
        log_ratio = log_ratio.clamp(-max_log_ratio, max_log_ratio)
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip:
        loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * dual_clip), loss)
    return loss


def cispo_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float, _: float = 0.0
) -> Tensor:
    """Per-token CISPO loss: -sg(clip(rho, 1 - clip_low, 1 + clip_high)) A log pi, any shape; sg stops the gradient.

    MiniMax-M1 (arXiv 2506.13585), Eq. 4 and 5, run without a lower bound (clip_low 1); TRL has clip_high 4. For several
    optimizer steps a rollout: rare tokens keep their gradient, which the clip would take away. No dual clip: the ratio
    is bounded as it is.
    """
    ratio = (logprobs - old_logprobs).exp().clamp(1 - clip_low, 1 + clip_high)
    return -ratio.detach() * advantages * logprobs


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Values [N, R] with each token's replaced by the mean over its sequence's tokens, those under mask [N, R]."""
    sums = torch.where(mask, values, torch.zeros_like(values)).sum(-1, keepdim=True)
    return (sums / mask.sum(-1, keepdim=True).clamp(min=1)).expand_as(values)


POLICY_LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[..., Tensor]]] = {
    "clipped": (lambda logprobs, mask: logprobs, clipped_policy_loss),
    "gspo": (sequence_mean, clipped_policy_loss),
    "cispo": (lambda logprobs, mask: logprobs, cispo_policy_loss),
}
"""Name -> (which log-probs are compared: a function of log-probs and mask [N, R]; their loss).

  clipped  rho_t of each token                        Eq. 3
  gspo     exp(mean over the sequence of log rho_t)   GSPO (arXiv 2507.18071), Eq. 5 and 7: long replies, mixtures of
           experts. Wants clip_low 3e-4, clip_high 4e-4, aggregation "sequence_mean_token_mean", no KL
  cispo    rho_t as a constant weight                 see `cispo_policy_loss`
"""


def clipped_tokens(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """True where the clip took the gradient away (CISPO: bounded it): rho too high with A > 0, too low with A < 0."""
    ratio = (logprobs - old_logprobs).exp()
    return (-advantages * ratio.clamp(1 - clip_low, 1 + clip_high)) > (-advantages * ratio)


def k3_kl(
    logprobs: Tensor, ref_logprobs: Tensor, max_log_ratio: float | None = None, max_kl: float | None = 10.0
) -> Tensor:
    """Per-token k3 estimate of KL(pi || pi_ref): exp(d) - d - 1 with d = log pi_ref - log pi, >= 0, any shape.

    `max_kl` clamps the value to +-that, with no gradient beyond (the released code: 10; None: plain k3, as TRL);
    `max_log_ratio` clamps d first (verl main: 20).
    """
    d = ref_logprobs - logprobs
    if max_log_ratio is None and max_kl is not None:
        max_log_ratio = 20.0 + max_kl  # far beyond what max_kl lets through; keeps exp, and so the gradient, finite
    if max_log_ratio is not None:
        d = d.clamp(-max_log_ratio, max_log_ratio)
    k3 = d.exp() - d - 1
    return k3 if max_kl is None else k3.clamp(-max_kl, max_kl)


KL_ESTIMATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k3": k3_kl,
    "k2": lambda logprobs, ref_logprobs: (ref_logprobs - logprobs).square() / 2,
    "k1": lambda logprobs, ref_logprobs: logprobs - ref_logprobs,
}
"""Name -> estimate of KL(pi || pi_ref), token by token, with d = log pi_ref - log pi: Schulman, "Approximating KL
divergence" (2020).

  k3  exp(d) - d - 1  the paper's: unbiased, >= 0, little variance
  k2  d² / 2          biased; but its gradient is that of the KL in expectation, which k3's is only near pi_ref
  k1  -d              unbiased, to measure with: its gradient is 0 in expectation, so as a loss it only adds noise
"""


def _sequence_mask(log_ratio: Tensor, cap: float) -> Tensor:
    weights = log_ratio.sum(-1, keepdim=True).exp().expand_as(log_ratio)
    return torch.where(weights <= cap, weights, 0.0)


SAMPLER_CORRECTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "off": lambda log_ratio, cap: torch.ones_like(log_ratio),
    "truncated": lambda log_ratio, cap: log_ratio.exp().clamp(max=cap),
    "sequence_mask": _sequence_mask,
}
"""Name -> weight of each token's policy loss, a function of log(pi_old / pi_sampler) [N, R], 0 beside the tokens.

  truncated      min(pi_old / pi_sampler, cap), token by token: Yao et al., "Your efficient RL framework secretly brings
                 you off-policy RL training" (2025). For a sampler that computes otherwise than the trainer: see
                 sampler_logprob_gap in the metrics
  sequence_mask  pi_old / pi_sampler of the whole reply, 0 where above cap: Liu et al., "When speed kills stability"
                 (2025). For short replies; long ones soon lie above the cap
"""


AGGREGATIONS = ("token_mean", "microbatch_token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum", "dr_grpo")


def aggregate(values: Tensor, mask: Tensor, how: str = "token_mean", total: float | Tensor | None = None) -> Tensor:
    """Sum per-token values [N, R] under mask [N, R] into one number; `total` is the denominator.

    The trainer hands in the `total` of the whole global mini-batch, so the results of its micro-batches add up; None
    takes this call's own. Values outside the mask may be anything, NaN included.

      token_mean                sum / tokens                                     total: tokens           (default)
      microbatch_token_mean     (sum / own tokens) * own sequences / sequences   total: sequences        (released)
      sequence_mean_token_mean  sum of each sequence's mean / sequences          total: sequences        (GRPO, TRL)
      sequence_mean_token_sum   sum of each sequence's sum / sequences           total: sequences
      dr_grpo                   sum / (sequences * cap on reply tokens)          total: that product     (Dr.GRPO)
    """
    if how not in AGGREGATIONS:
        raise ValueError(f"unknown aggregation {how!r}; one of {', '.join(AGGREGATIONS)}")
    mask = mask.bool()
    values = torch.where(mask, values, torch.zeros_like(values))
    tokens = mask.sum(-1)  # [N]
    if total is None:
        total = {"token_mean": tokens.sum().clamp(min=1), "dr_grpo": mask.numel()}.get(how, len(mask))
    if how == "sequence_mean_token_mean":
        return (values.sum(-1) / tokens.clamp(min=1)).sum() / total
    if how == "microbatch_token_mean":
        return values.sum() / tokens.sum().clamp(min=1) * len(mask) / total
    return values.sum() / total


def loss_total(how: str, lengths: list[int], max_reply_tokens: int) -> int:
    """The denominator that `aggregate` wants for a whole mini-batch of replies with these lengths (in tokens)."""
    totals = {"token_mean": sum(lengths), "dr_grpo": len(lengths) * max_reply_tokens}
    return max(1, totals.get(how, len(lengths)))  # 0 where `mask_truncated` leaves no reply
