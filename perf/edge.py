"""The edge of the load: prompts of up to 4,096 and replies of up to 8,192 tokens on many ranks, without a model.

    python perf/edge.py                     # the tables of docs/scale.md

What runs is the program's own: dealing, scheduler, block manager, plan of micro-batches. A reply is a length, drawn
beforehand, and a rank has a clock: a decode step takes START + ROW · rows + CACHED · cached tokens, a prefill START +
ROW · tokens. That is counted for Qwen2.5-7B in bf16 on an H100, not measured: weights read at 80% and the cache at 60%
of 3.35 TB/s, products at 50% of 989 TFLOP/s, one after the other.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shapes import lognormal_lengths, qwen2p5

from tooln1.batch import _group_runs, _measured, plan_microbatches, split_into_minibatches
from tooln1.io.model_config import pair_cost
from tooln1.sampler.distributed import generate_distributed
from tooln1.sampler.kv_cache import CUDA_BLOCK_SIZE, CUDA_MAX_NUM_SEQS, kv_bytes_per_token
from tooln1.sampler.scheduler import BlockManager, Scheduler, Sequence, SequenceGroup

MODEL = qwen2p5("7B")
START = 2 * MODEL.num_parameters / (0.8 * 3.35e12)  # seconds
ROW = 2 * MODEL.num_parameters / (0.5 * 989e12)
CACHED = kv_bytes_per_token(MODEL, 2) / (0.6 * 3.35e12)
CACHE_BYTES = 8.9e9  # docs/training.md: 7B on 8 GPUs of 80 GB
PREFILL, PROMPT, REPLY, GROUP, MINIBATCH, BUDGET = 16384, 4096, 8192, 5, 256, 30720  # tokens, replies, prompts
SIGMA = {105: 1.58, 1000: 1.0}  # of the lognormal lengths by their mean; the longest of 5,120 replies meets the limit


class Rank:
    """The sampler of one rank, with a clock in place of a model."""

    def __init__(self, cache_bytes: float):
        num_blocks = int(cache_bytes / kv_bytes_per_token(MODEL, 2) / CUDA_BLOCK_SIZE)
        self.blocks = BlockManager(num_blocks, CUDA_BLOCK_SIZE)
        self.scheduler = Scheduler([], self.blocks, CUDA_MAX_NUM_SEQS, PREFILL, {1})
        self.launched, self.clock, self.steps = deque(), 0.0, 0

    def add(self, index: int, prompt: int, lengths: list[int]) -> None:
        """Queue a prompt and its replies; a sequence's `stream`, which decides its tokens, is its length."""
        group = SequenceGroup(index, range(prompt))
        group.seqs += [Sequence(group, 0, sample, REPLY, length) for sample, length in enumerate(lengths)]
        self.scheduler.waiting.append(group.seqs[0])
        self.scheduler.num_unfinished += len(lengths)

    def step(self) -> None:
        """What the sampler's loop does once, with tokens one step late as on CUDA; checks blocks now and then."""
        step, scheduler, blocks = self.scheduler.schedule(), self.scheduler, self.blocks
        if step:
            computed = [seq.num_cached_tokens - start for seq, start, _ in step.prefills]
            assert sum(computed[:-1]) < PREFILL, "a prefill goes on when its budget is used up"
            decoding = [] if computed else [seq.num_cached_tokens for seq in step.seqs]
            self.clock += START + ROW * (sum(computed) + len(decoding)) + CACHED * sum(decoding)
            self.launched.append((step.seqs, [int(seq.num_sampled >= seq.stream) for seq in step.seqs]))
        while len(self.launched) > (1 if step else 0):
            seqs, tokens = self.launched.popleft()
            scheduler.postprocess(seqs, tokens, [0.0] * len(seqs))
        self.steps += 1
        if self.steps % 64 == 0 or not scheduler.num_unfinished:
            assert len(scheduler.running) <= scheduler.max_num_seqs
            held = sum([seq.block_table for seq in scheduler.running], [])
            held += sum([group.prompt_blocks for group in scheduler.starting], [])
            assert len(held) == sum(blocks.ref_count)  # and each block is held or free, none both or lost:
            assert sorted([*set(held), *blocks.free_blocks]) == [*range(1, blocks.num_blocks + 1)]


