"""Which sequence runs when, and in which blocks of the key/value cache: plain integers, no tensors.

    schedule       the next step: waiting prompts and preempted sequences as one packed prefill, else one decode step
    postprocess    append the sampled tokens; finished sequences free their blocks at once

A prompt of 2½ blocks and its five replies; `=` is shared, `'` a copy of the partly filled block:

    prompt    [ p0 ][ p1 ][ p2  ]                       prefilled once
    reply 0   [ p0=][ p1=][ p2 ··][ ···· ]              continues in the prompt's own last block
    reply 1   [ p0=][ p1=][ p2'··][ ···· ][ ·· ]
    reply 2   [ p0=][ p1=][ p2'· ]
    ...

No blocks are reserved for max_new_tokens: a sequence takes a block when its last one is full. When no block is free the
youngest sequence is preempted; it keeps its tokens and recomputes their keys and values when it resumes.
"""

import math
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple


class Status(Enum):
    """The state of a sequence."""

    WAITING = auto()  # has never had blocks
    RUNNING = auto()
    PREEMPTED = auto()  # lost its blocks, waits to resume
    FINISHED = auto()


@dataclass(eq=False)
class SequenceGroup:
    """A prompt and the replies to sample for it."""

    index: int  # of the prompt in the `generate` batch
    prompt: list[int]  # token ids
    seqs: list["Sequence"] = field(default_factory=list)
    prompt_blocks: list[int] = field(default_factory=list)  # the prompt's blocks, kept for sequences yet to start

    @property
    def num_waiting(self) -> int:
        return sum(seq.status is Status.WAITING for seq in self.seqs)


@dataclass(eq=False)
class Sequence:
    """One reply being sampled."""

    group: SequenceGroup
    index: int  # of the reply in the `generate` batch
    sample: int  # which reply of the group
    max_new_tokens: int
    stream: int = 0  # of its random numbers
    reply: list[int] = field(default_factory=list)  # token ids so far
    logprobs: list[float] = field(default_factory=list)
    status: Status = Status.WAITING
    stopped: bool = False  # finished with a stop token
    num_sampled: int = 0  # tokens sampled, including those that have not come back from the device yet
    num_cached_tokens: int = 0  # tokens, of prompt and reply together, whose keys and values are in its blocks
    block_table: list[int] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        """Prompt and reply."""
        return self.group.prompt + self.reply

    @property
    def num_tokens(self) -> int:
        return len(self.group.prompt) + len(self.reply)


