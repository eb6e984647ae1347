"""Run by test_memory.py and test_cuda.py: the bytes that updates of a small model allocate, beside the estimate.

    peak_memory.py cpu|cuda [accumulate] [checkpointing]

Rank 0 prints both, in bytes. On the CPU the profiler records every allocation and every free from the start on.
"""

import json
import sys
from dataclasses import asdict

import torch
from tiny import CONFIG
from torch.profiler import ProfilerActivity, profile, record_function

from tooln1.batch import pack
from tooln1.config import Config
from tooln1.data import Rollout
from tooln1.distributed import launch, shard
from tooln1.io.model_config import parse_config
from tooln1.model import random_model
from tooln1.run.memory import estimate
from tooln1.update import PolicyLoss, add_logprobs, optimizer_step

SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 2048}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 32_000}


def main() -> None:
    cuda, scale = sys.argv[1] == "cuda", 8 if sys.argv[1] == "cuda" else 1
    model = parse_config({**CONFIG, **(LARGE if cuda else SMALL), "tie_word_embeddings": False})
    settings = asdict(Config(tokens_per_microbatch=1000 * scale, logprob_chunk_tokens=128 * scale))
    settings |= {"accumulate_unsharded": "accumulate" in sys.argv, "check": True}
    settings["activation_checkpointing"] = "checkpointing" in sys.argv
    group = [Rollout(i // 5, i, [1] * 585, [2] * 83, [0.0] * 83, True) for i in range(5 * scale)]

    def updates() -> None:
        low = torch.bfloat16 if cuda else torch.float32
        policy = random_model(model, 0, device=world.device)
        reference = random_model(model, 1, low, world.device).requires_grad_(False)
        for block in policy.model.layers:
            block.recompute = settings["activation_checkpointing"]
        policy = shard(policy, world, low, False, settings["accumulate_unsharded"])
        reference = shard(reference, world)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, fused=cuda)
        chunk, total = settings["logprob_chunk_tokens"], 83 * len(group)
        batches = [pack(group, range(len(group)), torch.ones(len(group)), world.device)] * 2
        for step in range(2):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            with record_function(f"step {step}"):
                filled, _ = add_logprobs(batches, policy, reference, 1.0, chunk)
                optimizer_step(policy, optimizer, filled, PolicyLoss(chunk=chunk), total, 1.0, 1e-3)

    with launch(sys.argv[1]) as world:
        if cuda:
            updates()
            peak = torch.cuda.max_memory_allocated()
        else:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                updates()
            peak = peak_of(profiler.profiler.kineto_results.events())
        places = {"GPU": 1 << 40, "host": 1 << 40} if cuda else {"host": 1 << 40}
        needed = estimate(model, model, settings, places, world.size, 585, 83)
        missing = ("sampling copy", "KV cache", "CUDA context, graphs, sampling")
        parts = {part.name: part.phases[-1] for part in needed.parts if part.name not in missing}
        if world.is_main:
            print(json.dumps({"peak": peak, "expected": sum(parts.values()), "parts": parts}))


def peak_of(events) -> int:
    """The most bytes at once from the second step on."""
    events = sorted(events, key=lambda event: event.start_ns())
    begin = next(event.start_ns() for event in events if event.name() == "step 1")
    now = peak = 0
    for event in events:
        now += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, now if event.start_ns() >= begin else 0)
    return peak


if __name__ == "__main__":
    main()
