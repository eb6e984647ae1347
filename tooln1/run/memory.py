"""An estimate of the memory of one training process, and the memory that the machine has.

Certain are the parts that follow from a number of bytes per parameter: weights, gradients, Adam's moments, the copies.
The others are estimated for a pass over T tokens; C, Q, K, I are the widths of the residual stream, all query heads,
all key heads and the MLP, and b the bytes of a number in a pass (2 on CUDA, 4 on the CPU):

    activations     stored for the backward pass: T (6C + 2Q + 4K + 4I) b per layer, 2 T (Q + K) b more where q and k
                    have norms (Qwen3); T C b with activation checkpointing
    working memory  the largest of: four fp32 copies of [logprob_chunk_tokens, V] and the gradient of the head; one
                    layer's activations once more (twice with checkpointing), and two gathered layers and gradients;
                    at the end the gradients of embedding and head. Beside them the gathered embedding and head
    KV cache        half of what all other parts leave, or less if the sampler cannot use it (sampler/kv_cache.py)

With LoRA on one process the frozen weights are also the reference and the sampling copy.
The sampler is given what this estimate leaves, so that both plan the same cache. Not included: fragmentation.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import tooln1.sampler.kv_cache as kv_cache
from tooln1.io.model_config import ModelConfig
from tooln1.lora import add_adapters, trained_parameters
from tooln1.model import Transformer

FP32 = 4
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

# the settings that memory depends on: in sampling, in the passes of an update, and for the weights
ROLLOUT_SETTINGS = ("max_num_seqs", "rollout_cache_tokens", "max_reply_tokens")
PASS_SETTINGS = ("tokens_per_microbatch", "logprob_chunk_tokens", "activation_checkpointing")
KERNEL_SETTINGS = ("rollout_decode", "update_attention")
WEIGHT_SETTINGS = ("accumulate_unsharded", "kl", "offload_reference", "offload_optimizer")


class Part(NamedTuple):
    """One part of a process's memory."""

    name: str
    bytes: int
    place: str  # "GPU" or "host"
    certain: bool = True  # False: estimated


@dataclass(frozen=True)
class Estimate:
    """The memory of one process at its peak."""

    parts: tuple[Part, ...]
    free_bytes: int  # what all parts but the KV cache leave on the device

    def certain(self, place: str) -> int:
        """Bytes that are needed in any case on the "GPU" or the "host"."""
        return sum(part.bytes for part in self.parts if part.certain and part.place == place)

    def total(self, place: str) -> int:
        """Bytes including the estimated parts."""
        return sum(part.bytes for part in self.parts if part.place == place)


