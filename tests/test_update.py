"""The passes over packed batches against the released actor, step by step, and their invariances."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import reference
from safetensors.torch import load_file

from tooln1.batch import pack, plan_microbatches
from tooln1.data import Rollout
from tooln1.grpo import AGGREGATIONS, group_advantages, loss_total
from tooln1.model import load_model
from tooln1.update import (
    PolicyLoss,
    SupervisedLoss,
    add_logprobs,
    batch_logprobs,
    optimizer_step,
    scheduled_learning_rate,
)


def released_run():
    """The recorded run of the released actor: tensors, and its hyper-parameters with what each step did."""
    return load_file(reference("grpo/e2e_dev.safetensors")), json.loads(reference("grpo/e2e_dev.json").read_text())


def recorded_rollouts(tensors, it, hyper):
    """The padded batch of a recorded step as rollouts; 16 replies in groups of 4."""
    ids, mask = tensors[f"iter{it}.input_ids"], tensors[f"iter{it}.attention_mask"].bool()
    width, rollouts = hyper["prompt_len"], []
    groups = tensors[f"iter{it}.uid"].tolist()
    for row, group in enumerate(groups):
        prompt, reply = (
            part[keep].tolist()
            for part, keep in zip(
                ids[row].split([width, ids.shape[1] - width]),
                mask[row].split([width, ids.shape[1] - width]),
                strict=True,
            )
        )
        rollouts.append(Rollout(group, row, prompt, reply, [0.0] * len(reply), True))
    return rollouts


def test_three_steps_of_the_released_actor():
    """Log-probs, advantages, gradient norms, losses, metrics and final weights of the released code, our loss and
    optimizer step given its micro-batches and its learning rates (0 in the first step, which we do not copy)."""
    tensors, record = released_run()
    hyper = record["hyper"]
    model = load_model(reference(hyper["model"]))
    frozen = load_model(reference(hyper["model"])).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=hyper["betas"], eps=hyper["eps"], weight_decay=hyper["weight_decay"]
    )
    loss = PolicyLoss(
        temperature=hyper["temperature"],
        clip_low=hyper["clip_ratio"],
        clip_high=hyper["clip_ratio"],
        kl_coef=hyper["kl_loss_coef"],
        entropy_coef=hyper["entropy_coeff"],
        aggregation="microbatch_token_mean",
        chunk=7,
    )
    mini = hyper["ppo_mini_batch_size"]
    for it, did in enumerate(record["iters"]):
        rollouts = recorded_rollouts(tensors, it, hyper)
        rewards = tensors[f"iter{it}.token_level_rewards"].sum(-1)
        advantages = group_advantages(rewards, tensors[f"iter{it}.uid"])
        torch.testing.assert_close(advantages, tensors[f"iter{it}.advantages"][:, 0], atol=1e-4, rtol=1e-4)
        minibatches, entropy = [], []
        for number, partition in enumerate(did["micro_partitions_per_minibatch"]):
            rows = [[number * mini + i for i in part] for part in partition]
            filled, _ = add_logprobs(
                [pack(rollouts, part, advantages) for part in rows], model, frozen, hyper["temperature"], 7
            )
            for batch in filled:
                for ours, key in ((batch.old_logprobs, "old_log_probs"), (batch.ref_logprobs, "ref_log_prob")):
                    for row, values in zip(batch.rows, ours.split(list(batch.lengths)), strict=True):
                        want = tensors[f"iter{it}.{key}"][row, : len(values)]
                        torch.testing.assert_close(values, want, atol=1e-4, rtol=0)
            minibatches.append(filled)
        for number, (batches, theirs) in enumerate(zip(minibatches, did["minibatches"], strict=True)):
            counts = [len(batch.targets) for batch in batches]
            entropy += [batch_logprobs(model, b, 0.7, 7, True)[1].mean().item() for b in batches]
            result = optimizer_step(model, optimizer, batches, loss, mini, hyper["grad_clip"], theirs["lr"])
            assert result.applied
            assert result.grad_norm == pytest.approx(theirs["grad_norm_before_clip"], rel=1e-4)
            for ours, name in (("policy_loss", "actor/pg_loss"), ("clip_fraction", "actor/pg_clipfrac")):
                means = did["metrics"][name][number * len(counts) : (number + 1) * len(counts)]
                value = sum(mean * count for mean, count in zip(means, counts, strict=True))
                assert result.sums[ours] == pytest.approx((value, sum(counts)), rel=1e-3, abs=1e-3), name
            if (it, number) == (1, 0):
                scale = min(1.0, hyper["grad_clip"] / (result.grad_norm + 1e-6))
                for name, parameter in model.named_parameters():
                    want = tensors[f"grad_before_clip_iter1_mb0.{name}"]
                    assert (parameter.grad / scale - want).norm() <= 1e-4 * want.norm() + 1e-7, name
        assert entropy == pytest.approx(did["metrics"]["actor/entropy_loss"], rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), tensors[f"final.{name}"], atol=2e-4, rtol=0)
    moved = max((p - q).abs().max().item() for p, q in zip(model.parameters(), frozen.parameters(), strict=True))
    assert moved == pytest.approx(record["max_param_change"], rel=0.1)


def recorded_batches(
    budget=10_000, aggregation="token_mean", share=True, dtype=torch.float32, zeroed=frozenset(), left_out=frozenset()
):
    """A model, a mini-batch with ratios away from 1 and unequal lengths, and its total.

    zeroed: rows whose advantage is set to 0. left_out: rows that are not packed, though the total counts them.
    """
    tensors, record = released_run()
    rollouts = recorded_rollouts(tensors, 1, record["hyper"])
    if not share:  # every reply its own group: the prompt is repeated
        rollouts = [replace(rollout, group=row) for row, rollout in enumerate(rollouts)]
    advantages = tensors["iter1.advantages"][:, 0].clone()
    advantages[list(zeroed)] = 0
    batches, packed = [], [row for row in range(len(rollouts)) if row not in left_out]
    for rows in plan_microbatches(rollouts, packed, budget, 1)[0]:
        batch = pack(rollouts, rows, advantages)
        old, ref = (
            torch.cat([tensors[f"iter1.{key}"][row, :n] for row, n in zip(batch.rows, batch.lengths, strict=True)])
            for key in ("old_log_probs", "ref_log_prob")
        )
        noise = torch.cat([torch.linspace(-0.4, 0.4, n) for n in batch.lengths])
        batches.append(replace(batch, old_logprobs=(old + noise).to(dtype), ref_logprobs=ref.to(dtype)))
    total = loss_total(aggregation, [len(rollout.reply) for rollout in rollouts], 10)
    return load_model(reference(record["hyper"]["model"]), dtype), batches, total


def gradient(recorded, loss):
    """The result of one optimizer step that moves nothing, and the gradient as one vector."""
    model, batches, total = recorded
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    result = optimizer_step(model, optimizer, batches, loss, total, 1e9, 0.0)
    return result, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


CUTS = [  # aggregation, micro-batch budget, whether replies share their prompt, other settings of the loss
    *((how, 20, True, {}) for how in AGGREGATIONS if how != "microbatch_token_mean"),
    *(("token_mean", budget, share, {}) for budget, share in ((60, True), (10_000, False), (20, False))),
    ("sequence_mean_token_mean", 20, True, {"policy_loss": "gspo", "kl": "k2", "clip_low": 1e-8, "clip_high": 1e-8}),
    ("token_mean", 20, True, {"policy_loss": "cispo", "kl": "k1", "sampler_correction": "truncated"}),
    ("token_mean", 20, True, {"sampler_correction": "sequence_mask", "sampler_ratio_cap": 1e9}),
    ("token_mean", 20, True, {"old_logprobs": "sampler"}),
]


@pytest.mark.parametrize("aggregation,budget,share,options", CUTS)
def test_how_a_minibatch_is_cut_does_not_change_its_gradient(aggregation, budget, share, options):
    loss = PolicyLoss(aggregation=aggregation, entropy_coef=0.01, chunk=16, **options)
    double = dict(aggregation=aggregation, dtype=torch.float64)
    want, want_gradient = gradient(recorded_batches(**double), loss)
    got, got_gradient = gradient(recorded_batches(budget, share=share, **double), loss)
    assert want.sums["clip_fraction"][0] > 0  # some ratios are clipped
    assert got.loss == pytest.approx(want.loss, rel=1e-9)
    assert (got_gradient - want_gradient).norm() / want_gradient.norm() <= 1e-9
    for name, (value, count) in want.sums.items():
        assert got.sums[name] == pytest.approx((value, count), rel=1e-4)


def test_the_released_aggregation_does_depend_on_the_cut():
    """The counter-example that shows that the test above can fail."""
    loss = PolicyLoss(aggregation="microbatch_token_mean")
    _, one = gradient(recorded_batches(aggregation=loss.aggregation), loss)
    _, other = gradient(recorded_batches(20, loss.aggregation), loss)
    assert (one - other).norm() / one.norm() > 1e-3


@pytest.mark.parametrize("options", [{}, {"policy_loss": "gspo"}, {"policy_loss": "cispo"}])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_first_minibatch_needs_no_old_logprobs(options, recompute):
    """Bit for bit the same losses, metrics and weights with the policy's pass before the update and without it."""
    loss, results = PolicyLoss(sampler_correction="truncated", **options), []
    for with_old_pass in (True, False):
        model, batches, total = recorded_batches(40)
        for block in model.model.layers:
            block.recompute = recompute
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        batches, sums = add_logprobs(batches, model if with_old_pass else None, None, loss.temperature, loss.chunk)
        if not with_old_pass:
            batches = [replace(batch, old_logprobs=None) for batch in batches]
        result = optimizer_step(model, optimizer, batches, loss, total, 1.0, 1e-3)
        results.append((result.loss, result.grad_norm, {**sums, **result.sums}, list(model.parameters())))
    (*numbers, weights), (*others, other_weights) = results
    assert numbers == others and numbers[2]["entropy"][0] > 0
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


