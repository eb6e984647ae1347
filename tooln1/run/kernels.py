"""Which attention kernels a run uses: the first of these that works on this machine, tried before the first step.

rollout_decode     graph      FlexAttention over the cache's blocks, a decode step captured as a CUDA graph
                   eager      the same, launched kernel by kernel
                   gathered   plain attention over copies of the blocks; the CPU's
update_attention   flex       FlexAttention over the packed stream
                   sdpa       plain attention, a few calls for each prompt; the CPU's
"""

import gc
import sys
from collections.abc import Callable

import torch

from tooln1.attention import Segment, packed_attention
from tooln1.distributed import World
from tooln1.io.errors import UserError
from tooln1.io.model_config import ModelConfig
from tooln1.run.faults import OUT_OF_MEMORY
from tooln1.sampler.sampler import Sampler


def choose(setting: str, chosen: str, levels: tuple[str, ...], attempt: Callable[[str], None], world: World) -> str:
    """`chosen`, or for "auto" the first of `levels` whose attempt raises on no rank (a collective).

    The last level is not tried; it is the CPU's. Lack of memory is no reason for a later level.
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
        except Exception as error:  # the compiler, Triton, gcc and CUDA raise many kinds
            if any(words in str(error) for words in OUT_OF_MEMORY):
                raise
            cause = error.__context__ or error  # in a capture the first error is the cause
            failures.append(f"{level} ({type(cause).__name__}: {' '.join(str(cause).split())[:200]})")
        torch._dynamo.reset()
        gc.collect()
    failures = max(world.gather([failures]), key=len)
    level = levels[len(failures)]
    if failures and world.is_main:
        print(f"warning: {setting} is {level}, which is slower; failed: {', '.join(failures)}", file=sys.stderr)
    return level


def choose_decode(sampler: Sampler, chosen: str, world: World) -> None:
    """Set the sampler's `decode`; an attempt decodes a token for eight prompts of two blocks."""

    def attempt(level: str) -> None:
        logprobs = []
        for sampler.decode in (level, "gathered"):
            replies = sampler.generate([[i] * 130 for i in range(8)], temperature=0.0, max_new_tokens=2)
            logprobs.append(torch.tensor([reply.logprobs[-1] for reply in replies]))
        gap = (logprobs[0] - logprobs[1]).abs().mean().item()
        if not gap < 0.1:  # logits of 16 and more have steps of 0.125 in bf16
            raise ArithmeticError(f"its log-probs are {gap:.2f} from the plain ones")

    sampler.decode = choose("rollout_decode", chosen, ("graph", "eager", "gathered"), attempt, world)
    sampler.drop_graphs()


def choose_update_attention(config: ModelConfig, chosen: str, tokens: int, world: World) -> str:
    """The kernel of `packed_attention` for micro-batches of `tokens` tokens, whose compilation is used again."""

    def attempt(level: str) -> None:
        segments = [Segment(start, 300, (60, 80, 70)) for start in range(0, max(1, tokens - 509), 510)]
        heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        like = {"dtype": torch.bfloat16, "device": world.device}
        leaves = [torch.randn(510 * len(segments), count, config.head_dim, **like) for count in heads]
        results = []
        for kernel in (level, "sdpa"):
            q, k, v = (leaf.clone().requires_grad_() for leaf in leaves)
            out = packed_attention(tuple(segments), world.device, kernel)(0, q, k, v)
            out.sin().sum().backward()  # any gradient but a constant one
            results.append([x.float() for x in (out.detach(), q.grad, k.grad, v.grad)])
        gap = max(((fast - plain).norm() / plain.norm()).item() for fast, plain in zip(*results, strict=True))
        if not gap < 2e-2:
            raise ArithmeticError(f"its result or gradient is {gap:.1e} from the plain one")

    return choose("update_attention", chosen, ("flex", "sdpa"), attempt, world)