def estimate(
    config: ModelConfig,
    reference: ModelConfig | None,
    settings: Mapping[str, Any],
    available: Mapping[str, int],
    processes: int,
    prompt: int,
    reply: int,
) -> Estimate:
    """The memory of one of `processes` that train a model of this config.

    reference: config of the frozen model, None without one. settings: those of the run by name, "auto" replaced.
    available: bytes by place, as `available` gives them. prompt, reply: the longest ones, in tokens.
    """
    cuda, device = "GPU" in available, next(iter(available))
    number = 2 if cuda else FP32  # bytes of a number in passes and copies
    lora, trained = settings["lora_rank"] > 0, num_trained(config, settings)
    one_copy = lora and processes == 1
    sharded = (cuda or processes > 1) and not one_copy
    size, frozen = config.num_parameters, reference.num_parameters if reference else 0
    shards = int(os.environ.get("LOCAL_WORLD_SIZE", processes)) if settings["sharding"] == "hybrid" else processes
    shard = -(-trained // shards)
    unsharded = number * size + FP32 * trained if settings["accumulate_unsharded"] and sharded else 0
    masters = "host" if settings["offload_optimizer"] else device
    weights, kept = FP32 * shard, number * -(-frozen // shards)
    if cuda and settings["offload_optimizer"]:
        weights = pinned_bytes(config, FP32, shards)
    if cuda and settings["offload_reference"] and reference:
        kept = pinned_bytes(reference, number, shards)
    activations, working = pass_bytes(config, settings, number, shards if sharded else 0)
    copy = number * size * (not one_copy)
    if settings["sampler_weights"] == "release":  # the passes use its memory, and count below
        copy = max(0, copy - unsharded - activations - working)
    parts = [
        Part("frozen weights", number * -(-size // shards) * lora, device),
        Part("weights (fp32)", weights, masters),
        Part("gradients (fp32)", weights, masters),
        Part("Adam's moments (fp32)", 2 * FP32 * shard, masters),
        Part("reference", kept, "host" if settings["offload_reference"] else device),
        Part("sampling copy", copy, device),
        Part("unsharded weights and gradients", unsharded, device),
        Part("activations", activations, device, certain=False),
        Part("working memory", working, device, certain=False),
        Part("CUDA context, graphs, sampling", kv_cache.CUDA_RESERVE * cuda, device, certain=False),
    ]
    free = max(0, available[device] - sum(part.bytes for part in parts if part.place == device))
    cache = cache_bytes(config, settings, cuda, processes, (prompt, reply), free)
    parts.append(Part("KV cache", cache, device, certain=cuda and settings["rollout_cache_tokens"] > 0))
    return Estimate(tuple(part for part in parts if part.bytes), free)


def num_trained(config: ModelConfig, settings: Mapping[str, Any]) -> int:
    """Number of parameters that a run trains: all, or those of LoRA's adapters."""
    with torch.device("meta"):
        model = Transformer(config)
    if settings["lora_rank"]:
        add_adapters(model, settings["lora_rank"], 1.0, settings["lora_targets"].split(","), seed=0)
    return sum(parameter.numel() for parameter in trained_parameters(model).values())


def pinned_bytes(config: ModelConfig, number: int, processes: int) -> int:
    """Bytes of a process's shards of all weights in pinned memory, which comes in powers of two."""
    with torch.device("meta"):
        shards = [-(-weight.numel() // processes) for weight in Transformer(config).parameters()]
    return sum(1 << (number * shard - 1).bit_length() for shard in shards)


def cache_bytes(
    config: ModelConfig, settings: Mapping[str, Any], cuda: bool, processes: int, longest: tuple[int, int], free: int
) -> int:
    """Bytes of the sampler's KV cache, as it plans it. longest: tokens of a prompt and of a reply; free: bytes."""
    replies = -(-settings["prompts_per_step"] // processes) * settings["group_size"]
    block_size = kv_cache.CUDA_BLOCK_SIZE if cuda else kv_cache.CPU_BLOCK_SIZE
    rows, lengths = (kv_cache.CUDA_MAX_NUM_SEQS, None) if cuda else (replies, [longest] * replies)
    rows, element_size = settings["max_num_seqs"] or rows, 2 if cuda else FP32
    blocks = kv_cache.plan_cache(
        config, element_size, free, block_size, rows, settings["rollout_cache_tokens"], lengths
    )
    return kv_cache.kv_bytes_per_token(config, element_size) * blocks * block_size


def pass_bytes(config: ModelConfig, settings: Mapping[str, Any], number: int, shards: int) -> tuple[int, int]:
    """(bytes of the stored activations, bytes of the working memory) of a forward and backward pass.

    number: bytes of a number in the pass. shards: processes that the weights are sharded over, 0 without FSDP2.
    """
    tokens, checkpointing = settings["tokens_per_microbatch"], settings["activation_checkpointing"]
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    # both norms' and the projections' inputs, q, k and v (twice), the MLP's; the norms' of q and k
    width = 6 * config.hidden_size + 2 * queries + 4 * keys + 4 * config.intermediate_size
    layer = tokens * number * (width + 2 * (queries + keys) * config.qk_norm)
    stored = config.num_hidden_layers * (tokens * number * config.hidden_size if checkpointing else layer)
    table = config.vocab_size * config.hidden_size
    tables = table if config.tie_word_embeddings else 2 * table
    layer_size = (config.num_parameters - tables) // config.num_hidden_layers
    gradient = 0 if settings["lora_rank"] else number + FP32  # bytes of a weight's, which is reduced in fp32
    at_head = 4 * FP32 * settings["logprob_chunk_tokens"] * config.vocab_size + gradient * table
    in_layers = layer * (2 if checkpointing else 1)
    if not shards:
        return stored, max(at_head, in_layers)
    in_layers += 2 * (number + gradient) * layer_size
    at_end = (gradient + FP32 * (shards == 1)) * tables  # a single process divides by 1 into a second fp32 copy
    return stored, max(at_head, in_layers, at_end - stored) + number * tables


def with_values(names: Iterable[str], settings: Mapping[str, Any]) -> str:
    """Settings and their values for a message: "kl (k3), offload_reference (False)"."""
    return ", ".join(f"{name} ({settings[name]})" for name in names)


def table(needed: Estimate) -> str:
    """The parts of an estimate, one line each."""
    return "\n".join(
        f"  {part.name:<32}{format_bytes(part.bytes):>9}  {part.place}{'' if part.certain else ', estimated'}"
        for part in needed.parts
    )


def format_bytes(count: float) -> str:
    """Bytes with a binary unit: 1536 -> "1.5 KiB"."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = next((power for power in range(4) if count < 1000 * 1024**power), 4)
    return f"{count / 1024**power:.{min(power, 1)}f} {units[power]}"


def available(device: torch.device) -> dict[str, int]:
    """Bytes that are free on the "GPU", if that is the device, and this process's share of the "host".

    The host has what the machine has, or what its control group (a container's) is limited to.
    """
    host = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in CGROUP_LIMITS:
        try:
            host.append(int(Path(file).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    gpu = {"GPU": torch.cuda.mem_get_info(device)[0]} if device.type == "cuda" else {}
    return gpu | {"host": min(host) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))}