class BlockManager:
    """Reference counts of the cache's blocks 1 .. num_blocks. Block 0 is never allocated: padding uses it."""

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.free_blocks = list(range(num_blocks, 0, -1))
        self.ref_count = [0] * (num_blocks + 1)

    def can_allocate(self, seq: Sequence, reserve: int = 0) -> bool:
        """Whether there are blocks for the tokens of `seq`, so that `reserve` blocks stay free."""
        shared, _, _ = self._prompt_blocks(seq.group)
        return self._num_blocks(seq) - len(shared) + reserve <= len(self.free_blocks)

    def allocate(self, seq: Sequence) -> list[tuple[int, int]]:
        """Give `seq` blocks for its tokens, full blocks of the prompt shared with its group.

        Returns the (from, to) copy of a partly filled block, if there is one. The sequence that computed the prompt
        goes on writing in the source, behind the tokens that the copy needs.
        """
        shared, seq.num_cached_tokens, partial = self._prompt_blocks(seq.group)
        self.share(shared)
        seq.block_table = shared + self._take(self._num_blocks(seq) - len(shared))
        return [] if partial is None else [(partial, seq.block_table[len(shared)])]

    def can_append(self, seq: Sequence) -> bool:
        """Whether there is space for one more token of `seq`."""
        return bool(self.free_blocks) or seq.num_cached_tokens < len(seq.block_table) * self.block_size

    def append(self, seq: Sequence) -> None:
        if seq.num_cached_tokens == len(seq.block_table) * self.block_size:
            seq.block_table += self._take(1)
        seq.num_cached_tokens += 1

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            self.ref_count[block] += 1

    def free(self, blocks: list[int]) -> None:
        """Remove one reference to each block; a block without any is free."""
        for block in blocks:
            self.ref_count[block] -= 1
            if self.ref_count[block] == 0:
                self.free_blocks.append(block)

    def _take(self, count: int) -> list[int]:
        blocks = [self.free_blocks.pop() for _ in range(count)]
        self.share(blocks)
        return blocks

    def _num_blocks(self, seq: Sequence) -> int:
        return -(-seq.num_tokens // self.block_size)

    def _prompt_blocks(self, group: SequenceGroup) -> tuple[list[int], int, int | None]:
        """Full blocks of the prompt that can be shared, the prompt tokens cached so, and a partly filled block."""
        num_full = len(group.prompt) // self.block_size
        if group.prompt_blocks:
            return group.prompt_blocks[:num_full], len(group.prompt), (group.prompt_blocks[num_full:] or [None])[0]
        for sibling in group.seqs:
            if sibling.status is Status.RUNNING:  # all that run share the same blocks
                return sibling.block_table[:num_full], num_full * self.block_size, None
        return [], 0, None


class Prefill(NamedTuple):
    """A sequence whose tokens are computed from position `start` on; `num_samples` sequences sample where it ends."""

    seq: Sequence
    start: int
    num_samples: int


@dataclass(frozen=True)
class Step:
    """What to run next: copies of blocks, then a packed prefill if there are any, else a decode step of `seqs`."""

    copies: list[tuple[int, int]] = field(default_factory=list)  # (from block, to block)
    prefills: list[Prefill] = field(default_factory=list)
    seqs: list[Sequence] = field(default_factory=list)  # sample a token each, in the order of the results


@dataclass
class Stats:
    """Counts of one call."""

    prefilled: int = 0  # prompt tokens computed for the first time
    recomputed: int = 0  # tokens computed again for preempted sequences
    preemptions: int = 0


class Scheduler:
    """Continuous batching: at most `max_num_seqs` run, a prefill is full when it has `max_prefill_tokens` or more.

    The first sequence of a group prefills the prompt; where it ends every sequence of the group samples its first
    token. The others then start on the same blocks. Sequences start in order; the youngest is preempted first.
    """

    def __init__(
        self,
        groups: list[SequenceGroup],
        blocks: BlockManager,
        max_num_seqs: int,
        max_prefill_tokens: int,
        stop_ids: Collection[int],
    ):
        self.blocks, self.stop_ids = blocks, stop_ids
        self.max_num_seqs, self.max_prefill_tokens = max_num_seqs, max_prefill_tokens
        self.waiting = deque(group.seqs[0] for group in groups)
        self.running: dict[Sequence, None] = {}  # an ordered set, the eldest first
        self.starting: dict[SequenceGroup, None] = {}  # groups that keep prompt_blocks; an ordered set
        self.num_unfinished = sum(len(group.seqs) for group in groups)
        self.stats = Stats()

    def schedule(self) -> Step | None:
        """The next step; None: nothing can run before results of earlier steps come back, or nothing is left."""
        step, budget = Step(), self.max_prefill_tokens
        while self.waiting and budget > 0:
            if self._can_start(self.waiting[0]):
                budget -= self._start(self.waiting.popleft(), step)
            elif self.starting and not self.running:  # no sequence is there whose end would free blocks
                self._release_prompt(next(reversed(self.starting)))
            else:
                break
        if not step.prefills:
            for seq in list(self.running):
                self._decode(seq, step)
        return step if step.seqs else None

    def _can_start(self, seq: Sequence) -> bool:
        """Whether `seq` may run and there are blocks for it.

        Sequences of groups that have begun come first. A block for each that runs or is about to stays free, so that
        the new one is not preempted at once.
        """
        if seq.num_sampled > len(seq.reply):  # the last token has not come back yet
            return False
        expected = sum(group.num_waiting for group in self.starting) if seq.num_sampled == 0 else 0
        reserve = expected + len(self.running) if self.running else 0
        return len(self.running) + expected < self.max_num_seqs and self.blocks.can_allocate(seq, reserve)

    def _start(self, seq: Sequence, step: Step) -> int:
        """Give `seq` blocks, and add it to the prefill if more than its last token is to compute; returns how many."""
        group, is_new = seq.group, seq.num_sampled == 0
        step.copies.extend(self.blocks.allocate(seq))
        seq.status = Status.RUNNING
        self.running[seq] = None
        if is_new and group.num_waiting:
            group.prompt_blocks = list(seq.block_table)
            self.blocks.share(group.prompt_blocks)
            self.starting[group] = None
        self._release_if_all_started(group)
        start, count = seq.num_cached_tokens, seq.num_tokens - seq.num_cached_tokens
        if seq.reply and count == 1:
            return 0
        samples = group.seqs if is_new else [seq]
        step.prefills.append(Prefill(seq, start, len(samples)))
        step.seqs.extend(samples)
        seq.num_cached_tokens += count
        for sampling in samples:
            sampling.num_sampled += 1
        self.stats.prefilled += count * is_new
        self.stats.recomputed += count * (not is_new)
        return count

    def _decode(self, seq: Sequence, step: Step) -> None:
        """Add `seq` to the decode step, preempting the youngest sequences while there is no block for its token."""
        if seq not in self.running or seq.num_sampled == seq.max_new_tokens:  # preempted, or its last is being sampled
            return
        while not self.blocks.can_append(seq):
            if self.starting:
                self._release_prompt(next(reversed(self.starting)))
                continue
            youngest = next(reversed(self.running))
            self._preempt(youngest)
            if youngest is seq:
                return
        self.blocks.append(seq)
        seq.num_sampled += 1
        step.seqs.append(seq)

    def postprocess(self, seqs: list[Sequence], tokens: list[int], logprobs: list[float]) -> list[Sequence]:
        """Append the sampled tokens to their sequences; returns those that finish, by a stop token or the limit.

        Raises ValueError for a log-prob that is not finite.
        """
        finished, to_start = [], []
        for seq, token, logprob in zip(seqs, tokens, logprobs, strict=True):
            if seq.status is Status.FINISHED:  # one step more was launched before its stop token came back
                continue
            if not math.isfinite(logprob):
                where = f"token {len(seq.reply)} of reply {seq.sample} to prompt {seq.group.index}"
                raise ValueError(f"the model's logits are not finite at {where}; are its weights?")
            seq.reply.append(token)
            seq.logprobs.append(logprob)
            seq.stopped = token in self.stop_ids
            if seq.stopped or len(seq.reply) == seq.max_new_tokens:
                self._finish(seq)
                finished.append(seq)
            elif seq.status is Status.WAITING:
                to_start.append(seq)
        self.waiting.extendleft(reversed(to_start))
        self.num_unfinished -= len(finished)
        return finished

    def _finish(self, seq: Sequence) -> None:
        if seq.status is Status.RUNNING:
            self._free(seq)
        elif seq.status is Status.PREEMPTED:  # while its last token was being sampled
            self.waiting.remove(seq)
        seq.status = Status.FINISHED
        self._release_if_all_started(seq.group)

    def _preempt(self, seq: Sequence) -> None:
        """Free the sequence's blocks; it is the next to start."""
        self._free(seq)
        seq.status = Status.PREEMPTED
        self.waiting.appendleft(seq)
        self.stats.preemptions += 1

    def _free(self, seq: Sequence) -> None:
        self.blocks.free(seq.block_table)
        seq.block_table, seq.num_cached_tokens = [], 0
        self.running.pop(seq)

    def _release_prompt(self, group: SequenceGroup) -> None:
        """Keep the prompt's blocks no longer for sequences to come; those that run keep what they share."""
        self.blocks.free(group.prompt_blocks)
        group.prompt_blocks = []
        self.starting.pop(group)

    def _release_if_all_started(self, group: SequenceGroup) -> None:
        if group in self.starting and not group.num_waiting:
            self._release_prompt(group)
