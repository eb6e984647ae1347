"""The mathematics against reference values: the released Tool-N1 code (tn), verl (vm) and TRL (trl)."""

import json
from functools import cache

import pytest
import torch
from conftest import reference
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tooln1.grpo import (
    POLICY_LOSSES,
    SAMPLER_CORRECTIONS,
    aggregate,
    cispo_policy_loss,
    clipped_policy_loss,
    clipped_tokens,
    equal_rewards,
    group_advantages,
    k1_kl,
    k2_kl,
    k3_kl,
    loss_total,
    rows_to_train_on,
    token_logprobs,
)


@cache
def load(name):
    """Reference cases of a file: {case: {key: tensor or number}}."""
    tensors = load_file(reference(f"grpo/{name}.safetensors"))
    cases = json.loads(reference(f"grpo/{name}.json").read_text())
    cases = cases.get("cases", cases)
    for key, tensor in tensors.items():
        case, _, rest = key.partition("/")
        cases[case][rest] = tensor
    return cases


def names(name):
    return sorted(load(name))


def close(ours, theirs, rtol, atol=1e-12):
    torch.testing.assert_close(torch.as_tensor(ours).double(), torch.as_tensor(theirs).double(), rtol=rtol, atol=atol)


def graded(case, loss_of):
    """Loss and its gradient by the log-probs, zero outside the mask."""
    logprobs = case["in.logprobs"].clone().requires_grad_()
    loss = loss_of(logprobs)
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert (grad[case["in.mask"] == 0] == 0).all()
    return loss.detach(), grad


# ------------------------------------------------------------------------------------------------- advantages


def test_advantages_by_hand():
    advantages = group_advantages(torch.tensor([1.0, 0.0, 5.0, 5.0]), torch.tensor([7, 7, 8, 8]))
    torch.testing.assert_close(advantages, torch.tensor([0.5, -0.5, 0, 0]) / (0.5**0.5 + 1e-6))


def test_equal_rewards_give_exactly_zero_in_fp32():
    for reward, size in [(1.2, 6), (0.3, 8), (0.1, 5)]:
        assert (group_advantages(torch.full((size,), reward), torch.zeros(size, dtype=torch.int64)) == 0).all()


def test_far_from_the_reference_the_kl_has_no_gradient_rather_than_nan():
    logprobs = torch.tensor([-100.0, -200.0, 0.0], requires_grad=True)
    k3_kl(logprobs, torch.tensor([0.0, 0.0, -200.0])).sum().backward()
    assert logprobs.grad.tolist() == [0, 0, 0]


def test_a_group_of_one_keeps_its_reward_and_order_does_not_matter():
    advantages = group_advantages(torch.tensor([2.0], dtype=torch.float64), torch.tensor([3]))
    torch.testing.assert_close(advantages, torch.tensor([2.0 / (1 + 1e-6)], dtype=torch.float64))
    rewards, groups, order = torch.rand(12, dtype=torch.float64), torch.arange(12) % 4, torch.randperm(12)
    expected = group_advantages(rewards, groups)[order]
    torch.testing.assert_close(group_advantages(rewards[order], groups[order]), expected)


@pytest.mark.parametrize(
    ("kind", "solved_once", "of_two"),  # rewards 1, 0, 0, 0 and 3, 1
    [
        ("std", [1.5, -0.5, -0.5, -0.5], [0.5**0.5, -(0.5**0.5)]),
        ("mean", [0.75, -0.25, -0.25, -0.25], [1, -1]),
        ("leave_one_out", [1, -1 / 3, -1 / 3, -1 / 3], [2, -2]),
        ("max_rl", [3, -1, -1, -1], [0.5, -0.5]),
    ],
)
def test_kinds_of_advantages_by_hand(kind, solved_once, of_two):
    rewards = torch.tensor([1.0, 0, 0, 0, 3, 1, 0, 0, 5, 5], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3, 3])
    want = torch.tensor([*solved_once, *of_two, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, groups, kind=kind), want, rtol=1e-5, atol=0)


