"""What perf/gpu.py measures of Qwen2.5's shapes with random weights: rollout and update, beside what limits them.

A part is a generator of (table, rows), so what it has measured is saved even if it does not come to its end. The limit
of a piece of work is max(FLOPs / rate of a large matrix product, bytes / bandwidth of a large copy), both measured in
the same process; a loss is the time beyond that.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from rollout import Peer, transformers
from shapes import lognormal_lengths, median_seconds, qwen2, qwen2p5, random_prompts, seconds_of, synchronize
from torch.autograd import DeviceType
from torch.profiler import profile
from update import GROUP, packed, random_rollouts

from tooln1.distributed import launch, shard
from tooln1.io.model_config import ModelConfig
from tooln1.model import Transformer, random_model
from tooln1.sampler.kv_cache import kv_bytes_per_token
from tooln1.sampler.sampler import Sampler
from tooln1.update import PolicyLoss, add_logprobs, optimizer_step

Row = dict[str, object]
Tables = Iterator[tuple[str, list[Row]]]
DECODE_GOALS = {"7B": 0.6, "3B": 0.5, "1.5B": 0.4}  # share of the limit, at 320 rows
MATMUL_GOAL, GENERATE_GOAL = 0.45, 8  # share of the matmul rate, in prefill and update; times transformers' generate


class Scale(NamedTuple):
    """How much work a part does; the defaults are for a card."""

    device: str = "cuda"
    shape: Callable[[str], ModelConfig] = qwen2p5  # of a size
    vocab: int = 151_665  # ids that a tokenizer would have
    rows: tuple[int, ...] = (8, 64, 320, 512)  # sequences that decode together; the last but one is looked at closely
    prompts: tuple[int, ...] = (64, 256)  # of a batch; the first number is also that of a prefill
    prompt: int = 728  # mean tokens, in the paper's data as the released files have it
    reply: int = 105  # mean tokens
    steps: int = 64  # decode steps to time
    cache_tokens: int = 327_680  # the same for all calls of a process, because kernels are compiled for it
    budget: int = 16384  # tokens of a micro-batch; an update has about four
    matrix: int = 8192  # the measured matrix product is of [matrix, matrix]
    train: tuple[int, int, int, int] = (6, 128, 32, 128)  # train.py: steps, prompts, of a mini-batch, cap on a reply


TINY = qwen2(64, 2, 4, 2, 96, 1600, tied=True)
DRY_RUN = Scale("cpu", lambda size: TINY, 1590, (5, 10, 15), (2, 3), 24, 6, 16, 4096, 256, 64, (4, 4, 2, 8))


class Limits(NamedTuple):
    """What the device can do."""

    flops_per_s: float  # of a large bf16 matrix product
    bytes_per_s: float  # read and written by a large copy

    def seconds(self, flops: float, moved: float) -> float:
        """The least time for so many floating-point operations and bytes."""
        return max(flops / self.flops_per_s, moved / self.bytes_per_s)


def measured_limits(scale: Scale) -> Limits:
    """Both, on the scale's device."""
    n = scale.matrix
    a, b = (torch.randn(n, n, device=scale.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(16 * n * n, device=scale.device)  # 4 GiB on a card
    target = torch.empty_like(source)
    rate = 2 * n**3 / median_seconds(lambda: a @ b, 20)
    return Limits(rate, 2 * source.nbytes / median_seconds(lambda: target.copy_(source), 10))


def forward_flops(config: ModelConfig, tokens: float, predicted: float, pairs: float) -> tuple[float, float]:
    """FLOPs of the matrix products, and of attention, in a pass over `tokens` with logits for `predicted` of them.

    pairs: (query, key) pairs that attention looks at.
    """
    head = config.vocab_size * config.hidden_size
    blocks = config.num_parameters - head * (1 if config.tie_word_embeddings else 2)
    queries = config.num_attention_heads * config.head_dim
    return 2 * blocks * tokens + 2 * head * predicted, 4 * queries * config.num_hidden_layers * pairs


# ------------------------------------------------------------------------------------------------ where the time goes

KINDS = {  # kind of kernel -> what its name contains; the first that fits counts
    "attention": "flash|fmha|flex|sdpa|attention|triton_tem",
    "matmul": "gemm|gemv|nvjet|cutlass|xmma|splitk|aten::mm|aten::addmm",
    "optimizer, gradient norm": "adam|multi_tensor|foreach",
    "sampling, softmax, reductions": "softmax|scan|cumsum|logsumexp|sort|topk|argmax|reduce",
    "copies, casts, gathers": "memcpy|memset|copy|catarray|index|gather|scatter|fill|nccl|embedding",
    "norm, elementwise": "elementwise|norm|silu|triton|aten::mul|aten::add",
    "other": "",
}


def losses(work: str, record: profile, count: int, seconds: float, needed: dict[str, float]) -> list[Row]:
    """The five kinds of kernel that took most beyond what they needed in one of `count` profiled pieces of work.

    seconds: of one, without the profiler; what no kernel accounts for is a kind of its own. needed: seconds by kind,
    0 where it is not named.
    """
    spent, largest = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, (0.0, ""))
    for event in record.key_averages():
        on_gpu = event.device_type == DeviceType.CUDA
        if on_gpu == torch.cuda.is_available() and not event.is_user_annotation:
            took = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6 / count
            kind = next(kind for kind, words in KINDS.items() if re.search(words, event.key, re.IGNORECASE))
            spent[kind] += took
            largest[kind] = max(largest[kind], (took, event.key))
    spent["gaps between kernels"] = max(0.0, seconds - sum(spent.values()))
    rows = []
    for kind, took in spent.items():
        limit, (_, name) = needed.get(kind, 0.0), largest.get(kind, (0.0, ""))
        row = {"work": work, "kind": kind, "ms": 1e3 * took, "limit ms": 1e3 * limit, "lost ms": 1e3 * (took - limit)}
        rows.append(row | {"largest kernel": name[:60]})
    return sorted(rows, key=lambda row: -row["lost ms"])[:5]


# ------------------------------------------------------------------------------------------------ rollout


def rollout(scale: Scale, size: str) -> Tables:
    """Prefill, decode at several numbers of rows, whole batches, and transformers' generate."""
    limits = measured_limits(scale)
    yield "limits", [limits._asdict()]
    model = random_model(scale.shape(size), 0, torch.bfloat16, scale.device)
    model.vocabulary = scale.vocab
    sampler = Sampler(model, [], cache_tokens=scale.cache_tokens)
    yield "prefill", [prefill(sampler, scale, limits)]
    for rows in scale.rows:
        step, lost = decode(sampler, scale, limits, rows)
        yield "decode", [step | {"goal": DECODE_GOALS[size] if rows == 320 else ""}]
        if rows == scale.rows[-2]:
            yield "losses", lost
    ours = [batch(sampler, scale, count) for count in scale.prompts]
    yield "batches", ours
    if transformers:
        del sampler
        gc.collect()  # its cache's memory is the peer's now
        yield "generate", [generate(model, scale, ours[0])]


def workload(scale: Scale, count: int, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Prompts of random tokens, as long as the data's, and the number of tokens of each of their replies."""
    rng = random.Random(seed)
    prompts = random_prompts(rng, lognormal_lengths(rng, count, scale.prompt, 0.5, 3 * scale.prompt), scale.vocab)
    return prompts, lognormal_lengths(rng, count * GROUP, scale.reply, 0.8, 8 * scale.reply)


def prefill(sampler: Sampler, scale: Scale, limits: Limits) -> Row:
    """Prompts of one token each: the share of the matmul rate that their FLOPs need; lengths never seen, and again."""
    for seed in range(3):
        prompts, _ = workload(scale, scale.prompts[0], seed)
        new, again = (seconds_of(lambda prompts=prompts: sampler.generate(prompts, 1, 0.7, 1)) for _ in range(2))
    tokens, pairs = sum(map(len, prompts)), sum(len(prompt) ** 2 / 2 for prompt in prompts)
    share = sum(forward_flops(sampler.model.config, tokens, len(prompts), pairs)) / limits.flops_per_s / again
    row = {"prompt tokens": tokens, "s, new lengths": new, "s": again, "tokens/s": tokens / again}
    return row | {"of matmul rate": share, "goal": MATMUL_GOAL}


def decode(sampler: Sampler, scale: Scale, limits: Limits, rows: int) -> tuple[Row, list[Row]]:
    """A decode step of about `rows` rows in groups: its time beside its limit, and where it goes.

    `should_stop` is called before each step: from there it is timed, and some steps are profiled.
    """
    config, groups, first = sampler.model.config, max(1, rows // GROUP), 16
    (prompts, _), each = workload(scale, groups), rows // groups
    starts, calls, record = [], itertools.count(), profile()

    def run(before_each: Callable[[], None]) -> None:
        sampler.generate(prompts, each, 0.7, first + scale.steps, should_stop=before_each)

    cold = seconds_of(lambda: run(lambda: None))
    run(lambda: starts.append(time.perf_counter()))
    end, profiled = len(starts) - 4, scale.steps // 4  # the last calls only wait for results
    seconds = statistics.median(b - a for a, b in itertools.pairwise(starts[end - scale.steps : end]))

    def profile_some() -> None:
        call = next(calls)
        if call in (end - profiled, end):
            synchronize()
            (record.stop if call == end else record.start)()

    run(profile_some)
    rows, context = groups * each, each * sum(len(prompt) + first + scale.steps / 2 for prompt in prompts)
    matmul, attention = forward_flops(config, rows, rows, context)
    read, _ = forward_flops(config, 1, 1, 0)  # a weight has two bytes, and a product with it two FLOPs
    cached = kv_bytes_per_token(config, 2) * context
    limit = limits.seconds(matmul + attention, read + cached)
    needed = {"matmul": limits.seconds(matmul, read), "attention": limits.seconds(attention, cached)}
    step = {"rows": rows, "first call s": cold, "ms/step": 1e3 * seconds, "limit ms": 1e3 * limit}
    step |= {"tokens/s": rows / seconds, "preemptions": sampler.stats.preemptions, "of limit": limit / seconds}
    return step, losses(f"decode step of {rows} rows", record, profiled, seconds, needed)


def batch(sampler: Sampler, scale: Scale, count: int) -> Row:
    """`count` prompts with ragged replies, from the first prefill to the last token."""
    prompts, lengths = workload(scale, count)
    seconds = median_seconds(lambda: sampler.generate(prompts, GROUP, 0.7, lengths), 2)
    row = {"prompts": count, "new tokens": sum(lengths), "s": seconds, "tokens/s": sum(lengths) / seconds}
    row |= {"preemptions": sampler.stats.preemptions, "decode graphs": len(sampler.graphs)}
    return row | {"peak GiB": torch.cuda.max_memory_allocated() / 2**30}


def generate(model: Transformer, scale: Scale, ours: Row) -> Row:
    """transformers' generate on the first batch, at the better of two numbers of prompts at once, if both fit."""
    count, peer, tried = scale.prompts[0], Peer(model), {}
    prompts, lengths = workload(scale, count)
    peer.sample(prompts[:2], GROUP, lengths[: 2 * GROUP], 2)
    for at_once in (count, count // 2):
        with contextlib.suppress(torch.OutOfMemoryError):
            tried[at_once] = seconds_of(lambda n=at_once: peer.sample(prompts, GROUP, lengths, n))
    best = min(tried, key=tried.get)
    row = {"ours, tokens/s": ours["tokens/s"], "generate, tokens/s": sum(lengths) / tried[best]}
    row |= {"its prompts at once": best, "transformers": transformers.__version__}
    return row | {"times": tried[best] / ours["s"], "goal": GENERATE_GOAL}


# ------------------------------------------------------------------------------------------------ update


def update(scale: Scale, size: str) -> Tables:
    """Log-probs without gradients, and an update with recomputed layers, of about four micro-batches."""
    config, limits = scale.shape(size), measured_limits(scale)
    yield "limits", [limits._asdict()]
    with launch(scale.device) as world:
        policy = random_model(config, 0, device=scale.device)
        policy.vocabulary = scale.vocab
        for block in policy.model.layers:
            block.recompute = True
        policy = shard(policy, world, torch.bfloat16, accumulate_unsharded=config.num_parameters < 2e9)  # as "auto"
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, fused=True)
        groups = round(4 * scale.budget / (scale.prompt + GROUP * scale.reply))
        batches = packed(*random_rollouts(groups, scale.vocab, scale.prompt, scale.reply), scale.budget, policy)
        tokens, replies = sum(len(b.tokens) for b in batches), sum(len(b.targets) for b in batches)
        segments = [segment for b in batches for segment in b.segments]
        pairs = sum(s.prompt**2 / 2 + sum(s.prompt * reply + reply**2 / 2 for reply in s.replies) for s in segments)
        matmul, attention = forward_flops(config, tokens, replies, pairs)

        loss = PolicyLoss()
        logprobs = partial(add_logprobs, batches, policy, None, loss.temperature, loss.chunk)
        filled = [replace(b, ref_logprobs=b.old_logprobs) for b in logprobs()[0]]
        step = partial(optimizer_step, policy, optimizer, filled, loss, replies, 1.0, 0.0)

        def row(phase: str, seconds: float, needed: int, executed: int) -> Row:
            """needed, executed: forward passes; a backward pass counts as two, and repeats one."""
            share = (matmul + attention) / limits.flops_per_s / seconds
            row = {"phase": phase, "tokens": tokens, "s": seconds, "tokens/s": tokens / seconds}
            row |= {"peak GiB": torch.cuda.max_memory_allocated() / 2**30, "MFU with the repeated": executed * share}
            return row | {"MFU": needed * share, "goal": MATMUL_GOAL if needed > 1 else ""}

        yield "update", [row("log-probs", median_seconds(logprobs), 1, 1)]
        seconds = median_seconds(step)
        yield "update", [row("update", seconds, 3, 4)]
        with profile() as record:
            step()
            synchronize()
        needed = {"matmul": 3 * matmul / limits.flops_per_s, "attention": 3 * attention / limits.flops_per_s}
        # Adam reads four numbers per parameter, its gradient among them, and writes three.
        needed["optimizer, gradient norm"] = limits.seconds(0, 7 * 4 * config.num_parameters)
        yield "losses", losses("update", record, 1, seconds, needed)
        if scale.device == "cuda":
            for block in policy.model.layers:
                block.compile_parts()
            yield "update", [row("update, --compile", median_seconds(step), 3, 4)]