def load(mean: int, prompts: int = 1024) -> tuple[list[int], list[list[int]]]:
    """Lengths of the prompts and of the replies to each; one of both meets its limit."""
    rng = random.Random(0)
    replies = lognormal_lengths(rng, prompts * GROUP, mean, SIGMA[mean], REPLY)
    replies[rng.randrange(len(replies))] = REPLY
    lengths = lognormal_lengths(rng, prompts - 1, 728, 0.6, PROMPT)
    return [PROMPT, *lengths], [replies[start : start + GROUP] for start in range(0, len(replies), GROUP)]


def dealt(prompts: list[int], ranks: int) -> list[deque[int]]:
    """The prompts of each rank as the program deals them, in the order in which a sampler starts them."""
    shares: list[list[int]] = []
    sampler = SimpleNamespace(generate=lambda _, keys, **__: shares.append(keys) or [])
    for rank in range(ranks):
        world = SimpleNamespace(rank=rank, size=ranks, gather=list)
        generate_distributed(sampler, world, [range(n) for n in prompts], range(len(prompts)), GROUP, REPLY)
    return [deque(sorted(share, key=lambda i: -prompts[i])) for share in shares]


def simulate(prompts, replies, queues: list[deque[int]], rows: float = math.inf, cache_bytes=CACHE_BYTES) -> list[Rank]:
    """The ranks after their last replies. A rank takes prompts from its queue while it has fewer than `rows` replies
    to go; where all ranks have the same queue, which the program does not do, the next one goes to who is first.
    """
    ranks = [Rank(cache_bytes) for _ in queues]
    working = [(0.0, number) for number in range(len(ranks))]
    while working:
        _, number = heapq.heappop(working)
        rank, queue, taken = ranks[number], queues[number], 0  # tokens
        while queue and taken < PREFILL and rank.scheduler.num_unfinished + GROUP <= rows:
            taken += prompts[queue[0]]
            rank.add(queue[0], prompts[queue[0]], replies[queue.popleft()])
        if rank.scheduler.num_unfinished:
            rank.step()
            heapq.heappush(working, (rank.clock, number))
    return ranks


def update(prompts: list[int], replies: list[list[int]], ranks: int) -> tuple[float, float, float]:
    """Cost, in tokens, of the updates of a step: the mean over ranks, that or the largest reply, and as planned.

    A micro-batch takes as long as that of the rank with most to do.
    """
    lengths = [(group, reply) for group in range(len(prompts)) for reply in replies[group]]
    rollouts = [SimpleNamespace(group=i, prompt=range(prompts[i]), reply=range(n), finished=True) for i, n in lengths]
    pairs, means, bounds, planned = pair_cost(MODEL), [], [], []
    for rows in split_into_minibatches(rollouts, range(len(rollouts)), MINIBATCH):
        costs = [
            [sum(_measured(rollouts, run, pairs).cost for run in _group_runs(rollouts, part)) for part in share]
            for share in plan_microbatches(rollouts, rows, BUDGET, ranks, pairs)
        ]
        means.append(sum(map(sum, costs)) / ranks)
        bounds.append(max(means[-1], *(_measured(rollouts, [row], pairs).cost for row in rows)))
        planned.append(sum(map(max, zip(*costs, strict=True))))
    return sum(means), sum(bounds), sum(planned)


def main() -> None:
    for mean, count in itertools.product(SIGMA, (8, 32, 256)):
        prompts, replies = load(mean)
        average, bound, planned = update(prompts, replies, count)
        print(f"| update | {mean} | {count} | {average:.0f} | {bound:.0f} | {planned:.0f} | {planned / bound:.2f} |")
        reply, prompt = max((max(replies[i]), prompts[i]) for i in range(len(prompts)))
        longest = START + ROW * prompt + reply * (START + ROW + CACHED * (prompt + reply / 2))  # by itself
        shared, half = [deque(range(len(prompts)))] * count, len(prompts) * GROUP // count // 2
        for how, queues, rows in (("dealt", dealt(prompts, count), math.inf), (f"taken, {half}", shared, half)):
            ranks = simulate(prompts, replies, queues, rows)
            clocks, stats = [rank.clock for rank in ranks], [rank.scheduler.stats for rank in ranks]
            average, slowest = sum(clocks) / count, max(clocks)
            told = f"{average:.1f} | {longest:.1f} | {slowest:.1f} | {slowest / max(average, longest):.2f}"
            told += f" | {sum(one.preemptions for one in stats)} | {sum(one.recomputed for one in stats)}"
            print(f"| rollout, {how} | {mean} | {count} | {told} |", flush=True)


if __name__ == "__main__":
    main()
