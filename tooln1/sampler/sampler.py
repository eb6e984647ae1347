"""Sampling replies: a paged key/value cache, continuous batching, reproducible draws.

    schedule      scheduler.py says what to run: a packed prefill or one token for every running row
    run           the model over that step, and the draw; on CUDA a decode step is one replay of a graph
    postprocess   scheduler.py takes in the tokens; ended rows leave, waiting ones come

A prompt is computed once per group and its pages are shared. Every draw depends only on (seed, step, key, sample,
position), so a reply does not depend on which rows it was sampled beside, on which rank, in which pages or order.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tooln1.data import Rollout
from tooln1.grpo import only_known
from tooln1.model import Transformer
from tooln1.sampler.paged_attention import FlexPages, GatheredPages, PagedCache, PagedSpan, PrefillAttention
from tooln1.sampler.sampling import choose, reply_streams, uniforms
from tooln1.sampler.scheduler import Group, PagePool, Row, Scheduler, Stats, Step


@dataclass(frozen=True)
class _Draw:
    """How this call turns hidden states into tokens."""

    temperature: float
    top_k: int
    top_p: float

    def __call__(self, model: Transformer, hidden: Tensor, streams: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        logits = only_known(F.linear(hidden, model.head).float(), model.vocabulary)  # [B, V]
        return choose(logits, uniforms(streams, positions), self.temperature, self.top_k, self.top_p)


class Sampler:
    """Samples groups of replies from a whole (unsharded) copy of the model, whose weights may change between calls.

    `stop_ids` end a reply and belong to it. At most `rows` replies are in flight at once (0: all, on CUDA 512). The
    cache holds `cache_tokens` (0: as many as a call can use, or `memory_share` of the memory that is free when the
    first call comes) in pages of `page_size` (0: 128 on CUDA, else 32). A prefill computes at most `prefill_tokens`.
    """

    def __init__(
        self,
        model: Transformer,
        stop_ids: Sequence[int],
        rows: int = 0,
        cache_tokens: int = 0,
        page_size: int = 0,
        prefill_tokens: int = 0,
        memory_share: float = 1 / 3,
    ):
        self.model, self.stop_ids, self.rows = model, frozenset(stop_ids), rows
        self.device = model.head.device
        self.cuda = self.device.type == "cuda"
        self.page_size = page_size or (128 if self.cuda else 32)
        self.prefill_tokens = prefill_tokens or (16384 if self.cuda else 2048)
        self.cache_tokens, self.memory_share = cache_tokens, memory_share
        self.affordable: int | None = None  # tokens of cache that memory allows; known from the first call on
        self.flex = self.cuda  # decode with FlexAttention, in graphs
        self.lookahead = int(self.cuda)  # steps launched before the tokens of the last one are looked at
        self.cache: PagedCache | None = None
        self.newest = torch.zeros(1, dtype=torch.int64, device=self.device)  # [slots + 1] each row's last token
        self.graphs: dict[tuple[int, _Draw], _DecodeGraph] = {}
        self.graph_pool = torch.cuda.graph_pool_handle() if self.cuda else None
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

        `keys` name the prompts for the randomness (default: their place in the list). `max_new_tokens` caps the
        replies: one number, one per prompt, or one per reply (prompt by prompt). Temperature 0 is greedy.
        `on_finished` is handed each reply as soon as it ends. `should_stop` is asked before each step of the model;
        once it says so the call ends with no replies at all.
        Raises ValueError for an empty prompt, one longer than the model's context or the cache, numbers out of range,
        and logits that are not finite; the sampler stays usable. A reply may run beyond the model's context.
        """
        keys = list(range(len(prompts))) if keys is None else list(keys)
        caps = _caps(max_new_tokens, len(prompts), group_size)
        _check(prompts, self.model.config.vocab_size, group_size, temperature, caps, keys, top_p, top_k)
        groups = [Group(number, prompt) for number, prompt in enumerate(prompts)]
        for group in groups:
            group.rows = [Row(group, sample, caps[group.number][sample]) for sample in range(group_size)]
        slots = min(self.rows or (512 if self.cuda else len(prompts) * group_size), len(prompts) * group_size)
        self._make_room(groups, slots)
        longest_first = sorted(groups, key=lambda group: -len(group.prompt))  # if memory is short, it shows at once
        pool = PagePool(self.cache.pages, self.page_size)
        scheduler = Scheduler(longest_first, pool, slots, self.prefill_tokens)
        samples = torch.arange(group_size).repeat(len(prompts))
        of_group = torch.tensor(keys, dtype=torch.int64).repeat_interleave(group_size)
        streams = reply_streams(seed, step, of_group, samples).tolist()
        for row, stream in zip((row for group in groups for row in group.rows), streams, strict=True):
            row.stream = stream
        try:
            self._sample(scheduler, _Draw(temperature, top_k, top_p), on_finished, should_stop)
        except BaseException:
            self.cache.data.zero_()  # what is not finite must not stay in the pages
            raise
        self.stats = scheduler.stats
        return [] if scheduler.unfinished else [_rollout(row) for group in groups for row in group.rows]

    @torch.inference_mode()
    def _sample(
        self,
        scheduler: Scheduler,
        draw: _Draw,
        on_finished: Callable[[Rollout], None] | None,
        should_stop: Callable[[], bool],
    ) -> None:
        """Schedule, run, postprocess, until every row has ended."""
        results = deque()
        while scheduler.unfinished and not should_stop():
            step = scheduler.schedule()
            if step:
                results.append((step.draws, self._run(step, draw)))
            while len(results) > (self.lookahead if step else 0):
                rows, fetch = results.popleft()
                tokens, logprobs = fetch()
                _check_finite(rows, logprobs)
                for row in scheduler.postprocess(rows, tokens, logprobs, self.stop_ids):
                    if on_finished:
                        on_finished(_rollout(row))

    # ------------------------------------------------------------------------------------------------ run

    def _run(self, step: Step, draw: _Draw) -> Callable[[], tuple[list[int], list[float]]]:
        """Start a step on the device; the function returned waits for its tokens and their log-probs."""
        if step.copies:
            self.cache.copy_pages(step.copies)
        if step.known:
            slots, tokens = self._send(np.array(step.known, dtype=np.int64).T)
            self.newest[slots] = tokens
        if step.spans:
            drawn = self._prefill(step, draw)
        elif self.flex:
            drawn = self._replay(step.rows, draw)
        else:
            numbers = self._send(_numbers(step.rows))
            tables = [row.pages for row in step.rows]
            shared = [len(row.group.prompt) // self.page_size for row in step.rows]
            drawn = self._decode(numbers, draw, GatheredPages(self.cache, tables, shared, numbers[1]))
        return _fetch(*drawn)

    def _prefill(self, step: Step, draw: _Draw) -> tuple[Tensor, Tensor]:
        """Compute the spans of a step and draw where they end; (token, log-prob), [draws] each."""
        size, spans, offset = self.page_size, [], 0
        tokens, positions, places, last = [], [], [], []
        for row, start, count, draws in ((s.row, s.start, s.count, s.draws) for s in step.spans):
            pages = row.pages[: -(-(start + count) // size)]
            spans.append(PagedSpan(offset, count, start, pages))
            position = np.arange(start, start + count)
            tokens += row.tokens(start, count)
            positions.append(position)
            places.append(np.array(pages)[position // size] * size + position % size)
            offset += count
            last += [offset - 1] * len(draws)
        stream = self._send(np.stack([np.array(tokens), np.concatenate(positions), np.concatenate(places)]))
        attend = PrefillAttention(self.cache, spans, stream[2])
        hidden = self.model(stream[0], stream[1], attend)  # [T, C]
        numbers = self._send(_numbers(step.draws, dummy=len(self.newest) - 1))
        return self._draw(hidden[self._send(np.array(last, dtype=np.int64))], numbers, draw)

    def _decode(self, numbers: Tensor, draw: _Draw, attend) -> tuple[Tensor, Tensor]:
        """One token for each row; (token, log-prob), [B] each."""
        slots, positions, _, _ = numbers
        hidden = self.model(self.newest[slots], positions, attend)  # [B, C]
        return self._draw(hidden, numbers, draw)

    def _draw(self, hidden: Tensor, numbers: Tensor, draw: _Draw) -> tuple[Tensor, Tensor]:
        slots, _, streams, drawn = numbers
        token, logprob = draw(self.model, hidden, streams, drawn)
        self.newest[slots] = token
        return token, logprob

    def _replay(self, rows: list[Row], draw: _Draw) -> tuple[Tensor, Tensor]:
        """A decode step padded to the next number of rows that a graph is kept for."""
        count = _padded_rows(len(rows))
        if (count, draw) not in self.graphs:
            self.graphs[count, draw] = _DecodeGraph(self, count, draw)
        table = np.zeros((len(rows), max(len(row.pages) for row in rows)), dtype=np.int64)
        for line, row in zip(table, rows, strict=True):
            line[: len(row.pages)] = row.pages
        token, logprob = self.graphs[count, draw].replay(self._send(_numbers(rows)), self._send(table))
        return token[: len(rows)], logprob[: len(rows)]

    def _send(self, numbers: np.ndarray) -> Tensor:
        """Numbers on the device, without waiting for it."""
        tensor = torch.from_numpy(np.ascontiguousarray(numbers))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.cuda else tensor

    # ------------------------------------------------------------------------------------------------ memory

    def _make_room(self, groups: list[Group], slots: int) -> None:
        """A cache for these prompts and tables for so many rows; graphs that knew others are dropped."""
        config, size = self.model.config, self.page_size
        context = config.raw.get("max_position_embeddings")
        longest = max(groups, key=lambda group: len(group.prompt), default=None)
        if longest and context and len(longest.prompt) >= context:
            raise ValueError(
                f"prompt {longest.number} has {len(longest.prompt)} tokens; the model's context is {context}"
            )
        most = [-(-(len(group.prompt) + row.cap) // size) for group in groups for row in group.rows]
        held = -(-len(longest.prompt) // size) if longest else 0  # a prompt that waits for rows of its group to start
        wanted = min(sum(most), slots * (max(most, default=1) + held))
        token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        token_bytes *= self.model.head.element_size()
        if self.cuda:  # once for all calls, because FlexAttention and the graphs are made for this pool
            wanted = (self.rows or 512) * -(-(context or 32768) // size)
        if self.cache_tokens:
            wanted = self.cache_tokens // size
        elif self.cache is None or (wanted > self.cache.pages and not self.cuda):
            if self.affordable is None:
                self.affordable = int(self.memory_share * _free_bytes(self.device)) // token_bytes
            free = self.affordable // size
            wanted = min(wanted, free // 256 * 256 if self.cuda else free)  # round: a known shape is compiled already
        if self.cache is None or (wanted > self.cache.pages and not self.cuda):
            self.graphs.clear()
            self.cache = None  # before the new one comes
            shape = (config.num_hidden_layers, max(1, wanted), size, config.num_key_value_heads, config.head_dim)
            self.cache = PagedCache(*shape, self.model.head)
        slots = max(slots, self.rows or 512) if self.cuda else slots  # at once what any call may need: graphs know it
        if slots >= len(self.newest):
            self.graphs.clear()
            self.newest = torch.zeros(slots + 1, dtype=torch.int64, device=self.device)
        if max(most, default=0) > self.cache.pages:
            raise ValueError(
                f"a prompt and its reply may need {max(most) * size} tokens of cache, which holds "
                f"{self.cache.pages * size}: raise cache_tokens (rollout_cache_tokens in a run's settings), or lower "
                "the cap on replies"
            )


class _DecodeGraph:
    """A decode step of a fixed number of rows as one CUDA graph; its inputs are overwritten before each replay.

    It reads the weights where they lie: they may be updated in place, never moved. On the CPU, for tests, the step is
    run as it is.
    """

    def __init__(self, sampler: Sampler, rows: int, draw: _Draw):
        self.numbers = torch.zeros((4, rows), dtype=torch.int64, device=sampler.device)
        self.unused = len(sampler.newest) - 1
        self.numbers[0] = self.unused
        width = sampler.cache.pages + 1
        self.table = torch.zeros((rows, width), dtype=torch.int32, device=sampler.device)

        def step() -> tuple[Tensor, Tensor]:
            return sampler._decode(self.numbers, draw, FlexPages(sampler.cache, self.table, self.numbers[1]))

        self.run = self._captured(step, sampler.graph_pool) if sampler.cuda else step

    @staticmethod
    def _captured(step: Callable[[], tuple[Tensor, Tensor]], pool) -> Callable[[], tuple[Tensor, Tensor]]:
        """`step` as a graph: the function returned replays it and gives its results, at the same place every time."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, and fills the allocator's and cuBLAS's pools
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog may ask CUDA for something meanwhile. One pool: graphs never run side by side.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            drawn = step()

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return drawn

        return replay

    def replay(self, numbers: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """(token, log-prob) of the rows, [rows] each; those beyond the given ones write to the scratch page."""
        count = numbers.shape[1]
        self.numbers.zero_()
        self.numbers[0] = self.unused
        self.numbers[:, :count] = numbers
        self.table[:count, : table.shape[1]] = table
        self.table[count:, 0] = 0
        return self.run()


def _rollout(row: Row) -> Rollout:
    """A reply that has ended."""
    return Rollout(row.group.number, row.sample, row.group.prompt, row.reply, row.logprobs, row.finished)


def _padded_rows(rows: int) -> int:
    """The next of 8, 16, 32, 64, then every 64."""
    return next((count for count in (8, 16, 32) if rows <= count), -(-rows // 64) * 64)


def _numbers(rows: Sequence[Row], dummy: int = -1) -> np.ndarray:
    """Slot, position of the newest token, random stream and number of the drawn token in its reply: int64 [4, rows]."""
    numbers = [(row.slot if row.slot >= 0 else dummy, row.cached - 1, row.stream, row.drawn - 1) for row in rows]
    return np.array(numbers, dtype=np.int64).reshape(-1, 4).T


def _fetch(token: Tensor, logprob: Tensor) -> Callable[[], tuple[list[int], list[float]]]:
    """Begin to copy the results to the host; the function returned waits for them."""
    both = torch.stack((token.double(), logprob.double())).to("cpu", non_blocking=True)  # one copy; ids stay exact
    done = torch.cuda.Event() if token.is_cuda else None
    if done:
        done.record()

    def wait() -> tuple[list[int], list[float]]:
        if done:
            done.synchronize()
        return both[0].long().tolist(), both[1].tolist()

    return wait


def _check_finite(rows: Sequence[Row], logprobs: Sequence[float]) -> None:
    for row, logprob in zip(rows, logprobs, strict=True):
        if not math.isfinite(logprob):
            where = f"token {len(row.reply)} of reply {row.sample} to prompt {row.group.number}"
            raise ValueError(f"the model's logits are not finite at {where}; are its weights?")


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not every system tells
        return 4 << 30


def _caps(max_new_tokens: int | list[int], prompts: int, group_size: int) -> list[list[int]]:
    """The cap of each reply, [prompts][group_size], from one number, one per prompt or one per reply."""
    if isinstance(max_new_tokens, int):
        return [[max_new_tokens] * group_size] * prompts
    caps = list(max_new_tokens)
    if len(caps) == prompts:
        return [[cap] * group_size for cap in caps]
    if len(caps) == prompts * group_size:
        return [caps[i : i + group_size] for i in range(0, len(caps), max(1, group_size))]
    raise ValueError(f"{prompts} prompts with {group_size} replies each, but {len(caps)} max_new_tokens")


def _check(prompts, vocab_size, group_size, temperature, caps, keys, top_p, top_k) -> None:
    if empty := [i for i, prompt in enumerate(prompts) if not prompt]:
        raise ValueError(f"prompt {empty[0]} is empty; there is nothing to continue")
    for i, prompt in enumerate(prompts):
        if max(prompt) >= vocab_size or min(prompt) < 0:
            strange = next(token for token in prompt if not 0 <= token < vocab_size)
            raise ValueError(f"prompt {i} holds token id {strange}; the model knows 0 to {vocab_size - 1}")
    if len(keys) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(keys)} keys")
    least = min((cap for group in caps for cap in group), default=1)
    if least < 1 or group_size < 1:
        raise ValueError(f"max_new_tokens ({least}) and group_size ({group_size}) must be at least 1")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"out of range: temperature {temperature} >= 0, top_p {top_p} in (0, 1], top_k {top_k} >= 0")
