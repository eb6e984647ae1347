"""A step of the paper's load on paper: FLOPs, bytes and seconds from 1 to 256 H100, counted, nothing measured.

    python perf/scale.py                    # the tables of docs/scale.md
    python perf/scale.py --longest 8192     # a step with a reply that meets the limit; *: does not fit

Training takes the longer of computing and communicating (FSDP2 prefetches the next block); decoding adds reading the
weights, reading the cache and the products. Left out: latency, the imbalance of perf/edge.py, saving.
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


def pass_flops(model: ModelConfig, repeated: bool = False) -> float:
    """FLOPs of a forward pass over a group: 2 for each weight and token, 4·H·D for each (query, key) pair."""
    copies = GROUP if repeated else 1
    pairs = copies * PROMPT**2 / 2 + GROUP * (PROMPT * REPLY + REPLY**2 / 2)
    head = model.vocab_size * model.hidden_size
    layers = model.num_parameters - head * (1 if model.tie_word_embeddings else 2)
    attention = 4 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * pairs
    return 2 * layers * (copies * PROMPT + GROUP * REPLY) + 2 * head * GROUP * REPLY + attention


def step(model: ModelConfig, gpus: int, prompts: int, longest: int) -> dict[str, tuple[float, float, float, float]]:
    """By phase, of one GPU: FLOPs, bytes read from its memory, bytes received from others, seconds."""
    weights, link = 2.0 * model.num_parameters, (NVLINK if gpus <= 8 else NETWORK) * LINKS
    gathered = weights * (gpus - 1) / gpus  # the bf16 weights once
    one_pass, rows = prompts * pass_flops(model) / gpus, prompts * GROUP / gpus
    microbatches = UPDATES * math.ceil(prompts / UPDATES * (PROMPT + GROUP * REPLY) / gpus / BUDGET)
    prefill = 2 * model.num_parameters * prompts * PROMPT / gpus
    decode = 2 * model.num_parameters * rows * REPLY
    read = weights * max(longest, rows * REPLY / CUDA_MAX_NUM_SEQS)
    cache = kv_bytes_per_token(model, 2) * rows * REPLY * (PROMPT + REPLY / 2)
    seconds = prefill / (FLOPS * PRODUCTS) + decode / (FLOPS * DECODE_PRODUCTS)
    seconds += read / (MEMORY * WEIGHTS) + cache / (MEMORY * CACHE)
    phases = {"rollout": (prefill + decode, read + cache, 0.0, seconds)}
    # Old and reference: 1 3/4 passes, a gather each. Update: forward, again, backward (2); two gathers, fp32 gradients.
    for name, passes in (("log-probs", 1.75), ("update", 4)):
        flops, moved = passes * one_pass, passes * gathered * microbatches
        slower = max(flops / (FLOPS * PRODUCTS), moved / link)
        phases[name] = (flops, passes * weights * microbatches, moved, slower)
    return phases | {"copy": (0.0, 2 * weights, gathered, gathered / link + 2 * weights / (MEMORY * WEIGHTS))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--longest", type=int, default=1000, help="tokens of the longest reply of a rank")
    longest = parser.parse_args().longest
    for size in ("7B", "14B"):
        model = qwen2p5(size)
        ratio = pass_flops(model, repeated=True) / pass_flops(model)
        print(f"{size}, one of 8 GPUs; a pass with repeated prompts has {ratio:.2f} times the FLOPs")
        rows = step(model, 8, PROMPTS, longest).items()
        print_table([("", "FLOP", "bytes read", "received", "seconds"), *((name, *phase) for name, phase in rows)])
        for kind, per_gpu in (("strong", 0), ("weak", 128)):
            rows = [(f"{size}, {kind}", "prompts", "rollout", "log-probs", "update", "copy", "step", "GPU s a prompt")]
            for gpus in (1, 2, 4, 8, 16, 32, 64, 128, 256):
                prompts, bytes_needed = per_gpu * gpus or PROMPTS, (18 / gpus + 2) * model.num_parameters + OTHER
                seconds = [phase[3] for phase in step(model, gpus, prompts, longest).values()]
                told = (prompts, *seconds, sum(seconds), sum(seconds) * gpus / prompts)
                rows.append((f"{gpus}{'*' * (bytes_needed > CARD)}", *told))
            print_table(rows)


if __name__ == "__main__":
    main()
