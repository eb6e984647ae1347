"""Run by test_distributed.py under torchrun: optimizer steps on fixed rollouts, sharded over the ranks.

    recorded_steps.py MODEL OUT.json STEPS BUDGET [save=FOLDER | load=CHECKPOINT | bf16 | thrifty | lora] [hybrid]

Rank 0 writes loss and gradient norm of each step, the share of ratios beyond the clip, the first gradient, the
weights and what one sampling call gave. With bf16 the passes compute in it, on fp32 masters, and blocks are
recomputed, as on a GPU; thrifty recomputes blocks and cuts weights and gradients up after every micro-batch; lora
trains fp32 adapters on frozen bf16 weights; hybrid takes the ranks for nodes of two.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tooln1.batch import pack, plan_microbatches
from tooln1.data import Rollout
from tooln1.distributed import copy_weights, full_tensor, launch, shard
from tooln1.lora import TARGETS, add_adapters, reset_adapters, trained_parameters
from tooln1.model import load_model, load_weights, meta_model
from tooln1.run.checkpoint import load_checkpoint, save_checkpoint
from tooln1.sampler.distributed import generate_distributed
from tooln1.sampler.sampler import Sampler
from tooln1.update import PolicyLoss, batch_logprobs, optimizer_step


def rollouts_of(seed: int, groups: int = 5, size: int = 3) -> list[Rollout]:
    """Random groups of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(longest: int) -> list[int]:
        length = int(torch.randint(1, longest, (1,), generator=generator))
        return torch.randint(0, 255, (length,), generator=generator).tolist()

    prompts = [tokens(30) for _ in range(groups)]
    return [
        Rollout(g, s, prompts[g], reply, [0.0] * len(reply), True)
        for g in range(groups)
        for s in range(size)
        for reply in [tokens(20)]
    ]


def noisy(batch, model, seed):
    """Old and reference log-probs around those of `model`, the same for a reply in any packing: ratios on both sides
    of the clip."""
    with torch.no_grad():
        start = batch_logprobs(model, batch, 0.7, 64)[0].split(list(batch.lengths))
    old, ref = [torch.zeros(0)], [torch.zeros(0)]
    for row, logprobs in zip(batch.rows, start, strict=False):
        generator = torch.Generator().manual_seed(1000 * seed + row)
        old.append(logprobs + 0.3 * torch.randn(len(logprobs), generator=generator))
        ref.append(logprobs + 0.3 * torch.randn(len(logprobs), generator=generator))
    return replace(batch, old_logprobs=torch.cat(old), ref_logprobs=torch.cat(ref))


def main() -> None:
    path, out, steps, budget = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    words = [*sys.argv[5:], ""]
    action, _, folder = words[0].partition("=")
    hybrid = "hybrid" in words
    if hybrid:
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    with launch("cpu") as world:
        start, policy = load_model(path), meta_model(path, torch.bfloat16 if action == "lora" else torch.float32)
        if action == "lora":
            add_adapters(policy, 4, 8.0, TARGETS, 0)
        for block in policy.model.layers:
            block.recompute = action in ("bf16", "thrifty")
        low = torch.bfloat16 if action in ("bf16", "lora") else None
        policy = shard(policy, world, low, accumulate_unsharded=action != "thrifty", hybrid=hybrid)
        reset_adapters(load_weights(policy, "cpu"), 0)
        target = load_model(path)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
        record = {"loss": [], "grad_norm": [], "clipped": []}
        for step in range(steps):
            rollouts = rollouts_of(step)
            advantages = torch.randn(len(rollouts), generator=torch.Generator().manual_seed(step))
            shares = plan_microbatches(rollouts, list(range(len(rollouts))), budget, world.size)[world.rank]
            batches = [noisy(pack(rollouts, share, advantages), start, step) for share in shares]
            total = sum(len(rollout.reply) for rollout in rollouts)
            loss = PolicyLoss(kl_coef=0.1, entropy_coef=0.01)
            result = optimizer_step(policy, optimizer, batches, loss, total, 1.0, 1e-4)
            if step == 0:
                gradients = [full_tensor(p.grad).flatten() for p in trained_parameters(policy).values()]
                record["gradient"] = torch.cat(gradients).tolist()
            record["loss"].append(world.all_reduce([result.loss], "sum")[0])
            record["grad_norm"].append(result.grad_norm)
            clipped, count = world.all_reduce(result.sums["clip_fraction"], "sum")
            record["clipped"].append(clipped / count)
        assert all(parameter.dtype == torch.float32 for parameter in trained_parameters(policy).values())
        copy_weights(policy, target)
        record["weights"] = [p.flatten().tolist() for p in target.parameters()]
        prompts = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15]]
        sampled = generate_distributed(
            Sampler(target, [3]),
            world,
            prompts,
            keys=[4, 3, 2, 1, 0],
            group_size=2,
            temperature=0.7,
            max_new_tokens=12,
            seed=1,
        )
        record["replies"] = [[r.group, r.sample, r.reply] for r in sampled]
        if action == "save":
            save_checkpoint(Path(folder), steps, policy, optimizer, world, {})
        elif action == "load":
            record["resumed"] = load_checkpoint(Path(folder), policy, optimizer).step
            copy_weights(policy, target)
            record["weights"] = [p.flatten().tolist() for p in target.parameters()]
        if action in ("save", "load"):
            record["moments"] = [full_tensor(s["exp_avg_sq"]).flatten().tolist() for s in optimizer.state.values()]
        if world.is_main:
            with open(out, "w") as file:
                json.dump(record, file)


if __name__ == "__main__":
    main()
