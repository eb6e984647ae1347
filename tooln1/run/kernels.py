"""Which attention kernels a run uses: the first of these that works on this machine, tried before the first step.

    rollout_decode     graph      FlexAttention over the cache's blocks, a decode step captured as a CUDA graph
                       eager      the same, launched kernel by kernel
                       gathered   plain attention over copies of the blocks; the CPU's
    update_attention   flex       FlexAttention over the packed stream
                       sdpa       plain attention, a few calls for each prompt; the CPU's

A kernel works if it compiles, can be captured, and gives what the plain form gives.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from tooln1.attention import Segment, packed_attention
from tooln1.distributed import World
from tooln1.io.errors import UserError
from tooln1.io.model_config import ModelConfig
from tooln1.sampler.paged_attention import FlexDecode, GatheredDecode
from tooln1.sampler.sampler import Sampler
from tooln1.sampler.sampling import SamplingParams
from tooln1.sampler.scheduler import Sequence, SequenceGroup

TOLERANCE = 2e-2  # of outputs and gradients in bf16, relative


def choose(setting: str, chosen: str, levels: tuple[str, ...], attempt: Callable[[str], None], world: World) -> str:
    """`chosen`, or for "auto" the first of `levels` whose attempt raises on no rank (a collective).

    The last level is not tried; on the CPU it is the choice for "auto". Lack of memory is no reason for a later level.
    """
    cuda, failures = world.device.type == "cuda", []
    if chosen == levels[0] and not cuda:
        raise UserError(f"{setting} = {chosen!r} needs a GPU; take auto or {levels[-1]}.")
    if chosen != "auto" or not cuda:
        return levels[-1] if chosen == "auto" else chosen
    for level in levels[:-1]:
        try:
            attempt(level)
            break
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the compiler, Triton, gcc and CUDA raise many kinds
            failures.append(f"{level} ({type(error).__name__}: {' '.join(str(error).split())[:200]})")
        torch._dynamo.reset()
        gc.collect()
    failures = max(world.gather([failures]), key=len)
    level = levels[len(failures)]
    if failures and world.is_main:
        print(f"warning: {setting} is {level}, which is slower; failed: {', '.join(failures)}", file=sys.stderr)
    return level


def choose_decode(sampler: Sampler, chosen: str, world: World) -> None:
    """Set the sampler's `decode`; an attempt makes its cache."""
    rows, config = 8, sampler.model.config

    @torch.inference_mode()
    def attempt(level: str) -> None:
        sampler.decode = level
        sampler.reserve([], 0)
        cache, size = sampler.cache, sampler.cache.block_size
        group = SequenceGroup(0, [0] * size)
        seqs = [Sequence(group, 0, 0, 1, block_table=[1, 2 + i], num_cached_tokens=size + 1 + i) for i in range(rows)]
        block_table = torch.zeros(rows, cache.num_blocks + 1, dtype=torch.int32, device=sampler.device)
        block_table[:, :2] = torch.tensor([seq.block_table for seq in seqs])
        positions = torch.arange(size, size + rows, device=sampler.device)
        q, k, v = random_qkv(config, rows, cache.data)
        cache.data[0, 1 : 2 + rows].normal_()
        forms = FlexDecode(cache, block_table, positions), GatheredDecode(cache, seqs)
        results = [[form(0, q, k, v)] for form in forms]
        cache.data.zero_()
        compare(*results)
        if level == "graph":
            sampler.decode_graph(rows, SamplingParams(1.0, 0, 1.0))

    sampler.decode = choose("rollout_decode", chosen, ("graph", "eager", "gathered"), attempt, world)
    sampler.graphs.clear()


def choose_update_attention(config: ModelConfig, chosen: str, tokens: int, world: World) -> str:
    """The kernel of `packed_attention` for micro-batches of `tokens` tokens, whose compilation is used again."""

    def attempt(level: str) -> None:
        segments = [Segment(start, 300, (60, 80, 70)) for start in range(0, max(1, tokens - 509), 510)]
        leaves = random_qkv(config, 510 * len(segments), torch.zeros(1, dtype=torch.bfloat16, device=world.device))
        results = []
        for kernel in (level, "sdpa"):
            q, k, v = (leaf.clone().requires_grad_() for leaf in leaves)
            out = packed_attention(tuple(segments), world.device, kernel)(0, q, k, v)
            out.sin().sum().backward()  # any gradient but a constant one
            results.append([out, q.grad, k.grad, v.grad])
        compare(*results)

    return choose("update_attention", chosen, ("flex", "sdpa"), attempt, world)


def random_qkv(config: ModelConfig, tokens: int, like: Tensor) -> list[Tensor]:
    """q [T, H, D], k and v [T, K, D] of `tokens` tokens."""
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    return [like.new_empty(tokens, count, config.head_dim).normal_() for count in heads]


def compare(fast: list[Tensor], plain: list[Tensor]) -> None:
    """Raise ArithmeticError where a fast result is not the plain one."""
    for one, other in zip(fast, plain, strict=True):
        gap = ((one.float() - other.float()).norm() / other.float().norm()).item()
        if not gap < TOLERANCE:
            raise ArithmeticError(f"its result is {gap:.1e} from the plain one")
