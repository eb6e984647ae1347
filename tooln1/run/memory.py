"""The memory of one training process by part and by phase, and the memory that the machine has.

    counted     from a number of bytes per parameter: weights, gradients, Adam's moments, copies; shards are FSDP2's own
    traced      the passes of an update (trace.py)
    formula     what FSDP2 gathers, from its shards and its schedule; CUDA's context, graphs and the logits of sampling,
                a constant; prefill, taken to need what a log-prob pass does; the KV cache: half of what all other parts
                leave in their largest phase, or less if the sampler cannot use it (sampler/kv_cache.py)

Gradients last from an update to the next one. With LoRA on one process the frozen weights are also the reference and
the sampling copy. The sampler is given what this leaves, so that both plan the same cache. Not included: fragmentation.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tooln1.sampler.kv_cache as kv_cache
from tooln1.io.model_config import ModelConfig
from tooln1.lora import trained_parameters
from tooln1.run import trace

FP32 = 4
PHASES = ("load", "rollout", "log-probs", "update")
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

# the settings that memory depends on: in sampling, in the passes of an update, and for the weights
ROLLOUT_SETTINGS = ("max_num_seqs", "rollout_cache_tokens", "max_reply_tokens")
PASS_SETTINGS = ("tokens_per_microbatch", "logprob_chunk_tokens", "activation_checkpointing", "accumulate_unsharded")
KERNEL_SETTINGS = ("rollout_decode", "update_attention")
WEIGHT_SETTINGS = ("kl", "sharding", "sampler_weights", "offload_reference", "offload_optimizer")


class Part(NamedTuple):
    """One part of a process's memory."""

    name: str
    place: str  # "GPU" or "host"
    phases: tuple[int, ...]  # bytes in each of PHASES
    source: str = "counted"  # or "traced", "formula"


@dataclass(frozen=True)
class Estimate:
    """The memory of one process."""

    parts: tuple[Part, ...]
    free_bytes: int  # what all parts but the KV cache leave on the device

    def total(self, place: str, sources: Iterable[str] = ("counted", "traced", "formula")) -> int:
        """Bytes of the parts from these sources on the "GPU" or the "host", in the phase that needs most."""
        phases = [part.phases for part in self.parts if part.place == place and part.source in sources]
        return max(map(sum, zip(*phases, strict=True)), default=0)


def estimate(
    config: ModelConfig,
    reference: ModelConfig | None,
    settings: Mapping[str, Any],
    available: Mapping[str, int],
    processes: int,
    prompt: int,
    reply: int,
) -> Estimate:
    """The memory of one of `processes`, the default process group's, that train a model of this config.

    reference: config of the frozen model, None without one. settings: those of the run by name, "auto" replaced.
    available: bytes by place, as `available` gives them. prompt, reply: the longest ones, in tokens.
    """
    cuda, device = "GPU" in available, next(iter(available))
    # a longer sequence gets a micro-batch of its own, and the cache must hold it
    settings = {**settings, "tokens_per_microbatch": max(settings["tokens_per_microbatch"], prompt + reply)}
    number = 2 if cuda else FP32  # bytes of a number in passes and copies
    lora = settings["lora_rank"] > 0
    one_copy = lora and processes == 1
    sharded = (cuda or processes > 1) and not one_copy
    own = trace.shards(config, settings, processes)
    shards = int(os.environ.get("LOCAL_WORLD_SIZE", processes)) if settings["sharding"] == "hybrid" else processes
    trained = {name: shard for name, shard in own.items() if shard.requires_grad}
    same = reference == config and not lora
    frozen = own if same else trace.shards(reference, settings | {"lora_rank": 0}, processes) if reference else {}
    masters, kept_at = ("host" if settings[name] else device for name in ("offload_optimizer", "offload_reference"))
    weights = shard_bytes(trained, FP32, cuda and masters == "host")
    logprobs, update = pass_bytes(config, settings, cuda, shards if sharded else 0, own)
    adam, base = 2 * shard_bytes(trained, FP32), shard_bytes(own, number) - shard_bytes(trained, number)
    kept = shard_bytes(frozen, number, cuda and kept_at == "host")
    copy = number * config.num_parameters * (not one_copy)
    in_passes = 0 if settings["sampler_weights"] == "release" else copy
    parts = [
        Part("frozen weights", device, (base,) * 4),
        Part("weights (fp32)", masters, (weights,) * 4),
        Part("gradients (fp32)", masters, (0, weights, weights, weights)),
        Part("Adam's moments (fp32)", masters, (0, adam, adam, adam)),
        Part("reference", kept_at, (kept,) * 4),
        Part("sampling copy", device, (copy, copy, in_passes, in_passes)),
        Part("gathered weights, gradients", device, (0, 0, logprobs[0], update[0]), "formula"),
        Part("activations", device, (0, 0, 0, update[1]), "traced"),
        Part("working memory", device, (0, logprobs[1], logprobs[1], update[2]), "traced"),
        Part("CUDA context, graphs, sampling", device, (kv_cache.CUDA_RESERVE * cuda,) * 4, "formula"),
    ]
    free = max(0, available[device] - Estimate(tuple(parts), 0).total(device))
    least = kv_cache.kv_bytes_per_token(config, number) * (prompt + reply)
    cache = max(least, cache_bytes(config, settings, cuda, processes, (prompt, reply), free))
    source = "counted" if cuda and settings["rollout_cache_tokens"] else "formula"
    parts.append(Part("KV cache", device, (0, cache, cache, cache), source))
    return Estimate(tuple(part for part in parts if any(part.phases)), free)


