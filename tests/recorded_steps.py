"""Run by test_distributed.py under torchrun: optimizer steps on fixed rollouts, sharded over the ranks.

    recorded_steps.py MODEL OUT.json STEPS BUDGET

Prints nothing; rank 0 writes loss and gradient norm of each step, what one sampling call gave, and the weights' sum.
"""

import json
import sys
from dataclasses import replace

import torch

from tooln1.batch import pack, plan
from tooln1.checkpoint import load_checkpoint, save_checkpoint
from tooln1.distributed import copy_weights, launch, sample_everywhere, shard
from tooln1.model import load_model
from tooln1.rollout import Rollout, Sampler
from tooln1.update import PolicyLoss, optimizer_step


def rollouts_of(seed: int, groups: int = 5, size: int = 3) -> list[Rollout]:
    """Random groups of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(longest: int) -> list[int]:
        length = int(torch.randint(1, longest, (1,), generator=generator))
        return torch.randint(0, 255, (length,), generator=generator).tolist()

    prompts = [tokens(30) for _ in range(groups)]
    return [Rollout(g, s, prompts[g], reply, [0.0] * len(reply), True)
            for g in range(groups) for s in range(size) for reply in [tokens(20)]]  # fmt: skip


def noisy(batch, seed):
    """Old and reference log-probs that give ratios on both sides of the clip, the same for a reply in any packing."""
    old, ref = [], []
    for row, length in zip(batch.rows, batch.lengths, strict=True):
        generator = torch.Generator().manual_seed(1000 * seed + row)
        old.append(-2 + torch.randn(length, generator=generator))
        ref.append(-2 + torch.randn(length, generator=generator))
    empty = [torch.zeros(0)]
    return replace(batch, old_logprobs=torch.cat(old or empty), ref_logprobs=torch.cat(ref or empty))


def main() -> None:
    path, out, steps, budget = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    with launch("cpu") as world:
        policy = shard(load_model(path), world)
        target = load_model(path)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
        record = {"loss": [], "grad_norm": []}
        for step in range(steps):
            rollouts = rollouts_of(step)
            advantages = torch.randn(len(rollouts), generator=torch.Generator().manual_seed(step))
            shares = plan(rollouts, list(range(len(rollouts))), budget, world.size)[world.rank]
            batches = [noisy(pack(rollouts, share, advantages), step) for share in shares]
            total = sum(len(rollout.reply) for rollout in rollouts)
            loss = PolicyLoss(kl_coef=0.1, entropy_coef=0.01)
            result = optimizer_step(policy, optimizer, batches, loss, total, 1.0, 1e-3)
            record["loss"].append(world.reduce([result.loss], "sum")[0])
            record["grad_norm"].append(result.grad_norm)
        copy_weights(policy, target)
        record["weights"] = [p.double().sum().item() for p in target.parameters()]
        prompts = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15]]
        sampled = sample_everywhere(Sampler(target, [3]), world, prompts, keys=[4, 3, 2, 1, 0], group_size=2,
                                    temperature=0.7, max_new_tokens=12, seed=1)  # fmt: skip
        record["replies"] = [[r.group, r.sample, r.reply] for r in sampled]
        if len(sys.argv) > 5:
            action, folder = sys.argv[5].split("=")
            from pathlib import Path

            if action == "save":
                save_checkpoint(Path(folder), steps, policy, optimizer, world, keep=2)
            else:
                record["resumed"] = load_checkpoint(Path(folder), policy, optimizer, world)
                copy_weights(policy, target)
                record["weights"] = [p.double().sum().item() for p in target.parameters()]
                record["moments"] = [
                    getattr(s["exp_avg_sq"], "full_tensor", lambda s=s: s["exp_avg_sq"])().double().sum().item()
                    for s in optimizer.state.values()
                ]
        if world.main:
            with open(out, "w") as file:
                json.dump(record, file)


if __name__ == "__main__":
    main()