def test_groups_with_equal_rewards_are_trained_on_only_to_fill_up():
    rewards, groups = torch.tensor([1.0, 1, 0, 1, 0, 0, 1, 0]), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert equal_rewards(rewards, groups).tolist() == [True, True, False, False, True, True, False, False]
    assert rows_to_train_on(rewards, groups, 4) == [2, 3, 6, 7]
    assert rows_to_train_on(rewards, groups, 6) == [0, 1, 2, 3, 6, 7]


@pytest.mark.parametrize("name", names("dev"))
def test_advantages_equal_the_references(name):
    case = load("dev")[name]
    rewards, groups = case["in.token_level_rewards"].sum(-1), case["in.group_index"]
    mask = case["in.mask"].bool()

    def spread(advantages):
        return torch.where(mask, advantages[:, None], torch.zeros((), dtype=torch.float64))

    ours = spread(group_advantages(rewards, groups))
    close(ours, torch.where(mask, case["tn.advantages"], 0.0), 1e-7, 1e-9)
    close(ours, torch.where(mask, case["vm.advantages"], 0.0), 1e-7, 1e-9)
    unscaled = spread(group_advantages(rewards, groups, scale_by_std=False))
    close(unscaled, torch.where(mask, case["vm.advantages_nostd"], 0.0), 1e-7, 1e-9)
    if "trl.advantages.group" in case:
        rewards = case["in.rewards"]  # differs from the sum over tokens where a reply is empty
        close(group_advantages(rewards, groups, eps=1e-4), case["trl.advantages.group"], 1e-6, 1e-9)
        close(group_advantages(rewards, groups, scale_by_std=False), case["trl.advantages.none"], 1e-6, 1e-9)


# ------------------------------------------------------------------------------------------------- loss and KL


@pytest.mark.parametrize("name", names("dev"))
def test_loss_and_kl_of_the_released_code(name):
    case = load("dev")[name]
    mask, old, ref = case["in.mask"], case["in.old_logprobs"], case["in.ref_logprobs"]
    advantages = case["tn.advantages"]

    pg, grad_pg = graded(case, lambda x: aggregate(clipped_policy_loss(x, old, advantages), mask))
    kl, grad_kl = graded(case, lambda x: aggregate(k3_kl(x, ref), mask))
    close(pg, case["tn.pg_loss"], 1e-7)
    close(kl, case["tn.kl_loss"], 1e-7)
    close(grad_pg, case["tn.grad_pg"], 1e-7)
    close(grad_kl, case["tn.grad_kl"], 1e-7)
    policy, grad = graded(
        case, lambda x: aggregate(clipped_policy_loss(x, old, advantages) + 1e-3 * k3_kl(x, ref), mask)
    )
    close(policy, case["tn.policy_loss"], 1e-7)
    close(grad, case["tn.grad_policy"], 1e-7)
    clipped = aggregate(clipped_tokens(case["in.logprobs"], old, advantages).double(), mask)
    close(clipped, case["tn.pg_clipfrac"], 1e-6)
    close(aggregate(old - case["in.logprobs"], mask), case["tn.ppo_kl"], 1e-7)
    close(aggregate(case["in.entropy"], mask), case["tn.entropy_loss"], 1e-7)
    close(aggregate(k1_kl(case["in.logprobs"], ref), mask), case["tn.kl_mean.kl"], 1e-7)
    close(aggregate(k2_kl(case["in.logprobs"], ref), mask), case["tn.kl_mean.mse"], 1e-7)
    inside = mask.bool()
    close(k3_kl(case["in.logprobs"], ref)[inside], case["tn.kld_low_var"][inside], 1e-7)


@pytest.mark.parametrize("name", names("dev"))
def test_micro_batches_of_the_released_code(name):
    """Sum over micro-batches of (token mean · sequences / all sequences): the packing shows in the result."""
    case = load("dev")[name]
    if "tn.dyn_loss" not in case:
        pytest.skip("the released code cannot pack an empty reply")
    parts = [torch.tensor(part) for part in case["tn.dyn_partitions"]]

    def loss_of(x):
        values = clipped_policy_loss(x, case["in.old_logprobs"], case["tn.advantages"])
        values = values + 1e-3 * k3_kl(x, case["in.ref_logprobs"])
        total = len(case["in.mask"])
        return sum(aggregate(values[p], case["in.mask"][p], "microbatch_token_mean", total) for p in parts)

    loss, grad = graded(case, loss_of)
    close(loss, case["tn.dyn_loss"], 1e-7)
    close(grad, case["tn.dyn_grad"], 1e-7)


