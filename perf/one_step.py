"""One GRPO step of a real Qwen2.5 shape with random weights: does it run, how long, how much memory?

    python perf/one_step.py --config DIR --tokenizer DIR --data train.jsonl [--prompts 2] [--replies 2] [--tokens 16]

DIR of --config holds a published config.json (Qwen2.5-0.5B-Instruct, say), --tokenizer the published tokenizer;
--data is Example JSONL as `python -m tooln1.prepare` writes it. No weights are needed: they are random. Prints a
table and one JSON line; the peak is the whole process (resident set), the device's own peak beside it on a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tooln1.batch import pack, plan_microbatches
from tooln1.data import read_examples
from tooln1.distributed import copy_weights, launch, shard
from tooln1.grpo import group_advantages
from tooln1.model import random_model, read_config
from tooln1.prompt import build_messages
from tooln1.sampler.sampler import Sampler
from tooln1.tokenizer import load_tokenizer
from tooln1.update import PolicyLoss, add_logprobs, optimizer_step


def main() -> None:
    """Sample, score at random, update, copy the weights; time each phase."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--replies", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16, help="cap on a reply")
    parser.add_argument("--budget", type=int, default=4096, help="tokens per micro-batch")
    args = parser.parse_args()

    seconds: dict[str, float] = {}
    with launch("auto") as world:

        def timed(phase, work):
            start = time.perf_counter()
            result = work()
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[phase] = time.perf_counter() - start
            return result

        config, tokenizer = read_config(args.config), load_tokenizer(args.tokenizer)
        low = torch.bfloat16 if world.device.type == "cuda" else torch.float32

        def build():
            policy = random_model(config, 0, device=world.device)
            for block in policy.model.layers:
                block.recompute = True
            return shard(policy, world, low), random_model(config, 0, low, world.device)

        policy, copy = timed("build", build)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, weight_decay=0.01)
        examples = read_examples(args.data)[: args.prompts]
        texts = [tokenizer.render(build_messages(example), add_generation_prompt=True) for example in examples]
        prompts = [tokenizer.encode(text) for text in texts]
        sampler = Sampler(copy, tokenizer.stop_ids)
        rollouts = timed("rollout", lambda: sampler.generate(prompts, args.replies, 0.7, args.tokens))
        rewards = torch.arange(len(rollouts)) % 2.0  # random weights call no tools: the numbers only have to differ
        advantages = group_advantages(rewards, torch.tensor([rollout.group for rollout in rollouts]))
        rows = plan_microbatches(rollouts, list(range(len(rollouts))), args.budget, world.size)[world.rank]
        batches = [pack(rollouts, share, advantages, world.device) for share in rows]
        # The frozen reference is the start itself, so the sampling copy stands in for it here.
        batches, _ = timed("log-probs", lambda: add_logprobs(batches, policy, copy, 0.7, 1024))
        total = sum(len(rollout.reply) for rollout in rollouts)
        result = timed("update", lambda: optimizer_step(policy, optimizer, batches, PolicyLoss(), total, 1.0, 1e-6))
        timed("sync", lambda: copy_weights(policy, copy))

    record = {
        "model": args.config,
        "parameters": config.num_parameters,
        "vocabulary": config.vocab_size,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "reply_tokens": total,
        "grad_norm": result.grad_norm,
        "applied": result.applied,
        "seconds": {phase: round(value, 2) for phase, value in seconds.items()},
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    if torch.cuda.is_available():
        record["device_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    for key, value in record.items():
        print(f"{key:>18}  {value}")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
