"""The memory of a run before it begins: bytes of one process by part, and what the machine has.

Certain is what a number of bytes a parameter gives: weights, gradients, Adam's moments, the copies. Estimated is the
rest; in a pass over T tokens, with C, Q, K, I the widths of the residual stream,
all query heads, all key heads and the MLP, and `b` bytes a number (2 on CUDA, 4 on the CPU):

    activations     a layer keeps T (6C + 2Q + 4K + 4I) b; with checkpointing, T C b
    passes          beside those, the most of: at the head, four fp32 copies of [logprob_chunk_tokens, V] and its
                    gradient in fp32 and as stored; in a layer, its activations once more (with checkpointing twice),
                    two layers gathered with gradients; at the end, the tables' gradients (gathered: FSDP2)
    key/value cache what rollout_cache_tokens says, else as rollout.py has it: the need, at most a third of what is free

Not in it: what PyTorch, CUDA and NCCL take for themselves, FlexAttention's padding to a power of two, and
fragmentation. Steps of a model of 25M parameters on the CPU, 1,134 and 2,407 tokens at once, came to 0.9 to 1.0 of the
estimate where malloc gives everything back (MALLOC_MMAP_THRESHOLD_=65536), else to 1.1 to 1.4 of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from tooln1.io.model_config import ModelConfig

FP32 = 4
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Part(NamedTuple):
    """A share of one process's memory."""

    name: str
    bytes: int
    certain: bool = True  # False: an estimate
    offloaded: bool = False  # in the host's memory, though the process computes on CUDA


@dataclass(frozen=True)
class Estimate:
    """What one process will hold at its peak."""

    parts: tuple[Part, ...]
    loading: int  # bytes where it computes while the policy is whole, before it is sharded and the other parts come
    ways_out: tuple[str, ...]  # settings that make the certain parts smaller, with their present values
    more_ways_out: tuple[str, ...]  # and those that make the estimated ones smaller

    def certain(self, offloaded: bool = False) -> int:
        """Bytes that are needed for sure, in the device's or in the host's memory."""
        held = sum(part.bytes for part in self.parts if part.certain and part.offloaded == offloaded)
        return held if offloaded else max(held, self.loading)

    def total(self, offloaded: bool = False) -> int:
        """Bytes in all, the estimated parts included."""
        return max(self.certain(offloaded), sum(part.bytes for part in self.parts if part.offloaded == offloaded))


