"""The update engine: old and reference log-probs and one optimizer step, the prompt shared, repeated, and padded.

    python perf/update.py                     # on the CPU: a model of 25M parameters, three forms in turns
    python perf/update.py --device cuda       # Qwen2.5 shapes, random weights: FLOP utilisation and memory
    python perf/update.py --compile           # each layer's parts compiled, as train.py --compile

Prompts of ~728 tokens, five replies of ~105 (lognormal, to three times that). Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from shapes import lognormal_lengths, machine, print_table, qwen2p5, small

from tooln1.attention import attention
from tooln1.batch import PackedBatch, pack, plan_microbatches
from tooln1.data import Rollout
from tooln1.distributed import launch, shard
from tooln1.grpo import token_logprobs
from tooln1.io.model_config import pair_cost
from tooln1.model import Transformer, random_model
from tooln1.update import PolicyLoss, add_logprobs, optimizer_step

GROUP, PROMPT, REPLY, CHUNK = 5, 728, 105, 512
LOSS = PolicyLoss(kl_coef=1e-3, chunk=CHUNK)


def random_rollouts(prompts: int, vocab: int, seed: int = 0) -> tuple[list[Rollout], torch.Tensor]:
    """`prompts` groups of random tokens and random advantages."""
    rng = random.Random(seed)
    lengths = lognormal_lengths(rng, prompts, PROMPT, 0.5, 3 * PROMPT)
    rollouts = []
    for group, length in enumerate(lengths):
        prompt = [rng.randrange(vocab) for _ in range(length)]
        for sample, own in enumerate(lognormal_lengths(rng, GROUP, REPLY, 0.6, 3 * REPLY)):
            reply = [rng.randrange(vocab) for _ in range(own)]
            rollouts.append(Rollout(group, sample, prompt, reply, [0.0] * own, True))
    return rollouts, torch.randn(len(rollouts), generator=torch.Generator().manual_seed(seed))


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
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    for line, rollout in zip(tokens, rollouts, strict=True):
        line[: len(rollout.prompt) + len(rollout.reply)] = torch.tensor(rollout.prompt + rollout.reply)
    tokens = tokens.to(model.head.device)  # [B, T]

    def attend(layer, q, k, v):
        q, k, v = (x.unflatten(0, (rows, length)) for x in (q, k, v))
        return attention(q, k, v, causal=True).flatten(0, 1)  # padding stands behind every real token

    positions = torch.arange(length, device=tokens.device).repeat(rows)
    hidden = model(tokens.flatten(), positions, attend).unflatten(0, (rows, length))
    predictors = torch.cat(
        [hidden[i, len(r.prompt) - 1 : len(r.prompt) + len(r.reply) - 1] for i, r in enumerate(rollouts)]
    )
    targets = torch.tensor([token for r in rollouts for token in r.reply], device=tokens.device)
    return token_logprobs(predictors, model.head, targets, LOSS.temperature, CHUNK, False)[0]


def padded_step(model, reference, optimizer, rollouts, advantages, total, budget: int) -> float:
    """The same step on sequences padded to the longest of the mini-batch, as many at once as the budget holds."""
    length = max(len(r.prompt) + len(r.reply) for r in rollouts)
    at_once = max(1, budget // length)
    micro = [range(start, min(start + at_once, len(rollouts))) for start in range(0, len(rollouts), at_once)]
    with torch.no_grad():
        old, ref = (
            [padded_logprobs(m, [rollouts[i] for i in rows], length) for rows in micro] for m in (model, reference)
        )
    optimizer.zero_grad(set_to_none=True)
    for rows, before, frozen in zip(micro, old, ref, strict=True):
        own = [rollouts[i] for i in rows]
        logprobs = padded_logprobs(model, own, length)
        lengths = torch.tensor([len(r.reply) for r in own], device=logprobs.device)
        advantage = advantages[list(rows)].to(logprobs.device).repeat_interleave(lengths)
        ratio = (logprobs - before).exp()
        gap = frozen - logprobs
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) + 1e-3 * (gap.exp() - gap - 1)
        (loss.sum() / total).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    optimizer.step()
    return norm


def seconds(work: Callable[[], float]) -> tuple[float, float]:
    """(wall-clock, result) of a call."""
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


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
            took, norms[name] = seconds(work)
            times[name].append(took)
    assert all(abs(norm / norms["shared"] - 1) < 1e-4 for norm in norms.values()), norms
    slower = {
        name: statistics.median(b / a for a, b in zip(times["shared"], times[name], strict=True)) for name in forms
    }
    rows = [("form", "tokens in the stream", "s", "times shared")]
    rows += [(name, tokens[name], statistics.median(times[name]), slower[name]) for name in forms]
    print_table(rows)
    return {
        "parameters": model.config.num_parameters,
        "prompts": prompts,
        "budget": budget,
        "compiled": compile_parts,
        "tokens": tokens,
        "seconds": times,
        "times_shared": slower,
        "grad_norm": norms,
    }


# ------------------------------------------------------------------------------------------------ CUDA


def flops(config, batches: Sequence[PackedBatch]) -> float:
    """Of one update with recomputed layers: forward twice, and the backward pass, which is two forwards more."""
    head = config.vocab_size * config.hidden_size
    blocks = config.num_parameters - head * (1 if config.tie_word_embeddings else 2)
    tokens, targets = (sum(len(x) for x in xs) for xs in zip(*((b.tokens, b.targets) for b in batches), strict=True))
    pairs = sum(s.prompt**2 / 2 + sum(s.prompt * r + r * r / 2 for r in s.replies) for b in batches for s in b.segments)
    queries = config.num_attention_heads * config.head_dim
    forward = 2 * blocks * tokens + 4 * queries * config.num_hidden_layers * pairs + 2 * head * targets
    return 4 * forward


def cuda(sizes: Sequence[str], budget: int, compile_parts: bool) -> dict:
    """Per size: tokens/s, share of the measured matmul rate on executed and on unshared FLOPs, peak memory."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    a @ b
    rate = 2 * 8192**3 / statistics.median(seconds(lambda: a @ b)[0] for _ in range(20))
    print(f"bf16 matrix product: {rate / 1e12:.0f} TFLOP/s")
    rows = [("size", "phase", "tokens/s", "of matmul rate", "effective", "peak GiB")]
    with launch("cuda") as world:
        for size in sizes:
            rows += [(size, *row) for row in cuda_phases(qwen2p5(size), world, budget, compile_parts, rate)]
            torch.cuda.empty_cache()
    print_table(rows)
    return {"matmul_flops_per_s": rate, "budget": budget, "compiled": compile_parts, "rows": rows}


