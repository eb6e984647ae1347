"""What perf/rollout.py measures on CUDA: decode and memory bandwidth, prefill and the matmul rate, transformers."""

from __future__ import annotations

import json
import random
import statistics

import torch
from shapes import lognormal_lengths, median_seconds, print_table, qwen2p5, random_prompts, seconds_of

from tooln1.io.model_config import ModelConfig
from tooln1.model import Transformer, random_model
from tooln1.sampler.kv_cache import kv_bytes_per_token
from tooln1.sampler.sampler import Sampler

GROUP = 5
PROMPT, REPLY = 728, 105  # mean tokens in the paper's data, as the released files have it


def gpu(sizes: list[str], prompt_counts: list[int], peer: type | None) -> dict:
    """Every size: prefill, decode at several row counts, whole batches beside transformers."""
    limits = {"copy_bytes_per_s": copy_bandwidth(), "bf16_flops_per_s": matmul_rate()}
    print_table([tuple(limits), tuple(limits.values())])
    done = {}
    for size in sizes:
        config = qwen2p5(size)
        model = random_model(config, 0, torch.bfloat16, "cuda")
        model.vocabulary = 151_665  # as with the real tokenizer
        done[size] = {
            "prefill": prefill(model, limits["bf16_flops_per_s"]),
            "decode": [decode(model, rows, limits["copy_bytes_per_s"]) for rows in (8, 64, 320, 512)],
            "batches": [batch(model, count, peer) for count in prompt_counts],
        }
        print(f"\n{size}: {config.num_parameters:,} parameters")
        print(json.dumps({size: done[size]}), flush=True)  # a later size may run out of time or memory
        for part in ([done[size]["prefill"]], done[size]["decode"], done[size]["batches"]):
            print_table([tuple(part[0]), *(tuple(row.values()) for row in part)])
        del model
        torch.cuda.empty_cache()
    return {"limits": limits, "sizes": done}


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), 10)


def matmul_rate() -> float:
    """Floating-point operations per second of a large bf16 matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / median_seconds(lambda: a @ b, 20)


def weight_elements(config: ModelConfig) -> int:
    """Weights that a pass multiplies with: all but the embedding's table, the head included."""
    table = config.vocab_size * config.hidden_size
    return config.num_parameters - (0 if config.tie_word_embeddings else table)


def prefill(model: Transformer, flops_per_s: float) -> dict:
    """64 distinct prompts, one token each: the share of the matmul rate that their FLOPs need."""
    rng, config = random.Random(0), model.config
    lengths = lognormal_lengths(rng, 64, PROMPT, 0.5, 3 * PROMPT)
    prompts, sampler = random_prompts(rng, lengths, config.vocab_size), Sampler(model, [])
    seconds = median_seconds(lambda: sampler.generate(prompts, 1, 0.7, 1))
    head = config.vocab_size * config.hidden_size
    flops = 2 * (weight_elements(config) - head) * sum(lengths) + 2 * head * len(lengths)
    flops += sum(2 * config.num_hidden_layers * config.hidden_size * n * n for n in lengths)  # causal scores and mix
    return {
        "prompt tokens": sum(lengths),
        "s": seconds,
        "tokens/s": sum(lengths) / seconds,
        "of matmul rate": flops / seconds / flops_per_s,
    }


def decode(model: Transformer, rows: int, bytes_per_s: float) -> dict:
    """Milliseconds of a decode step of `rows` rows in groups, and the share that moving its bytes once would need."""
    rng, config, steps = random.Random(0), model.config, 64
    groups = max(1, rows // GROUP)
    prompts = random_prompts(rng, lognormal_lengths(rng, groups, PROMPT, 0.5, 3 * PROMPT), config.vocab_size)
    sampler, each = Sampler(model, []), rows // groups
    short = median_seconds(lambda: sampler.generate(prompts, each, 0.7, 16))
    long = median_seconds(lambda: sampler.generate(prompts, each, 0.7, 16 + steps))
    seconds = (long - short) / steps
    read = sum(each * (len(prompt) + 16 + steps / 2) for prompt in prompts) * kv_bytes_per_token(config, 2)
    moved = 2 * weight_elements(config) + read
    return {
        "rows": groups * each,
        "ms/step": 1e3 * seconds,
        "tokens/s": groups * each / seconds,
        "GB/step": moved / 1e9,
        "of bandwidth": moved / bytes_per_s / seconds,
    }


def batch(model: Transformer, count: int, peer: type | None) -> dict:
    """`count` prompts x 5 ragged replies: tokens/s, with transformers' two ways beside it."""
    rng, config = random.Random(0), model.config
    prompts = random_prompts(rng, lognormal_lengths(rng, count, PROMPT, 0.5, 3 * PROMPT), config.vocab_size)
    limits = lognormal_lengths(rng, count * GROUP, REPLY, 0.8, 8 * REPLY)
    sampler = Sampler(model, [])
    seconds = median_seconds(lambda: sampler.generate(prompts, GROUP, 0.7, limits), 2)
    result = {
        "prompts": count,
        "new tokens": sum(limits),
        "s": seconds,
        "tokens/s": sum(limits) / seconds,
        "preemptions": sampler.stats.preemptions,
    }
    if peer is None or count > 64:  # the peer's tokens/s hardly depend on the number of batches
        return result | {"generate, tokens/s": "-", "ratio": "-", "generate_batch, tokens/s": "-"}
    other = peer(model)
    tried = {}
    other.sample(prompts[:2], GROUP, limits[: 2 * GROUP], 2)
    for at_once in (32, 64):
        try:
            tried[at_once] = seconds_of(lambda at_once=at_once: other.sample(prompts, GROUP, limits, at_once))
        except torch.OutOfMemoryError:
            break
    best = sum(limits) / min(tried.values())
    result |= {"generate, tokens/s": best, "ratio": sum(limits) / seconds / best}
    return result | {"generate_batch, tokens/s": continuous(other.model, prompts, limits)}


def continuous(model, prompts: list[list[int]], limits: list[int]) -> float | str:
    """transformers' own continuous batching: it has no limit per reply, so every reply gets the mean."""
    import transformers

    mean = round(statistics.mean(limits))
    config = transformers.GenerationConfig(
        max_new_tokens=mean, do_sample=True, temperature=0.7, top_k=0, eos_token_id=-1, pad_token_id=0
    )
    requests = [prompt for prompt in prompts for _ in range(GROUP)]
    try:
        seconds = median_seconds(lambda: model.generate_batch(inputs=requests, generation_config=config), 1)
    except Exception as error:  # an optional peer of another project: whatever it raises is reported, not fatal
        return f"{type(error).__name__}"
    return len(requests) * mean / seconds
