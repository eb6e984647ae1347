"""Sampling replies: a paged key/value cache, continuous batching, reproducible randomness.

    schedule      scheduler.py says what to run: a packed prefill, or one token for every running sequence
    run           the model on that step, and sampling; on CUDA a decode step is one replay of a graph
    postprocess   scheduler.py takes the tokens; finished sequences leave, waiting ones start

A prompt is computed once per group and its blocks are shared. A sampled token depends only on (seed, step, key, sample,
position), so a reply does not depend on the batch it was sampled in, on the rank, the blocks or the order.
"""

import gc
import math
import os
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import tooln1.sampler.kv_cache as kv_cache
from tooln1.data import Rollout
from tooln1.grpo import mask_padded_vocab
from tooln1.model import Attend, Transformer
from tooln1.sampler.kv_cache import KVCache, to_device
from tooln1.sampler.paged_attention import FlexDecode, GatheredDecode, PrefillAttention
from tooln1.sampler.sampling import SamplingParams, reply_streams, sample_tokens, uniforms
from tooln1.sampler.scheduler import BlockManager, Scheduler, Sequence, SequenceGroup, Stats, Step


class Sampler:
    """Samples groups of replies from an unsharded model, whose weights may change in place between calls.

    stop_ids: token ids that end a reply and belong to it. max_num_seqs: replies sampled at once (0: all, on CUDA 512).
    cache_tokens, block_size: size of the key/value cache (0: see `plan_cache`) and of its blocks (0: 128 on CUDA, else
    32), in tokens. max_prefill_tokens: computed in one prefill step (0: 16384 on CUDA, else 2048). free_bytes: memory
    that weights, training and CUDA leave, of which the cache may take half (None: all that is there at the first call).
    """

    def __init__(
        self,
        model: Transformer,
        stop_ids: Iterable[int],
        max_num_seqs: int = 0,
        cache_tokens: int = 0,
        block_size: int = 0,
        max_prefill_tokens: int = 0,
        free_bytes: int | None = None,
    ):
        self.model, self.stop_ids, self.device = model, frozenset(stop_ids), model.head.device
        self.cuda = self.device.type == "cuda"
        self.max_num_seqs = max_num_seqs or (kv_cache.CUDA_MAX_NUM_SEQS if self.cuda else 0)
        self.block_size = block_size or (kv_cache.CUDA_BLOCK_SIZE if self.cuda else kv_cache.CPU_BLOCK_SIZE)
        self.max_prefill_tokens = max_prefill_tokens or (16384 if self.cuda else 2048)
        self.cache_tokens, self.free_bytes = cache_tokens, free_bytes
        self.decode = "graph" if self.cuda else "gathered"  # or "eager": what the graph runs, without a graph
        self.lookahead = int(self.cuda)  # steps launched before the tokens of the last one are read
        self.cache: KVCache | None = None
        # of each sequence, and one unused; graphs are made for one size, which is more than most calls need
        self.last_tokens = torch.zeros(1 << 16, dtype=torch.int64, device=self.device)
        self.graphs: dict[tuple[int, SamplingParams], _DecodeGraph] = {}
        self.drop_graphs()
        self.stats = Stats()  # of the last call

    def generate(
        self,
        prompts: list[list[int]],
        group_size: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int | list[int] = 256,
        seed: int = 0,
        step: int = 0,
        keys: list[int] | None = None,
        top_p: float = 1.0,
        top_k: int = 0,
        on_finished: Callable[[Rollout], None] | None = None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[Rollout]:
        """`group_size` replies to each prompt (token ids), in prompt order.

        max_new_tokens: one number, one per prompt, or one per reply (prompt by prompt). Temperature 0 is greedy.
        keys: name the prompts for the randomness (default: their index). on_finished: gets each reply as it finishes.
        should_stop: called before each step of the model; when it is true the call ends and returns [].
        Raises ValueError for an empty prompt, one longer than the model's context or the cache, limits below 1, and
        logits that are not finite; the sampler stays usable. A reply may exceed the model's context.
        """
        limits = _reply_limits(max_new_tokens, len(prompts), group_size)
        context = self.model.config.raw.get("max_position_embeddings") or math.inf
        for i, prompt in enumerate(prompts):
            if not 0 < len(prompt) < context:
                raise ValueError(f"prompt {i} has {len(prompt)} tokens, not 1 to {context - 1} (the model's context)")
        groups = [SequenceGroup(i, prompt) for i, prompt in enumerate(prompts)]
        of_group = torch.tensor(range(len(prompts)) if keys is None else keys, dtype=torch.int64)
        samples = torch.arange(group_size).repeat(len(prompts))
        streams = reply_streams(seed, step, of_group.repeat_interleave(group_size), samples).tolist()
        for i, (limit, stream) in enumerate(zip(limits, streams, strict=True)):
            group = groups[i // group_size]
            group.seqs.append(Sequence(group, i, i % group_size, limit, stream))
        num_seqs = min(self.max_num_seqs or len(limits), len(limits))
        self._reserve([seq for group in groups for seq in group.seqs], num_seqs)
        longest_first = sorted(groups, key=lambda group: -len(group.prompt))  # so that running out of cache fails early
        blocks = BlockManager(self.cache.num_blocks, self.block_size)
        scheduler = Scheduler(longest_first, blocks, num_seqs, self.max_prefill_tokens, self.stop_ids)
        try:
            self._sample_all(scheduler, SamplingParams(temperature, top_k, top_p), on_finished, should_stop)
        except BaseException:
            self.cache.data.zero_()  # no NaN may stay in the blocks
            raise
        self.stats = scheduler.stats
        return [] if scheduler.num_unfinished else [_rollout(seq) for group in groups for seq in group.seqs]

    def drop_graphs(self) -> None:
        """Forget all graphs. Further ones need a new pool: torch refuses one whose graphs are all gone."""
        self.graphs.clear()
        self.graph_pool = torch.cuda.graph_pool_handle() if self.cuda else None

    def release_weights(self) -> None:
        """Free the model's weights, and the graphs, which read them at their addresses, until they are copied anew."""
        self.drop_graphs()
        for parameter in self.model.parameters():
            parameter.untyped_storage().resize_(0)

    @torch.inference_mode()
    def _sample_all(
        self,
        scheduler: Scheduler,
        params: SamplingParams,
        on_finished: Callable[[Rollout], None] | None,
        should_stop: Callable[[], bool],
    ) -> None:
        """Schedule, run, postprocess, until every sequence has finished."""
        launched = deque()  # (sequences, their tokens and log-probs, event after the copy to the host)
        while scheduler.num_unfinished and not should_stop():
            step = scheduler.schedule()
            if step:
                sampled = self._run(step, params).to("cpu", non_blocking=True)
                copied = torch.cuda.current_stream().record_event() if self.cuda else None
                launched.append((step.seqs, sampled, copied))
            while len(launched) > (self.lookahead if step else 0):
                seqs, sampled, copied = launched.popleft()
                if copied:
                    copied.synchronize()
                for seq in scheduler.postprocess(seqs, sampled[0].long().tolist(), sampled[1].tolist()):
                    if on_finished:
                        on_finished(_rollout(seq))

    def _run(self, step: Step, params: SamplingParams) -> Tensor:
        """Launch a step on the device: token and log-prob of each of its sequences, fp64 [2, B]."""
        if step.copies:
            self.cache.copy_blocks(step.copies)
        if step.prefills:
            return self._prefill(step, params)
        if self.decode == "gathered":
            return self._decode(self._inputs(step.seqs), GatheredDecode(self.cache, step.seqs), params)
        count = len(step.seqs)
        size = next((size for size in (8, 16, 32) if count <= size), -(-count // 64) * 64)
        if (size, params) not in self.graphs:
            self.graphs[size, params] = _DecodeGraph(self, size, params)
        return self.graphs[size, params].run(self, step.seqs)

    def _prefill(self, step: Step, params: SamplingParams) -> Tensor:
        """Compute the prompts (and replies of preempted sequences), and sample where they end."""
        tokens, positions, ends = [], [], []
        for seq, start, num_samples in step.prefills:
            tokens += seq.token_ids[start:]
            positions += range(start, seq.num_tokens)
            ends += [len(tokens) - 1] * num_samples
        attend = PrefillAttention(self.cache, step.prefills)
        hidden = self.model(*to_device([tokens, positions], self.device), attend)  # [T, C]
        return self._sample(hidden[to_device(ends, self.device)], self._inputs(step.seqs), params)

    def _decode(self, inputs: Tensor, attend: Attend, params: SamplingParams) -> Tensor:
        """One more token for each sequence."""
        rows, positions, _, _ = inputs
        return self._sample(self.model(self.last_tokens[rows], positions, attend), inputs, params)

    def _sample(self, hidden: Tensor, inputs: Tensor, params: SamplingParams) -> Tensor:
        """Token and log-prob, fp64 [2, B], from hidden states [B, C]."""
        rows, _, streams, indices = inputs
        logits = mask_padded_vocab(F.linear(hidden, self.model.head).float(), self.model.vocabulary)  # [B, V]
        token, logprob = sample_tokens(logits, uniforms(streams, indices), *params)
        self.last_tokens[rows] = token
        return torch.stack((token.double(), logprob.double()))  # one copy to the host; fp64 holds ids exactly

    def _inputs(self, seqs: list[Sequence]) -> Tensor:
        """Row in last_tokens, position of the last token, random stream, index in the reply: int64 [4, B]."""
        inputs = [(seq.index, seq.num_cached_tokens - 1, seq.stream, seq.num_sampled - 1) for seq in seqs]
        return to_device(np.array(inputs).T, self.device)

    def _reserve(self, seqs: list[Sequence], num_seqs: int) -> None:
        """Make the cache and last_tokens large enough for the sequences of a call, `num_seqs` of them at once.

        On CUDA once for all calls, because kernels and graphs are compiled for them.
        """
        if len(seqs) >= len(self.last_tokens):
            self.drop_graphs()
            self.last_tokens = torch.zeros(len(seqs) + 1, dtype=torch.int64, device=self.device)
        config, like = self.model.config, self.model.head
        lengths = [(len(seq.group.prompt), seq.max_new_tokens) for seq in seqs]
        if self.cache is None or not self.cuda:
            if self.free_bytes is None:
                self.free_bytes = _free_bytes(self.device)
            need = (self.max_num_seqs, self.cache_tokens) if self.cuda else (num_seqs, self.cache_tokens, lengths)
            num_blocks = kv_cache.plan_cache(config, like.element_size(), self.free_bytes, self.block_size, *need)
            if self.cache is None or num_blocks > self.cache.num_blocks:
                self.drop_graphs()
                self.cache = None  # free the old one first
                self.cache = KVCache(config, num_blocks, self.block_size, like)
        most, size = max(map(sum, lengths), default=0), self.cache.num_blocks * self.block_size
        if most > size:
            raise ValueError(
                f"a prompt and its reply may need {most} tokens of cache, which holds {size}: raise cache_tokens "
                "(rollout_cache_tokens in a run's settings), or lower max_new_tokens"
            )


class _DecodeGraph:
    """A decode step padded to `size` sequences; its inputs are overwritten before each run, as CUDA graphs require.

    It reads the weights at their address: they may be updated in place, never moved.
    """

    def __init__(self, sampler: Sampler, size: int, params: SamplingParams):
        self.params = params
        self.inputs = torch.zeros((4, size), dtype=torch.int64, device=sampler.device)
        self.block_table = torch.zeros((size, sampler.cache.num_blocks + 1), dtype=torch.int32, device=sampler.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if sampler.decode == "graph":
            self.inputs[0] = len(sampler.last_tokens) - 1
            self._capture(sampler)

    def run(self, sampler: Sampler, seqs: list[Sequence]) -> Tensor:
        """Token and log-prob of each sequence, fp64 [2, B]; padding reads and writes block 0 and the last row."""
        count = len(seqs)
        table = np.zeros((count, max(len(seq.block_table) for seq in seqs)), dtype=np.int64)
        for line, seq in zip(table, seqs, strict=True):
            line[: len(seq.block_table)] = seq.block_table
        self.inputs.zero_()
        self.inputs[0] = len(sampler.last_tokens) - 1
        self.inputs[:, :count] = sampler._inputs(seqs)
        self.block_table[:count, : table.shape[1]] = to_device(table, sampler.device)
        self.block_table[count:, 0] = 0
        if self.graph:
            self.graph.replay()
        else:
            self.sampled = self._step(sampler)
        return self.sampled[:, :count]

    def _step(self, sampler: Sampler) -> Tensor:
        attend = FlexDecode(sampler.cache, self.block_table, self.inputs[1])
        return sampler._decode(self.inputs, attend, self.params)

    def _capture(self, sampler: Sampler) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and fills the allocator's and cuBLAS's pools
            for _ in range(3):
                self._step(sampler)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph, usual_stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        gc.collect()
        gc.disable()  # an object that is freed during the capture may call CUDA, which would end it
        try:
            # thread_local: NCCL's watchdog may call CUDA meanwhile. One pool: graphs never run side by side.
            with torch.cuda.graph(self.graph, pool=sampler.graph_pool, capture_error_mode="thread_local"):
                self.sampled = self._step(sampler)
        except Exception:  # torch leaves its own stream current and, in most cases, the allocator in the graphs' pool
            torch.cuda.set_stream(usual_stream)
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(sampler.device.index, sampler.graph_pool)
            raise
        finally:
            gc.enable()


def _rollout(seq: Sequence) -> Rollout:
    """A reply that has finished."""
    return Rollout(seq.group.index, seq.sample, seq.group.prompt, seq.reply, seq.logprobs, seq.stopped)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return max(0, torch.cuda.mem_get_info(device)[0] - kv_cache.CUDA_RESERVE)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _reply_limits(max_new_tokens: int | list[int], num_prompts: int, group_size: int) -> list[int]:
    """max_new_tokens of each reply, prompt by prompt, from one number, one per prompt or one per reply."""
    limits = [max_new_tokens] * num_prompts if isinstance(max_new_tokens, int) else max_new_tokens
    if len(limits) == num_prompts:
        limits = [limit for limit in limits for _ in range(group_size)]
    if len(limits) != num_prompts * group_size:
        raise ValueError(f"{num_prompts} prompts with {group_size} replies each, but {len(limits)} max_new_tokens")
    if group_size < 1 or min(limits, default=1) < 1:
        raise ValueError(f"group_size ({group_size}) and max_new_tokens ({min(limits, default=1)}) must be at least 1")
    return limits