def cuda_phases(config, world, budget: int, compile_parts: bool, rate: float) -> list[tuple]:
    """Log-probs without gradients, and one update, of two micro-batches: a row of the table each."""
    policy = random_model(config, 0, device="cuda")
    for block in policy.model.layers:
        block.recompute = True
        if compile_parts:
            block.compile_parts()
    policy = shard(policy, world, torch.bfloat16)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, fused=True)
    rollouts, advantages = random_rollouts(2 * max(1, budget // (PROMPT + GROUP * REPLY)), 150_000)
    shares = plan_microbatches(rollouts, list(range(len(rollouts))), budget, 1, pair_cost(config))[0]
    batches = [pack(rollouts, rows, advantages, "cuda") for rows in shares]
    alone = [replace(rollout, group=row) for row, rollout in enumerate(rollouts)]
    apart = [pack(alone, rows, advantages) for rows in plan_microbatches(alone, list(range(len(alone))), budget, 1)[0]]
    total = sum(len(rollout.reply) for rollout in rollouts)
    filled, _ = add_logprobs(batches, policy, None, LOSS.temperature, CHUNK)
    filled = [replace(batch, ref_logprobs=batch.old_logprobs) for batch in filled]
    phases = {
        "log-probs": (1 / 4, lambda: add_logprobs(batches, policy, None, LOSS.temperature, CHUNK)),
        "update": (1, lambda: optimizer_step(policy, optimizer, filled, LOSS, total, 1.0, 0.0)),
    }
    rows, tokens = [], sum(len(batch.tokens) for batch in batches)
    for phase, (part, run) in phases.items():
        run()
        torch.cuda.reset_peak_memory_stats()
        took = statistics.median(seconds(run)[0] for _ in range(3))
        done, unshared = (part * flops(config, some) / took / rate for some in (batches, apart))
        rows.append((phase, tokens / took, done, unshared, torch.cuda.max_memory_allocated() / 2**30))
    return rows


def main() -> None:
    """Time, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prompts", type=int, default=6, help="groups in the mini-batch (CPU)")
    parser.add_argument("--budget", type=int, help="tokens of a micro-batch (4096; on CUDA 30720)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", default=["1.5B", "3B"])
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    print(f"{machine()}; torch {torch.__version__}")
    if args.device == "cuda":
        result = cuda(args.sizes, args.budget or 30720, args.compile)
    else:
        result = cpu(args.prompts, args.budget or 4096, args.repeats, args.compile)
    print(json.dumps({"machine": machine(), "torch": torch.__version__} | result))


if __name__ == "__main__":
    main()