@pytest.mark.parametrize("name", names("dev"))
@pytest.mark.parametrize("clip", ["eps0.2", "eps0.2_0.28"])
def test_loss_of_verl(name, clip):
    case = load("dev")[name]
    high = 0.28 if clip.endswith("0.28") else 0.2
    mask, old, advantages = case["in.mask"], case["in.old_logprobs"], case["vm.advantages"]
    nonempty = (mask.sum(-1) > 0).sum()
    checked = 0
    for theirs, how, total in [
        ("token-mean", "token_mean", mask.sum()),
        ("seq-mean-token-sum", "sequence_mean_token_sum", nonempty),
        ("seq-mean-token-mean", "sequence_mean_token_mean", nonempty),
        ("seq-mean-token-sum-norm", "dr_grpo", mask.shape[1]),
    ]:
        key = f"vm.grad_pg.{theirs}.{clip}"
        if key not in case:
            continue
        loss, grad = graded(
            case,
            lambda x, how=how, total=total: aggregate(
                clipped_policy_loss(x, old, advantages, 0.2, high, dual_clip=3.0, max_log_ratio=20.0),
                mask,
                how,
                total,
            ),
        )
        close(loss, case[f"vm.pg_loss.{theirs}.{clip}"], 1e-7, 1e-9)
        close(grad, case[key], 1e-7, 1e-10)
        checked += 1
    assert checked
    kl, grad_kl = graded(case, lambda x: aggregate(k3_kl(x, case["in.ref_logprobs"], max_log_ratio=20.0), mask))
    close(kl, case["vm.kl_loss.token-mean"], 1e-7)
    close(grad_kl, case["vm.grad_kl.token-mean"], 1e-7)


@pytest.mark.parametrize("name", names("dev"))
def test_loss_of_trl(name):
    case = load("dev")[name]
    if "trl.loss.grpo.eps0.2" not in case:
        pytest.skip("no TRL values for this case")
    mask, old = case["in.mask"], case["in.old_logprobs"]
    advantages = case["trl.advantages_used"][:, None]
    count, cap = len(mask), case["trl.max_completion_length"]
    checked = 0
    for variant, high, beta in [("eps0.2", 0.2, 0.0), ("eps0.2_0.28_beta1e-3_plainkl", 0.28, 1e-3)]:
        for theirs, how, total in [
            ("grpo", "sequence_mean_token_mean", count),
            ("bnpo", "token_mean", mask.sum().clamp(min=1)),
            ("dr_grpo", "dr_grpo", count * cap),
            ("dapo", "token_mean", case["trl.num_items_in_batch"]),
        ]:
            key = f"trl.grad.{theirs}.{variant}"
            if key not in case:
                continue

            def loss_of(x, how=how, total=total, high=high, beta=beta):
                values = clipped_policy_loss(x, old, advantages, 0.2, high)
                return aggregate(values + beta * k3_kl(x, case["in.ref_logprobs"], max_kl=None), mask, how, total)

            loss, grad = graded(case, loss_of)
            close(loss, case[f"trl.loss.{theirs}.{variant}"], 1e-6, 1e-9)
            close(grad, case[key], 1e-6, 1e-10)
            checked += 1
    assert checked


OPTIONS = {  # TRL's name -> policy loss, clip_low, clip_high, correction, its cap, weight of the KL, aggregation
    "gspo.eps3e-4_4e-4": ("gspo", 3e-4, 4e-4, "off", 0, 0, "sequence_mean_token_mean"),
    "gspo.eps0.2": ("gspo", 0.2, 0.2, "off", 0, 0, "sequence_mean_token_mean"),
    "cispo.max5": ("cispo", 1, 4, "off", 0, 0, "token_mean"),
    "cispo.max1.28": ("cispo", 1, 0.28, "off", 0, 0, "token_mean"),
    "tis.token_truncate2.dapo": ("clipped", 0.2, 0.2, "truncated", 2, 0, "token_mean"),
    "tis.token_truncate2.dapo_beta1e-3": ("clipped", 0.2, 0.2, "truncated", 2, 1e-3, "token_mean"),
    "tis.sequence_mask3.dapo": ("clipped", 0.2, 0.2, "sequence_mask", 3, 0, "token_mean"),
    "tis.sequence_mask3.grpo": ("clipped", 0.2, 0.2, "sequence_mask", 3, 0, "sequence_mean_token_mean"),
}


