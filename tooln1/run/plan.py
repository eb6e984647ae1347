"""Plan a run: memory of a process by part and phase, seconds of a GRPO step, and what to change where it does not fit.

    python -m tooln1.run.plan --config configs/tool_n1_14b.toml --gpus 32 --gpu-memory 80 [--key value ...]

Needs config.json of the model, no GPU and no other process. The memory is what `train.py --check` prints. The seconds
are counted work over stated rates, not measured: a pass takes the longer of its matrix products and of what FSDP2 moves
(bf16 weights for each pass, fp32 gradients); a decode step reads all weights, and keys and values of its sequences; an
update is 3 forward passes, 4 with activation_checkpointing, and AdamW moves 28 bytes per weight. Not counted: launches,
unequal lengths and shares, offloading, evaluation, checkpoints.
"""

import argparse
import os
from collections.abc import Mapping
from math import ceil
from typing import Any

import torch.distributed as dist

from tooln1.config import REPOSITORY, load_config
from tooln1.io.errors import exit_on_user_error
from tooln1.io.model_config import ModelConfig, pair_cost
from tooln1.model import read_config
from tooln1.run.checks import fits_memory, report
from tooln1.run.memory import estimate, format_bytes, table
from tooln1.run.setup import reference_of, resolved
from tooln1.run.trace import MEAN_PROMPT, MEAN_REPLY
from tooln1.sampler.kv_cache import CUDA_MAX_NUM_SEQS, kv_bytes_per_token

OPTIONS = {  # the defaults are an H100's; GB are 10^9 bytes
    "gpus": (8, "processes in all"),
    "gpus_per_node": (8, "of them on a node"),
    "gpu_memory": (80.0, "GB of a GPU"),
    "host_memory": (2000.0, "GB of a node"),
    "prompt": (MEAN_PROMPT, "mean tokens of a prompt"),
    "reply": (MEAN_REPLY, "mean tokens of a reply"),
    "peak": (989.0, "TFLOP/s of a GPU in bf16"),
    "peak_share": (0.4, "of it that matrix products reach"),
    "memory_rate": (2000.0, "GB/s that decoding and AdamW reach, of 3,350"),
    "link_rate": (315.0, "GB/s that a GPU reaches inside a node, of 450"),
    "network_rate": (35.0, "GB/s per GPU that a node reaches to others, of 50"),
}
CHANGES = {  # from the cheapest to the costliest
    "accumulate_unsharded": False,
    "activation_checkpointing": True,
    "tokens_per_microbatch": 8192,
    "sampler_weights": "release",
    "offload_reference": True,
    "offload_optimizer": True,
}


