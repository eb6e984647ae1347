"""Packing: the worked example, plans that fit, and shared prompts that change nothing."""

from dataclasses import replace

import pytest
import torch
from conftest import reference

from tooln1.attention import FlexPackedAttention, PackedAttention, Segment, attention
from tooln1.batch import pack, plan_microbatches, split_into_minibatches
from tooln1.data import Rollout
from tooln1.grpo import token_logprobs
from tooln1.model import load_model


def rollout(group, sample, prompt, reply):
    return Rollout(group, sample, list(prompt), list(reply), [0.0] * len(reply), True)


def random_rollouts(seed=0, groups=5, size=3, vocab=200, longest=12):
    generator = torch.Generator().manual_seed(seed)

    def tokens():
        length = int(torch.randint(1, longest, (1,), generator=generator))
        return torch.randint(0, vocab, (length,), generator=generator)

    prompts = [tokens().tolist() for _ in range(groups)]
    return [rollout(g, s, prompts[g], tokens().tolist()) for g in range(groups) for s in range(size)]


def test_the_worked_example_of_the_docstring():
    a, b, c, d, e, f, g = range(10, 17)
    rollouts = [rollout(0, 0, [a, b], [c, d]), rollout(0, 1, [a, b], [e]), rollout(1, 0, [f], [g])]
    batch = pack(rollouts, [0, 1, 2], torch.tensor([1.0, -1.0, 0.5]))
    assert batch.tokens.tolist() == [a, b, c, d, e, f, g]
    assert batch.positions.tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert batch.segments == (Segment(0, 2, (2, 1)), Segment(5, 1, (1,)))
    assert batch.targets.tolist() == [c, d, e, g]
    assert batch.predictors.tolist() == [1, 2, 1, 5]
    assert batch.lengths == (2, 1, 1) and batch.rows == (0, 1, 2)
    assert batch.advantages.tolist() == [1.0, -1.0, 0.5]


def test_no_rows_give_one_idle_token():
    batch = pack([], [], torch.zeros(0))
    assert batch.tokens.tolist() == [0] and len(batch.targets) == 0 and batch.segments == (Segment(0, 1, ()),)