def test_the_samplers_logprobs_in_the_loss():
    """As weights of the policy's loss, or in the place of the old log-probs."""
    model, batches, total = recorded_batches()
    (batch,) = batches
    plain, want = gradient((model, batches, total), PolicyLoss(kl_coef=0.0))
    shifted = [replace(batch, sampler_logprobs=batch.old_logprobs - 0.4)]
    result, got = gradient((model, shifted, total), PolicyLoss(kl_coef=0.0, sampler_correction="truncated"))
    torch.testing.assert_close(got, want * torch.tensor(0.4).exp())
    assert result.sums["sampler_logprob_gap"][0] == pytest.approx(0.4 * len(batch.targets))
    assert result.loss == pytest.approx(plain.loss * 2.718281828**0.4, rel=1e-5)
    result, _ = gradient((model, shifted, total), PolicyLoss(sampler_correction="sequence_mask"))
    assert result.sums["policy_loss"][0] == 0  # 0.4 a token: over the cap for all replies
    swapped = [replace(batch, old_logprobs=None, sampler_logprobs=batch.old_logprobs)]
    _, got = gradient((model, swapped, total), PolicyLoss(kl_coef=0.0, old_logprobs="sampler"))
    torch.testing.assert_close(got, want)


@pytest.mark.slow
def test_compiled_layers_compute_the_same(monkeypatch):
    """Both parts of every layer traced for gradients (by aot_eager: what inductor makes of them is torch's matter)."""
    recorded = recorded_batches(45)
    model = recorded[0]
    _, want = gradient(recorded, PolicyLoss())
    traced = []
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: traced.append(f) or compile_(f, backend="aot_eager", **how))
    for block in model.model.layers:
        block.compile_parts()
    _, got = gradient(recorded, PolicyLoss())
    assert len(traced) == 2 * len(model.model.layers)
    assert (got - want).norm() / want.norm() <= 1e-5