@pytest.mark.parametrize("name", names("options_dev"))
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_trl(name, option):
    policy_loss, low, high, correction, cap, beta, how = OPTIONS[option]
    case, (level, loss_of) = load("options_dev")[name], POLICY_LOSSES[policy_loss]
    mask, advantages = case["in.mask"].bool(), case["in.adv"][:, None]
    logprobs = case["in.logp"].clone().requires_grad_()
    old, sampled, ref = (torch.where(mask, case[f"in.{key}"], 0.0) for key in ("old", "samp", "ref"))
    weights = SAMPLER_CORRECTIONS[correction](old - sampled, cap)
    values = weights * loss_of(level(logprobs, mask), level(old, mask), advantages, low, high)
    loss = aggregate(values + beta * k3_kl(logprobs, ref, max_kl=None), mask, how)
    (grad,) = torch.autograd.grad(loss, logprobs)
    close(loss.detach(), case[f"{option}.loss"], 1e-7)
    close(grad, case[f"{option}.grad"], 1e-7)
    if f"{option}.weight" in case:
        close(weights[mask], case[f"{option}.weight"][mask], 1e-7)


def test_options_by_hand():
    old, new = torch.tensor([[-2.0, -2.0, 9.0]]), torch.tensor([[-1.0, -2.5, -9.0]], requires_grad=True)
    mask, advantage = torch.tensor([[True, True, False]]), torch.tensor([[2.0]])
    level, loss_of = POLICY_LOSSES["gspo"]
    gspo = loss_of(level(new, mask), level(old, mask), advantage, 0.2, 0.3)
    torch.testing.assert_close(gspo, torch.full((1, 3), -2.0 * torch.e**0.25))  # mean of 1 and -0.5; below 1.3
    (grad,) = torch.autograd.grad(gspo[mask].mean(), new)
    torch.testing.assert_close(grad, torch.tensor([[-(torch.e**0.25), -(torch.e**0.25), 0.0]]))
    cispo, low = cispo_policy_loss(new, old, advantage, 0.5, 0.3)[mask], torch.e**-0.5
    torch.testing.assert_close(cispo, torch.tensor([-1.3 * 2 * -1.0, -low * 2 * -2.5]))
    (grad,) = torch.autograd.grad(cispo.sum(), new)
    torch.testing.assert_close(grad, torch.tensor([[-2.6, -2 * low, 0.0]]))  # the clip would leave the second only
    bounded = cispo_policy_loss(new, old, advantage, 0.2, 0.3)[mask]
    torch.testing.assert_close(bounded, torch.tensor([-1.3 * 2 * -1.0, -0.8 * 2 * -2.5]))
    log_ratio = torch.tensor([[1.0, -0.5, 0.0], [0.2, 0.1, 0.0]])
    truncated = torch.tensor([[2.0, torch.e**-0.5, 1.0], [torch.e**0.2, torch.e**0.1, 1.0]])
    torch.testing.assert_close(SAMPLER_CORRECTIONS["truncated"](log_ratio, 2.0), truncated)
    masked = torch.tensor([[0.0] * 3, [torch.e**0.3] * 3])
    torch.testing.assert_close(SAMPLER_CORRECTIONS["sequence_mask"](log_ratio, 1.5), masked)
    assert loss_total("token_mean", [], 8) == 1


@pytest.mark.parametrize("estimate", [k1_kl, k2_kl, k3_kl])
def test_kl_estimates_by_hand(estimate):
    d = torch.tensor([0.5, -1.0])
    want = {k1_kl: -d, k2_kl: d**2 / 2, k3_kl: d.exp() - d - 1}[estimate]
    torch.testing.assert_close(estimate(torch.tensor([-2.0, -1.0]), torch.tensor([-1.5, -2.0])), want)