def test_minibatches_are_whole_groups_without_the_replies_that_are_masked():
    rollouts = [rollout(group, sample, [1], [2]) for group in range(4) for sample in range(2)]
    rollouts = [replace(one, finished=row not in (1, 4, 5)) for row, one in enumerate(rollouts)]
    assert split_into_minibatches(rollouts, range(8), 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert split_into_minibatches(rollouts, [2, 3, 6, 7], 1) == [[2, 3], [6, 7]]
    assert split_into_minibatches(rollouts, range(8), 2, mask_truncated=True) == [[0, 2, 3], [6, 7]]
    assert split_into_minibatches(rollouts, range(8), 1, mask_truncated=True) == [[0], [2, 3], [], [6, 7]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("budget", [1, 20, 45, 10_000])
def test_a_plan_holds_every_row_once_within_the_budget(ranks, budget):
    rollouts = random_rollouts()
    rows = list(range(3, len(rollouts)))
    shares = plan_microbatches(rollouts, rows, budget, ranks)
    assert len(shares) == ranks and len({len(share) for share in shares}) == 1
    assert sorted(row for share in shares for micro in share for row in micro) == rows
    for micro in (micro for share in shares for micro in share):
        batch = pack(rollouts, micro, torch.zeros(len(rollouts)))
        assert len(batch.tokens) <= budget or len(micro) <= 1
    assert shares == plan_microbatches(rollouts, rows, budget, ranks)


def test_micro_batches_that_run_in_step_cost_about_the_same():
    rollouts = random_rollouts(groups=64, longest=40)
    shares = plan_microbatches(rollouts, list(range(len(rollouts))), 400, 4)
    for step in zip(*shares, strict=True):
        sizes = [len(pack(rollouts, micro, torch.zeros(len(rollouts))).tokens) for micro in step]
        assert max(sizes) <= 1.2 * min(sizes)


def test_a_group_over_a_ranks_share_of_the_tokens_is_split():
    """One of 190 tokens and three of 40, on four ranks: 77 tokens each, and so two replies in a piece."""
    members = [(0, sample) for sample in range(6)] + [(1, 0), (2, 0), (3, 0)]
    rollouts = [rollout(group, sample, [1] * 10, [2] * 30) for group, sample in members]
    shares = plan_microbatches(rollouts, list(range(9)), 1000, 4)
    assert sorted(len(pack(rollouts, micro, torch.zeros(9)).tokens) for (micro,) in shares) == [70, 70, 80, 110]


def test_long_prompts_count_by_their_pairs_too():
    """One prompt of 100 tokens is dearer than two of 50: with a pair at a tenth of a token, as dear as five."""
    lengths = [100] * 2 + [50] * 10
    rollouts = [Rollout(i, 0, [1] * (n - 1), [2], [0.0], True) for i, n in enumerate(lengths)]

    def costs(pair_cost):
        shares = plan_microbatches(rollouts, list(range(len(rollouts))), 1000, 2, pair_cost)
        return [sum(lengths[row] + 0.1 * lengths[row] ** 2 / 2 for row in share[0]) for share in shares]

    assert max(costs(0.1)) <= 1.02 * min(costs(0.1))
    assert sum(costs(0.0)) == pytest.approx(sum(costs(0.1)))


def logprobs_and_gradients(model, batches):
    model.zero_grad(set_to_none=True)
    by_row = {}
    for batch in batches:
        hidden = model(batch.tokens, batch.positions, PackedAttention(batch.segments, "cpu"))
        logprobs, _ = token_logprobs(hidden[batch.predictors], model.head, batch.targets, 0.7, chunk=16)
        by_row.update(zip(batch.rows, logprobs.split(list(batch.lengths)), strict=True))
        weights = torch.cat(
            [
                torch.linspace(0.5, 1.5, n, dtype=torch.float64) * (r + 1)
                for r, n in zip(batch.rows, batch.lengths, strict=True)
            ]
        )
        (logprobs * weights).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    return torch.cat([by_row[row] for row in sorted(by_row)]).detach(), gradient


@pytest.mark.parametrize("name", ["llama31_orig64_untied_fp32", "qwen3_4x2_tied_bf16"])
def test_shared_prompts_give_the_logprobs_and_gradients_of_separate_sequences(name):
    model = load_model(reference(f"models/dev/{name}"), torch.float64)
    rollouts = random_rollouts(vocab=model.config.vocab_size)
    zeros = torch.zeros(len(rollouts))
    separate = [pack(rollouts, [row], zeros) for row in range(len(rollouts))]
    shared = [pack(rollouts, list(range(len(rollouts))), zeros)]
    cut = [pack(rollouts, rows, zeros) for rows in plan_microbatches(rollouts, list(range(len(rollouts))), 30, 1)[0]]
    want, want_gradient = logprobs_and_gradients(model, separate)
    for batches in (shared, cut):
        got, gradient = logprobs_and_gradients(model, batches)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
        assert (gradient - want_gradient).norm() / want_gradient.norm() <= 1e-9


def segments_of(*groups):
    """Groups (prompt, replies) one after another."""
    segments, start = [], 0
    for prompt, replies in groups:
        segments.append(Segment(start, prompt, replies))
        start += prompt + sum(replies)
    return tuple(segments), start


def by_the_definition(segments, q, k, v):
    """One mask for the whole stream: same group, the prompt or the own reply, not later."""
    group = torch.tensor([g for g, s in enumerate(segments) for _ in range(s.prompt + sum(s.replies))])
    reply = torch.tensor([r for s in segments for r, n in enumerate((s.prompt, *s.replies)) for _ in range(n)])
    mask = (group[:, None] == group) & ((reply == 0) | (reply[:, None] == reply))
    return attention(q[None], k[None], v[None], mask.tril())[0]


def queries_keys_values(tokens, dim=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, heads, dim, generator=generator, dtype=torch.float64) for heads in (6, 2, 2)]


@pytest.mark.parametrize("bundle", [1, 6, 640])
def test_packed_attention_equals_one_mask_for_the_whole_stream(monkeypatch, bundle):
    monkeypatch.setattr("tooln1.attention.MAX_BUNDLE_TOKENS", bundle)
    segments, total = segments_of((7, (3, 1, 5, 2)), (1, (4,)), (12, ()), (3, (1, 1, 9)))
    qkv = [x.requires_grad_() for x in queries_keys_values(total)]
    got, want = PackedAttention(segments, "cpu")(0, *qkv), by_the_definition(segments, *qkv)
    torch.testing.assert_close(got, want)
    weight = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
    gradients = [torch.autograd.grad((out * weight).sum(), qkv) for out in (got, want)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_flex_attention_equals_packed_attention():
    """The CUDA path's block mask and padding, compiled for the CPU (forward only: there is no backward there)."""
    groups = ((300, (50, 70, 20)), (5, (3,)), (130, (200, 1, 300)), (40, ()), (700, (30,) * 6), (1, (1, 1)))
    segments, total = segments_of(*groups)
    q, k, v = (x.float() for x in queries_keys_values(total, 32))
    flex = FlexPackedAttention(segments, torch.device("cpu"))
    assert flex.length % 4096 == 0 and flex.mask.kv_num_blocks.sum() < 0.15 * (flex.length // 128) ** 2
    try:
        with torch.no_grad():
            got = flex(0, q, k, v)
    except torch._inductor.exc.InductorError as error:  # there is no C++ compiler
        pytest.skip(f"torch.compile does not work here: {error}")
    torch.testing.assert_close(got, PackedAttention(segments, "cpu")(0, q, k, v), atol=2e-6, rtol=0)