def shard_bytes(shards: Mapping[str, Tensor], number: int, pinned: bool = False) -> int:
    """Bytes of shards, `number` bytes each number; in pinned memory, which comes in powers of two."""
    sizes = [number * shard.numel() for shard in shards.values()]
    return sum(1 << (size - 1).bit_length() if pinned else size for size in sizes)


def pass_bytes(
    config: ModelConfig, settings: Mapping[str, Any], cuda: bool, processes: int, shards: Mapping[str, Tensor]
) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Bytes in a log-prob pass, (gathered, working), and in an update, (gathered, activations, working).

    processes: that share the shards, 0 without FSDP2. With it a pass holds the weights outside the blocks, those of a
    block, and the buffer that they, or in the backward pass the next block's, were gathered in; there also the fp32
    gradients of the block before, being reduced.
    """
    # tracing takes seconds; on the CPU the cache is hardly ever limited, and only `--check` waits for it
    measured = trace.passes(config, settings, cuda) if cuda or settings["check"] else [0] * 4
    logprobs, stored, at_head, in_blocks = measured
    if not processes:
        return (0, logprobs), (0, stored, max(at_head, in_blocks) - stored)
    block = {name: shard for name, shard in shards.items() if name.startswith("model.layers.0.")}
    rest = {name: shard for name, shard in shards.items() if not name.startswith("model.layers.")}
    whole, root = (processes * shard_bytes(group, 2 if cuda else FP32) for group in (block, rest))
    # in fp32; with LoRA only adapters in the blocks have some
    gradients = processes * FP32 * sum(shard.numel() for shard in block.values() if shard.requires_grad)
    root_gradients = 0 if settings["lora_rank"] else processes * shard_bytes(rest, FP32)
    gathered = held = root + whole * (2 if processes > 1 else 1)
    if settings["accumulate_unsharded"]:
        held = root + root_gradients + config.num_hidden_layers * (whole + gradients)
    # at the end gradients outside the blocks are reduced; a single process divides them by 1 into a second copy
    at_end = bool(root_gradients) * root + root_gradients * (2 if processes == 1 else 1)
    update = [(held, stored, at_head - stored), (held + gradients, stored, in_blocks - stored), (at_end, 0, 0)]
    return (gathered, logprobs), max(update, key=sum)


def num_trained(config: ModelConfig, settings: Mapping[str, Any]) -> int:
    """Number of parameters that a run trains: all, or those of LoRA's adapters."""
    return sum(weight.numel() for weight in trained_parameters(trace.meta_model(config, settings)).values())


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


def with_values(names: Iterable[str], settings: Mapping[str, Any]) -> str:
    """Settings and their values for a message: "kl (k3), offload_reference (False)"."""
    return ", ".join(f"{name} ({settings[name]})" for name in names)


def table(needed: Estimate) -> str:
    """The parts of an estimate by phase, one line each, and their sums."""
    rows = [("", *PHASES, "")]
    for place in sorted({part.place for part in needed.parts}):
        there = [part for part in needed.parts if part.place == place]
        sums = tuple(map(sum, zip(*(part.phases for part in there), strict=True)))
        for name, _, phases, source in (*there, Part(f"on the {place}", place, sums, "")):
            rows.append((name, *(format_bytes(size) if size else "" for size in phases), source))
    return "\n".join("  {:<32}{:>12}{:>12}{:>12}{:>12}  {}".format(*row).rstrip() for row in rows)


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