def step_seconds(
    config: ModelConfig, settings: Mapping[str, Any], with_reference: bool, cache: int, given: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Seconds of each phase of a step by what they consist of. cache: tokens that the sampler's cache holds."""
    gpus, prompt, reply, group = given.gpus, given.prompt, given.reply, settings["group_size"]
    head = config.vocab_size * config.hidden_size
    in_layers = config.num_parameters - head * (1 if config.tie_word_embeddings else 2)
    prompts, rate = settings["prompts_per_step"] / gpus, given.peak * given.peak_share * 1e12  # of a GPU, as all below
    shards = min(gpus, given.gpus_per_node) if settings["sharding"] == "hybrid" else gpus
    between_nodes = given.gpus_per_node * given.network_rate if shards > given.gpus_per_node else given.link_rate
    gather = 2 * config.num_parameters * (1 - 1 / shards) / min(given.link_rate, between_nodes) / 1e9
    replies, pairs = prompts * group * reply, prompt**2 / 2 + group * reply * (prompt + reply / 2)
    tokens = prompts * prompt + replies
    forward = 2 * (in_layers * (tokens + pair_cost(config) * prompts * pairs) + head * replies) / rate
    minibatches = settings["prompts_per_step"] // settings["prompts_per_minibatch"]
    microbatches = minibatches * ceil(tokens / minibatches / settings["tokens_per_microbatch"])
    passes = with_reference + (settings["old_logprobs"] == "policy") * (1 - 1 / minibatches)
    gathers = 3 * minibatches if settings["accumulate_unsharded"] else 4 * microbatches  # a reduction counts as two
    sampled, at_most = ceil(prompts * group), settings["max_num_seqs"] or CUDA_MAX_NUM_SEQS
    rows = max(1, min(sampled, at_most, int(cache / (prompt / group + reply))))
    steps = ceil(sampled / rows) * reply
    read = 2 * config.num_parameters * steps + replies * (prompt + reply / 2) * kv_bytes_per_token(config, 2)
    prefill = 2 * in_layers * prompts * (prompt + pair_cost(config) * prompt**2 / 2) / rate
    decoding = max(read / given.memory_rate / 1e9, 2 * (in_layers + head) * replies / rate)
    update = (3 + settings["activation_checkpointing"]) * forward
    moved = gathers * gather
    if shards < gpus:  # fp32 gradients are summed over the replicas, there and back
        moved += minibatches * 8 * config.num_parameters / shards / given.network_rate / 1e9
    adam = {"AdamW": minibatches * 28 * config.num_parameters / shards / given.memory_rate / 1e9}
    if settings["offload_optimizer"]:
        adam = {"AdamW on the host and its transfers not counted": 0.0}
    return {
        "rollout": {"prefill": prefill, f"{steps} decode steps of {rows} replies": decoding},
        "log-probs": _longer(passes * forward, passes * microbatches * gather),
        "update": _longer(update, moved) | adam,
        "weight copy": {"moving": gather},
    }


def _longer(products: float, moving: float) -> dict[str, float]:
    """The longer of two things that go on at once."""
    return {"matrix products": products} if products > moving else {"moving": moving}


def main() -> None:
    """Print the plan; exit code 2 where a process does not fit."""
    parser = argparse.ArgumentParser(epilog="And the settings of train.py --help.", allow_abbrev=False)
    for name, (default, what) in OPTIONS.items():
        about = {"type": type(default), "default": default, "help": f"{what} [default: {default}]"}
        parser.add_argument(f"--{name.replace('_', '-')}", **about)
    given, argv = parser.parse_known_args()
    run = load_config(argv, REPOSITORY / "configs" / "tool_n1_7b.toml")
    config, frozen = read_config(run.model), reference_of(run)
    settings, reference = resolved(run, config.num_parameters), read_config(frozen) if frozen else None
    host = given.host_memory / min(given.gpus, given.gpus_per_node)
    there = {"GPU": int(given.gpu_memory * 1e9), "host": int(host * 1e9)}
    os.environ["LOCAL_WORLD_SIZE"] = str(min(given.gpus, given.gpus_per_node))
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=given.gpus)
    limits = (there, given.gpus, run.max_prompt_tokens, run.max_reply_tokens)
    needed = estimate(config, reference, settings, *limits)
    findings = list(fits_memory(needed, settings, there))
    print("memory of one process:", table(needed), "", sep="\n")
    print("seconds of a step at", ", ".join(f"{name} {getattr(given, name):g}" for name in OPTIONS))
    cache = max(part.phases[1] for part in needed.parts if part.name == "KV cache") // kv_bytes_per_token(config, 2)
    seconds = step_seconds(config, settings, run.mode == "rl" and run.kl != "off", cache, given)
    for phase, parts in seconds.items():
        shown = ", ".join(f"{what} {time:.1f}" for what, time in parts.items())
        print(f"  {phase:<12}{sum(parts.values()):8.1f}  {shown}")
    print(f"  {'in all':<12}{sum(sum(parts.values()) for parts in seconds.values()):8.1f}\n")
    for name, value in CHANGES.items():
        if all(needed.total(place) <= there[place] for place in there):
            break
        if settings[name] != value and not (name == "tokens_per_microbatch" and settings[name] < value):
            settings = settings | {name: value}
            needed = estimate(config, reference, settings, *limits)
            sizes = (f"{format_bytes(needed.total(place))} on the {place}" for place in there)
            print(f"changed to {name} = {value}: {', '.join(sizes)}")
    dist.destroy_process_group()
    report(findings, check=True)


if __name__ == "__main__":
    exit_on_user_error(main)