def test_aggregations_by_hand():
    values = torch.tensor([[1.0, 2.0, torch.nan], [6.0, torch.inf, torch.nan]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert aggregate(values, mask).item() == 3.0
    assert aggregate(values, mask, "token_mean", 10).item() == pytest.approx(0.9)
    assert aggregate(values, mask, "sequence_mean_token_mean").item() == (1.5 + 6) / 2
    assert aggregate(values, mask, "sequence_mean_token_sum").item() == (3 + 6) / 2
    assert aggregate(values, mask, "dr_grpo").item() == 9 / 6
    assert aggregate(values, mask, "microbatch_token_mean", 8).item() == 3.0 * 2 / 8
    with pytest.raises(ValueError, match="unknown aggregation 'mean'"):
        aggregate(values, mask, "mean")


# ------------------------------------------------------------------------------------------------- log-probs


@pytest.mark.parametrize("name", names("logits_dev"))
@pytest.mark.parametrize("temperature", ["0.7", "1.0", "1.3"])
def test_logprobs_and_entropy_equal_the_references(name, temperature):
    """The reference logits are fed through a head that is the identity, so hidden states are logits."""
    case = load("logits_dev")[name]
    logits = case["logits"].double().flatten(0, 1).requires_grad_()
    head = torch.eye(logits.shape[1], dtype=torch.float64)
    labels, weights = case["labels"].flatten(), case["weights"].flatten()
    logprobs, entropy = token_logprobs(logits, head, labels, float(temperature), chunk=3)
    close(logprobs.detach(), case[f"T{temperature}.logprobs"].flatten(), 1e-9)
    close(entropy.detach(), case[f"T{temperature}.entropy"].flatten(), 1e-9)
    (by_logprobs,) = torch.autograd.grad((weights * logprobs).sum(), logits, retain_graph=True)
    (by_entropy,) = torch.autograd.grad((weights * entropy).sum(), logits)
    close(by_logprobs, case[f"T{temperature}.grad_wsum_logprobs"].flatten(0, 1), 1e-7, 1e-13)
    close(by_entropy, case[f"T{temperature}.grad_wsum_entropy"].flatten(0, 1), 1e-7, 1e-13)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_logprobs_are_differentiable_in_hidden_and_head(chunk):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (7,), generator=generator)
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, targets, 0.7, chunk), (hidden, head))
    plain = torch.log_softmax(hidden @ head.T / 0.7, -1)[range(7), targets]
    ours, none = token_logprobs(hidden, head, targets, 0.7, chunk, with_entropy=False)
    close(ours.detach(), plain.detach(), 1e-12)
    assert none is None


def test_only_a_chunk_of_logits_is_in_memory():
    """No operation makes more than the logits of a chunk, and for the backward pass much less than all are kept."""
    tokens, vocabulary, chunk, made, kept = 256, 1024, 16, [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(tensor.numel() for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor))
            return out

    hidden = torch.randn(tokens, 8, requires_grad=True)
    head = torch.randn(vocabulary, 8, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64)
    with Watch(), saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        logprobs, entropy = token_logprobs(hidden, head, targets, 0.7, chunk)
        (logprobs.sum() + entropy.sum()).backward()
    assert max(made) == chunk * vocabulary
    assert sum(kept) < tokens * vocabulary / 10


def test_ids_beyond_the_vocabulary_are_as_if_they_were_not_there():
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 6, generator=generator, dtype=torch.float64).requires_grad_() for n in (9, 14))
    targets = torch.randint(0, 11, (9,), generator=generator)
    results = []
    for rows, vocabulary in ((head, 11), (head[:11], None)):
        logprobs, entropy = token_logprobs(hidden, rows, targets, 0.7, 4, vocabulary=vocabulary)
        gradients = torch.autograd.grad((logprobs * logprobs + entropy).sum(), (hidden, head))
        results.append((logprobs, entropy, *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not results[0][3][11:].any()
