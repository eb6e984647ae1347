"""A step of the paper's load on paper: FLOPs, bytes and seconds from 1 to 256 H100, counted, nothing measured.

    python perf/scale.py                    # the tables of docs/scale.md
    python perf/scale.py --longest 8192     # a step with a reply that meets the limit

Each phase takes the longer of computing and communicating (FSDP2 prefetches the next block); decoding adds reading the
weights once a step, reading the cache and the products. Left out: latency, the imbalance of perf/edge.py, saving.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes import print_table, qwen2p5

from tooln1.io.model_config import ModelConfig
from tooln1.sampler.kv_cache import CUDA_MAX_NUM_SEQS, kv_bytes_per_token

PROMPT, REPLY, GROUP, PROMPTS, UPDATES, BUDGET = 728, 105, 5, 1024, 4, 30720  # PAPER.md, "The load"; Table 6
FLOPS, MEMORY, NVLINK, NETWORK, CARD = 989e12, 3.35e12, 450e9, 400e9, 80e9  # of an H100, a direction; of a node
PRODUCTS, DECODE_PRODUCTS, WEIGHTS, CACHE, LINKS = 0.4, 0.5, 0.8, 0.6, 0.7  # achieved shares of these: assumed
OTHER = 25e9  # activations, working memory, CUDA (docs/training.md)


def pass_flops(model: ModelConfig, prompts: int, repeated: bool = False) -> float:
    """FLOPs of a forward pass over the groups: 2 for each weight and token, 4·H·D for each (query, key) pair."""
    copies = GROUP if repeated else 1
    pairs = copies * PROMPT**2 / 2 + GROUP * (PROMPT * REPLY + REPLY**2 / 2)
    head = model.vocab_size * model.hidden_size
    layers = model.num_parameters - head * (1 if model.tie_word_embeddings else 2)
    attention = 4 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * pairs
    return prompts * (2 * layers * (copies * PROMPT + GROUP * REPLY) + 2 * head * GROUP * REPLY + attention)


def step(model: ModelConfig, gpus: int, prompts: int, longest: int) -> dict[str, tuple[float, float, float, float]]:
    """By phase, of one GPU: FLOPs, bytes read from its memory, bytes received from others, seconds."""
    weights, link = 2 * model.num_parameters, (NVLINK if gpus <= 8 else NETWORK) * LINKS
    gathered = weights * (gpus - 1) / gpus  # the bf16 weights once
    one_pass, rows = pass_flops(model, prompts) / gpus, prompts * GROUP / gpus
    microbatches = UPDATES * math.ceil(prompts / UPDATES * (PROMPT + GROUP * REPLY) / gpus / BUDGET)
    prefill = 2 * model.num_parameters * prompts * PROMPT / gpus
    decode = 2 * model.num_parameters * rows * REPLY
    read = weights * max(longest, rows * REPLY / CUDA_MAX_NUM_SEQS)
    cache = kv_bytes_per_token(model, 2) * rows * REPLY * (PROMPT + REPLY / 2)
    seconds = prefill / (FLOPS * PRODUCTS) + decode / (FLOPS * DECODE_PRODUCTS)
    seconds += read / (MEMORY * WEIGHTS) + cache / (MEMORY * CACHE)
    phases = {"rollout": (prefill + decode, read + cache, 0.0, seconds)}
    # old and reference: 1 3/4 passes; update: forward, recomputed forward, backward; gradients are fp32
    for name, passes, moved in (("log-probs", 1.75, 1.75), ("update", 4, 4)):
        received = moved * gathered * microbatches
        computing = passes * one_pass / (FLOPS * PRODUCTS)
        phases[name] = (passes * one_pass, passes * weights * microbatches, received, max(computing, received / link))
    return phases | {"copy": (0.0, 2 * weights, gathered, gathered / link + 2 * weights / (MEMORY * WEIGHTS))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longest", type=int, default=1000, help="tokens of the longest reply of a rank")
    longest = parser.parse_args().longest
    for size in ("7B", "14B"):
        model = qwen2p5(size)
        ratio = pass_flops(model, 1, repeated=True) / pass_flops(model, 1)
        print(f"{size}, 8 GPUs, {PROMPTS} prompts; a pass with repeated prompts has {ratio:.2f} times the FLOPs")
        rows = [("of one GPU", "PFLOP", "TB read", "GB received", "seconds")]
        for name, (flops, read, received, seconds) in step(model, 8, PROMPTS, longest).items():
            rows.append((name, flops / 1e15, read / 1e12, received / 1e9, seconds))
        print_table(rows)
        for kind in ("strong", "weak"):
            rows = [(f"{size}, {kind}", "prompts", "rollout", "log-probs", "update", "copy", "step", "GPU s a prompt")]
            for gpus in (1, 2, 4, 8, 16, 32, 64, 128, 256):
                prompts = PROMPTS if kind == "strong" else 128 * gpus
                seconds = [phase[3] for phase in step(model, gpus, prompts, longest).values()]
                fits = 18 * model.num_parameters / gpus + 2 * model.num_parameters + OTHER < CARD
                name = f"{gpus}{'' if fits else '*'}"  # *: the weights, Adam's moments and copies do not fit
                rows.append((name, prompts, *seconds, sum(seconds), sum(seconds) * gpus / prompts))
            print_table(rows)


if __name__ == "__main__":
    main()
