"""The update engine: old and reference log-probs and one optimizer step, the prompt shared, repeated, and padded.

    python perf/update.py                     # a model of 25M parameters, three forms in turns
    python perf/update.py --compile           # each layer's parts compiled, as train.py --compile

Prompts of ~728 tokens, five replies of ~105 (lognormal, to three times that). Prints a table and one JSON line.
perf/gpu.py times the update on a GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from shapes import lognormal_lengths, machine, print_table, small

from tooln1.attention import attention
from tooln1.batch import PackedBatch, pack, plan_microbatches
from tooln1.data import Rollout
from tooln1.grpo import clipped_policy_loss, k3_kl, token_logprobs
from tooln1.io.model_config import pair_cost
from tooln1.model import Transformer, random_model
from tooln1.update import PolicyLoss, add_logprobs, optimizer_step

GROUP, PROMPT, REPLY, CHUNK = 5, 728, 105, 512
LOSS = PolicyLoss(kl_coef=1e-3, chunk=CHUNK)


def random_rollouts(
    count: int, vocab: int, prompt: int = PROMPT, reply: int = REPLY
) -> tuple[list[Rollout], torch.Tensor]:
    """`count` groups of random tokens, of `prompt` and `reply` tokens in the mean, and random advantages."""
    rng = random.Random(0)
    lengths = lognormal_lengths(rng, count, prompt, 0.5, 3 * prompt)
    rollouts = []
    for group, length in enumerate(lengths):
        tokens = [rng.randrange(vocab) for _ in range(length)]
        for sample, own in enumerate(lognormal_lengths(rng, GROUP, reply, 0.6, 3 * reply)):
            rollouts.append(
                Rollout(group, sample, tokens, [rng.randrange(vocab) for _ in range(own)], [0.0] * own, True)
            )
    return rollouts, torch.randn(len(rollouts), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------ three forms


def packed(rollouts: Sequence[Rollout], advantages: torch.Tensor, budget: int, model: Transformer) -> list[PackedBatch]:
    """Micro-batches as train.py makes them."""
    shares = plan_microbatches(rollouts, list(range(len(rollouts))), budget, 1, pair_cost(model.config))[0]
    return [pack(rollouts, rows, advantages, model.head.device) for rows in shares]


def step_on(model: Transformer, reference: Transformer, optimizer, batches: list[PackedBatch], total: int) -> float:
    """Old and reference log-probs, then one optimizer step; the gradient's norm."""
    filled, _ = add_logprobs(batches, model, reference, LOSS.temperature, CHUNK)
    return optimizer_step(model, optimizer, filled, LOSS, total, 1e9, 0.0).grad_norm


def padded_logprobs(model: Transformer, rollouts: Sequence[Rollout], length: int) -> torch.Tensor:
    """Log-probs of the reply tokens from whole sequences, each padded to `length`: what a plain trainer does."""
    rows = len(rollouts)
    tokens = torch.zeros(rows, length, dtype=torch.int64)  # [B, T]
    for line, rollout in zip(tokens, rollouts, strict=True):
        line[: len(rollout.prompt) + len(rollout.reply)] = torch.tensor(rollout.prompt + rollout.reply)

    def attend(layer, q, k, v):
        q, k, v = (x.unflatten(0, (rows, length)) for x in (q, k, v))
        return attention(q, k, v, causal=True).flatten(0, 1)  # padding stands behind every real token

    positions = torch.arange(length).repeat(rows)
    hidden = model(tokens.flatten(), positions, attend).unflatten(0, (rows, length))
    ends = [len(r.prompt) + len(r.reply) - 1 for r in rollouts]
    predictors = torch.cat([row[end - len(r.reply) : end] for row, end, r in zip(hidden, ends, rollouts, strict=True)])
    targets = torch.tensor([token for r in rollouts for token in r.reply])
    return token_logprobs(predictors, model.head, targets, LOSS.temperature, CHUNK, False)[0]


def padded_step(model, reference, optimizer, rollouts, advantages, total, budget: int) -> float:
    """The same step on sequences padded to the longest of the mini-batch, as many at once as the budget holds."""
    length = max(len(r.prompt) + len(r.reply) for r in rollouts)
    at_once = max(1, budget // length)
    micro = [range(start, min(start + at_once, len(rollouts))) for start in range(0, len(rollouts), at_once)]
    own = {rows: [rollouts[i] for i in rows] for rows in micro}
    with torch.no_grad():
        frozen = {rows: [padded_logprobs(m, own[rows], length) for m in (model, reference)] for rows in micro}

    def loss_of(policy: Transformer, rows: range, total: float) -> tuple[torch.Tensor, dict]:
        logprobs, (old, ref) = padded_logprobs(policy, own[rows], length), frozen[rows]
        advantage = advantages[list(rows)].repeat_interleave(torch.tensor([len(r.reply) for r in own[rows]]))
        losses = clipped_policy_loss(logprobs, old, advantage) + LOSS.kl_coef * k3_kl(logprobs, ref)
        return losses.sum() / total, {}

    return optimizer_step(model, optimizer, micro, loss_of, total, 1e9, 0.0).grad_norm


def cpu(prompts: int, budget: int, repeats: int, compile_parts: bool) -> dict:
    """Shared prompts, repeated prompts and padded sequences in turns: seconds, and how much slower than shared."""
    model, reference = random_model(small(), 0), random_model(small(), 1).requires_grad_(False)
    if compile_parts:
        for block in model.model.layers:
            block.compile_parts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    rollouts, advantages = random_rollouts(prompts, model.config.vocab_size)
    alone = [replace(rollout, group=row) for row, rollout in enumerate(rollouts)]
    total = sum(len(rollout.reply) for rollout in rollouts)
    shared = packed(rollouts, advantages, budget, model)
    repeated = packed(alone, advantages, budget, model)
    longest = max(len(r.prompt) + len(r.reply) for r in rollouts)
    forms = {
        "shared": lambda: step_on(model, reference, optimizer, shared, total),
        "repeated": lambda: step_on(model, reference, optimizer, repeated, total),
        "padded": lambda: padded_step(model, reference, optimizer, rollouts, advantages, total, budget),
    }
    tokens = {"shared": sum(len(b.tokens) for b in shared), "repeated": sum(len(b.tokens) for b in repeated)}
    tokens["padded"] = len(rollouts) * longest
    forms["shared"]()
    times: dict[str, list[float]] = {name: [] for name in forms}
    norms = {}
    for _ in range(repeats):
        for name, work in forms.items():
            start = time.perf_counter()
            norms[name] = work()
            times[name].append(time.perf_counter() - start)
    assert all(abs(norm / norms["shared"] - 1) < 1e-4 for norm in norms.values()), norms
    pairs = {name: zip(times["shared"], times[name], strict=True) for name in forms}
    slower = {name: statistics.median(b / a for a, b in pairs[name]) for name in forms}
    rows = [("form", "tokens in the stream", "s", "times shared")]
    rows += [(name, tokens[name], statistics.median(times[name]), slower[name]) for name in forms]
    print_table(rows)
    return {"tokens": tokens, "seconds": times, "times_shared": slower, "grad_norm": norms}


def main() -> None:
    """Time, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=6, help="groups in the mini-batch")
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a micro-batch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    print(f"{machine()}; torch {torch.__version__}")
    result = cpu(args.prompts, args.budget, args.repeats, args.compile)
    print(json.dumps({"machine": machine(), "torch": torch.__version__} | vars(args) | result))


if __name__ == "__main__":
    main()