def estimate(
    config: ModelConfig,
    *,
    cuda: bool,
    processes: int,
    available: int,
    reference: ModelConfig | None,
    tokens_per_microbatch: int,
    logprob_chunk_tokens: int,
    activation_checkpointing: bool,
    accumulate_whole: bool,
    offload_reference: bool,
    offload_optimizer: bool,
    cache_tokens: int,
    most_cache_tokens: int,
) -> Estimate:
    """The parts of one of `processes` that train a model of this config, as train.py and distributed.py build it.

    available:         bytes the device has for the process; the sampler takes its share of what is free of them.
    reference:         the frozen model's config, None where there is none (kl_coef 0, mode sft).
    cache_tokens:      of the sampler, as the setting rollout_cache_tokens; 0: `most_cache_tokens` at most.
    most_cache_tokens: what the sampler takes where memory allows: on CUDA rows (512) · context, on the CPU the
                       process's replies · (prompt + max_reply_tokens).
    """
    number = 2 if cuda else FP32  # bytes of a number in passes and copies
    sharded = cuda or processes > 1
    whole, mine = config.num_parameters, -(-config.num_parameters // processes)
    kept_whole = accumulate_whole and sharded
    offload_optimizer, offload_reference = offload_optimizer and cuda, offload_reference and cuda
    weights = Part("weights (fp32)", FP32 * mine, offloaded=offload_optimizer)
    frozen = reference.num_parameters if reference else 0
    copies = [
        Part("reference", number * -(-frozen // processes), offloaded=offload_reference),
        Part("sampling copy", number * whole),
    ]
    at_first_step = sum(part.bytes for part in (weights, *copies) if not part.offloaded)
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * number
    cache = cache_tokens or min(most_cache_tokens, max(0, available - at_first_step) // 3 // token)
    kept = number * kept_activations(config, tokens_per_microbatch, activation_checkpointing)
    parts = (
        weights,
        Part("gradients (fp32)", FP32 * mine, offloaded=offload_optimizer),
        Part("Adam's moments (fp32)", 2 * FP32 * mine, offloaded=offload_optimizer),
        *copies,
        Part("weights and gradients kept whole", (number + FP32) * whole * kept_whole),
        Part("key/value cache", token * cache, certain=cuda and cache_tokens > 0),
        Part("activations", kept, certain=False),
        Part(
            "passes",
            _passes(
                config, tokens_per_microbatch, logprob_chunk_tokens, activation_checkpointing, kept, number, sharded
            ),
            certain=False,
        ),
    )
    ways_out = (
        ("offload_optimizer true (now false)", cuda and not offload_optimizer),
        ("offload_reference true (now false)", cuda and frozen and not offload_reference),
        ("kl_coef 0, which needs no reference model", frozen),
        ("accumulate_whole off (now on)", kept_whole),
        (f"fewer rollout_cache_tokens (now {cache_tokens})", cache_tokens),
        (f"more processes (now {processes})", cuda),
        (f"fewer processes (now {processes}), because each has copies of its own", sharded and not cuda),
        ("a smaller model", True),
    )
    more_ways_out = (
        ("activation_checkpointing on (now off)", not activation_checkpointing),
        (f"fewer tokens_per_microbatch (now {tokens_per_microbatch})", True),
        (f"fewer logprob_chunk_tokens (now {logprob_chunk_tokens})", logprob_chunk_tokens > 256),
        ("rollout_cache_tokens to bound the cache (now 0: what is free decides)", not cache_tokens),
    )
    return Estimate(
        tuple(part for part in parts if part.bytes),
        FP32 * whole if sharded else 0,
        *(tuple(way for way, helps in ways if helps) for ways in (ways_out, more_ways_out)),
    )


def kept_activations(config: ModelConfig, tokens: int, checkpointing: bool) -> int:
    """Numbers (not bytes) that the forward pass over a stream of `tokens` keeps for the backward pass."""
    return tokens * config.num_hidden_layers * (config.hidden_size if checkpointing else _of_layer(config))


def _of_layer(config: ModelConfig) -> int:
    """Numbers that a layer keeps of a token: both norms' and the projections' inputs, q, k, v (twice), the MLP's."""
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    return 6 * config.hidden_size + 2 * queries + 4 * keys + 4 * config.intermediate_size


def _passes(
    config: ModelConfig, tokens: int, chunk: int, checkpointing: bool, kept: int, number: int, sharded: bool
) -> int:
    """Bytes at the peak of a forward and backward pass, beside the `kept` ones, which are gone at its end."""
    table = config.vocab_size * config.hidden_size
    tables = table * (1 if config.tie_word_embeddings else 2)
    layer = (config.num_parameters - tables) // config.num_hidden_layers
    at_head = 4 * FP32 * chunk * config.vocab_size + (FP32 + number) * table + number * tables * sharded
    in_layer = tokens * number * _of_layer(config) * (2 if checkpointing else 1)
    in_layer += (number * (tables + table) + (2 * number + FP32) * 2 * layer) * sharded
    at_end = (2 * number + FP32) * tables * sharded - kept
    return max(at_head, in_layer, at_end)


def table(found: Estimate) -> str:
    """The parts of one process, a line each, and the sum."""
    rows = [
        (part.name, part.bytes, "" if part.certain else "estimated", "on the host" if part.offloaded else "")
        for part in found.parts
    ]
    rows.append(("at the peak, where it computes", found.total(), "", ""))
    width = max(len(row[0]) for row in rows)
    lines = (f"  {name:<{width}}  {shown(count):>9}  {' '.join(words)}" for name, count, *words in rows)
    return "\n".join(line.rstrip() for line in lines)


def shown(count: float) -> str:
    """Bytes in words: 1536 -> "1.5 KiB"."""
    units = ("bytes", "KiB", "MiB", "GiB", "TiB")
    power = next((power for power in range(4) if count < 1000 * 1024**power), 4)
    return f"{count / 1024**power:.{min(power, 1)}f} {units[power]}"


# ------------------------------------------------------------------------------------------------ what is there


def device_bytes(device: torch.device) -> int:
    """Memory that a process may use on `device`: what is free on a GPU now, all that the host has else."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_bytes()


def host_bytes() -> int:
    """Memory of this machine, or what its control group (a container's) is limited to."""
    known = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in CGROUP_LIMITS:
        try:
            known.append(int(Path(file).read_text(encoding="ascii")))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(known)
