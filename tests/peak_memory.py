"""Run by test_memory.py under torchrun: the bytes that updates of a small model allocate, beside those estimated.

    peak_memory.py [accumulate] [checkpointing]

Rank 0 prints both, in bytes. The profiler records every allocation and every free from the start on.
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

SHAPE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 2048}
TOKENS, PROMPT, REPLY, CHUNK = 1000, 585, 83, 128


def main() -> None:
    model = parse_config({**CONFIG, **SHAPE, "tie_word_embeddings": False})
    settings = asdict(Config(tokens_per_microbatch=TOKENS, logprob_chunk_tokens=CHUNK))
    settings |= {
        "accumulate_unsharded": "accumulate" in sys.argv,
        "activation_checkpointing": "checkpointing" in sys.argv,
    }
    group = [Rollout(0, i, [1] * PROMPT, [2] * REPLY, [0.0] * REPLY, True) for i in range(5)]
    with launch("cpu") as world:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            policy, reference = random_model(model, 0), random_model(model, 1).requires_grad_(False)
            for block in policy.model.layers:
                block.recompute = settings["activation_checkpointing"]
            policy = shard(policy, world, torch.float32, False, settings["accumulate_unsharded"])
            reference = shard(reference, world)
            optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
            batches = [pack(group, range(5), torch.ones(5))] * 2
            for step in range(2):
                with record_function(f"step {step}"):
                    filled, _ = add_logprobs(batches, policy, reference, 1.0, CHUNK)
                    optimizer_step(policy, optimizer, filled, PolicyLoss(chunk=CHUNK), 5 * REPLY, 1.0, 1e-3)
        events = sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        begin = next(event.start_ns() for event in events if event.name() == "step 1")
        now = peak = 0
        for event in events:
            now += event.nbytes() if event.name() == "[memory]" else 0
            peak = max(peak, now if event.start_ns() >= begin else 0)
        needed = estimate(model, model, settings, {"host": 1 << 40}, world.size, PROMPT, REPLY)
        parts = {part.name: part.phases[-1] for part in needed.parts}
        expected = sum(parts.values()) - parts["sampling copy"] - parts["KV cache"]
        if world.is_main:
            print(json.dumps({"peak": peak, "expected": expected, "parts": parts}))


if __name__ == "__main__":
    main()