def test_replies_without_advantage_have_no_policy_gradient():
    """What train.py leaves out when nothing but the policy term is trained."""
    still, loss = {0, 1, 2, 3, 9}, PolicyLoss(kl_coef=0.0)  # a whole group and one reply
    _, want = gradient(recorded_batches(30, dtype=torch.float64, zeroed=still), loss)
    _, got = gradient(recorded_batches(30, dtype=torch.float64, left_out=still), loss)
    assert (got - want).norm() / want.norm() <= 1e-9


def test_activation_checkpointing_and_idle_batches_change_nothing():
    loss = PolicyLoss()
    model, batches, total = recorded_batches(30)
    _, want = gradient((model, batches, total), loss)
    for block in model.model.layers:
        block.recompute = True
    idle, _ = add_logprobs([pack([], [], torch.zeros(0))], model, model, 0.7, 16)
    _, got = gradient((model, [*batches, *idle], total), loss)
    assert (got - want).norm() / want.norm() <= 1e-6


def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was():
    model, batches, total = recorded_batches()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer_step(model, optimizer, batches, PolicyLoss(), total, 1.0, 1e-3)
    weights = [parameter.clone() for parameter in model.parameters()]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    broken = [replace(batches[0], advantages=torch.full_like(batches[0].advantages, torch.nan))]
    result = optimizer_step(model, optimizer, broken, PolicyLoss(), total, 1.0, 1e-3)
    assert not result.applied and result.grad_norm != result.grad_norm
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, optimizer.state.values(), strict=True))
    assert optimizer_step(model, optimizer, batches, PolicyLoss(), total, 1.0, 1e-3).applied


def test_supervised_loss_is_the_mean_cross_entropy_of_the_replies():
    model, batches, _ = recorded_batches(30)
    total = sum(len(batch.targets) for batch in batches)
    got = sum(SupervisedLoss()(model, batch, total)[0].item() for batch in batches)
    logprobs = torch.cat([batch_logprobs(model, batch, 1.0, 64)[0] for batch in batches])
    assert got == pytest.approx(-logprobs.mean().item(), rel=1e-5)


def test_learning_rate_schedules():
    assert [scheduled_learning_rate(s, 10, 2.0, "constant", 0.0) for s in (0, 9)] == [2.0, 2.0]
    assert [scheduled_learning_rate(s, 10, 2.0, "constant", 0.2) for s in (0, 1, 2)] == [1.0, 2.0, 2.0]
    cosine = [scheduled_learning_rate(s, 10, 2.0, "cosine", 0.0) for s in range(10)]
    assert cosine[0] == 2.0 and cosine[5] == pytest.approx(1.0) and 0 < cosine[9] < 0.1
